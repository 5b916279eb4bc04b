"""The page: what to draw, how it is shown, the plain and the asked drawing side by side, and all that was drawn."""

import html
import random
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import gradio as gr
from gradio.components import Component
from PIL import Image

from improved_ldm.demo.comparison import Settings, View, compare
from improved_ldm.demo.editor import picture_url, view_editor
from improved_ldm.pipeline import ImprovedLDMPipeline

STYLE = (Path(__file__).parent / "page.css").read_text()
FIRST_PROMPT = "a photo of an ankle boot"
FIRST_SEED = 7
MAX_SEED = 2**31 - 1
KEPT = 24  # drawings in the gallery
FAILURE = "The drawing failed. Try other settings, or try again later."


class Drawing(NamedTuple):
    """A comparison and what made it."""

    settings: Settings
    plain: Image.Image
    asked: Image.Image


def build_demo(pipeline: ImprovedLDMPipeline, name: str = "", about: str = "") -> gr.Blocks:
    """The page of a pipeline, ready to `launch`.

    Args:
        pipeline: draws, on the device that it is on.
        name: of the pipeline, for the head of the page.
        about: what a visitor should know of it.

    Returns:
        The page. It loads nothing from other servers.
    """
    pipeline.set_progress_bar_config(disable=True)
    default = View.by_default(pipeline)
    read = pipeline.denoiser.control_inputs
    is_steered = bool(default.arguments(read))

    def draw(history: list[Drawing], *values, progress=gr.Progress()):  # noqa: B008 - how Gradio is asked for one
        *others, view = values
        try:
            settings = Settings(*others, View(**view))
            total = settings.num_inference_steps
            plain, asked = compare(pipeline, settings, lambda done: progress((done, total), desc="Drawing"))
        except ValueError as error:
            raise gr.Error(html.escape(str(error))) from error
        except Exception as error:  # what it says may be of the server; the log has it
            raise gr.Error(FAILURE) from error
        history = [Drawing(settings, plain, asked), *history][:KEPT]
        pictures = [(past.asked, _caption(pipeline, past.settings)) for past in history]
        return history, pictures, gr.update(picture=picture_url(plain)), plain, asked

    def go_back(history: list[Drawing], chosen: gr.SelectData):
        (*values, view), plain, asked = history[chosen.index]
        return *values, gr.update(value=asdict(view), picture=picture_url(plain)), plain, asked

    with gr.Blocks(title="improved_ldm", analytics_enabled=False, fill_width=True) as demo:
        gr.HTML(_head(pipeline, name, about), apply_default_css=False)
        history = gr.State([])
        with gr.Row(equal_height=False):
            with gr.Column(scale=26, min_width=240):
                subject = _subject_input(pipeline)
                with gr.Row(equal_height=True):
                    seed = gr.Number(
                        FIRST_SEED,
                        label="Seed",
                        precision=0,
                        minimum=0,
                        maximum=MAX_SEED,
                        min_width=90,
                        elem_id="seed",
                    )
                    any_seed = gr.Button("Random", size="sm", min_width=80, elem_id="any-seed")
                scales = _scale_inputs(pipeline)
                draw_button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=27, min_width=260, visible=is_steered):
                editor = view_editor(default.original_size, read, container=True, elem_id="view")
            with gr.Column(scale=60, min_width=400):
                with gr.Row():
                    plain = _image_output("Plain", "plain", visible=is_steered)
                    asked = _image_output("As asked, equal seed", "asked")
                gallery = gr.Gallery(
                    label="Drawn so far: click one to go back to it",
                    columns=5,
                    height=300,
                    fit_columns=False,
                    format="png",
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="gallery",
                )

        inputs = [subject, seed, *scales, editor]  # in the order of Settings
        any_seed.click(lambda: random.randint(0, MAX_SEED), outputs=seed, show_progress="hidden")
        gr.on(
            [draw_button.click, *([subject.submit] if pipeline.takes_text else [])],
            draw,
            [history, *inputs],
            [history, gallery, editor, plain, asked],
            show_progress_on=[plain, asked],
            concurrency_limit=1,  # the scheduler of a pipeline keeps state
        )
        gallery.select(go_back, history, [*inputs, plain, asked], show_progress="hidden")
    return demo


def _head(pipeline: ImprovedLDMPipeline, name: str, about: str) -> str:
    """The style and the first lines of the page."""
    denoiser = pipeline.denoiser
    model = (
        f"{type(denoiser).__name__}, {denoiser.num_parameters() / 1e6:,.1f} M parameters, {pipeline.default_size} px"
    )
    return (
        f"<style>{STYLE}</style><div id='head'><h1>improved_ldm</h1>"
        f"<p>{html.escape(f'{name} · {model}' if name else model)}</p>"
        f"<p class='about'>{html.escape(about)}</p></div>"
    )


def _subject_input(pipeline: ImprovedLDMPipeline) -> Component:
    """The prompt of a text model, the class of a class model."""
    if pipeline.takes_text:
        return gr.Textbox(FIRST_PROMPT, label="Prompt", lines=2, max_lines=2, submit_btn=False, elem_id="subject")
    return gr.Dropdown(
        [(_class_name(pipeline, label), label) for label in range(pipeline.denoiser.config.num_classes)],
        value=0,
        label="Class",
        elem_id="subject",
    )


def _scale_inputs(pipeline: ImprovedLDMPipeline) -> list[Component]:
    """Both guidance scales and the steps."""
    scale, steps = pipeline.config.default_guidance_scale, pipeline.config.default_num_inference_steps
    reads_control = bool(pipeline.denoiser.control_inputs)
    return [
        gr.Slider(1, max(10, scale), scale, step=0.1, label="Guidance", elem_id="guidance"),
        gr.Slider(0, 5, 1, step=0.1, label="Control guidance", visible=reads_control, elem_id="control-guidance"),
        gr.Slider(1, max(100, steps), steps, step=1, label="Steps", elem_id="steps"),
    ]


def _image_output(label: str, name: str, visible: bool = True) -> gr.Image:
    return gr.Image(
        label=label,
        format="png",
        type="pil",
        height=330,
        interactive=False,
        buttons=["download"],
        visible=visible,
        elem_id=name,
        elem_classes="drawing",
    )


def _caption(pipeline: ImprovedLDMPipeline, settings: Settings) -> str:
    subject = settings.subject if pipeline.takes_text else _class_name(pipeline, settings.subject)
    asked = f" · {settings.view}" if settings.view != View.by_default(pipeline) else ""
    return f"{subject} · seed {settings.seed}{asked}"


def _class_name(pipeline: ImprovedLDMPipeline, label: int) -> str:
    names = pipeline.config.class_names
    return names[label] if names else f"class {label}"
