"""The demo page: the settings, the plain and the controlled image side by side, and a gallery of earlier images."""

import html
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gradio as gr
from gradio.components import Component
from PIL import Image

from improved_ldm.conditioning.control import variables_read
from improved_ldm.demo.comparison import Settings, compare, default_view, described
from improved_ldm.demo.editor import picture_url, view_editor
from improved_ldm.demo.limits import MAX_PROMPT, MAX_WAITING, Limits, Range
from improved_ldm.demo.pictures import PictureFolder
from improved_ldm.demo.server import Page, refuse
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.places import shareable_place
from improved_ldm.resolution import resolution_of, size_text

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
FIRST_PROMPT = "a photo of an ankle boot"
FIRST_SEED = 7
KEPT = 24  # entries in the gallery
VISIT = 3600  # seconds after which images are removed if the end of a visit was not noticed
FAILURE = "The drawing failed. Try other settings, or try again later."


class Drawing(NamedTuple):
    """A pair of images and their settings.

    Args:
        settings: Settings of the images.
        plain: Image file of the default view.
        asked: Image file of the requested view.
    """

    settings: Settings
    plain: str
    asked: str


def build_demo(pipeline: ImprovedLDMPipeline, name: str = "", about: str = "", queue: int = MAX_WAITING) -> Page:
    """Build the page of a pipeline, ready to `launch`.

    Args:
        pipeline: Pipeline to sample from, on its current device.
        name: Name of the pipeline, shown at the top of the page.
        about: Description of the pipeline for visitors.
        queue: Maximum number of waiting requests. Further ones get the answer that the queue is full.

    Returns:
        The page. It loads nothing from other servers, accepts no files and keeps no images after the visit.
    """
    pipeline.set_progress_bar_config(disable=True)
    read = pipeline.denoiser.control_inputs
    is_steered = any(row.shown(pipeline.default_image_size) for row in variables_read(read))
    limits = Limits(pipeline)
    pictures = PictureFolder()

    def draw(
        history: list[Drawing],
        subject,
        seed,
        guidance_scale,
        control_guidance_scale,
        num_inference_steps,
        view,
        progress=gr.Progress(),  # noqa: B008 - Gradio passes one for this default
    ):
        """Draw the default view and the requested view with the same seed."""
        try:
            settings = limits.check(subject, seed, guidance_scale, control_guidance_scale, num_inference_steps, view)
            total = settings.num_inference_steps
            images = compare(pipeline, settings, lambda done: progress((done, total), desc="Drawing"))
        except ValueError as error:
            refuse(str(error))
        except Exception as error:  # the message may reveal details of the server, so only the log has it
            raise gr.Error(FAILURE) from error
        plain, asked = map(pictures.save, images)
        # leave out images that were removed to make room for those of other visitors
        history = [Drawing(settings, plain, asked), *(past for past in history if past.plain in pictures)]
        forget(history[KEPT:])
        history = history[:KEPT]
        shown = [(past.asked, _caption(pipeline, past.settings)) for past in history]
        return history, shown, gr.update(picture=picture_url(images[0])), plain, asked

    def forget(history: list[Drawing]):
        pictures.remove(file for drawing in history for file in (drawing.plain, drawing.asked))

    def go_back(history: list[Drawing], chosen: gr.EventData):
        try:
            (*values, view), plain, asked = history[chosen.index]
            picture = picture_url(Image.open(plain))
        except (
            AttributeError,
            IndexError,
            TypeError,
            OSError,
        ):  # a client can send any event, and files can be removed
            refuse(f"the chosen drawing is not one of the {len(history)} in the gallery.")
        return *values, gr.update(value=view, picture=picture), plain, asked

    def end_visit(request: gr.Request):
        demo.state_holder.delete_state(request.session_hash)  # which calls `forget`

    draw.__signature__ = _with_name(draw, "subject", limits.subject)  # the names in the API

    with Page(pictures, title="improved_ldm", analytics_enabled=False, fill_width=True) as demo:
        gr.HTML(_head(pipeline, name, about), apply_default_css=False)
        history = gr.State([], time_to_live=VISIT, delete_callback=forget)
        with gr.Row(equal_height=False):
            with gr.Column(scale=26, min_width=240):
                subject = _subject_input(pipeline)
                with gr.Row(equal_height=True):
                    seed = gr.Number(
                        FIRST_SEED,
                        label="Seed",
                        precision=0,
                        minimum=0,
                        maximum=limits.seed.maximum,
                        min_width=90,
                        elem_id="seed",
                    )
                    any_seed = gr.Button("Random", size="sm", min_width=80, elem_id="any-seed")
                scales = _scale_inputs(pipeline, limits)
                draw_button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=27, min_width=260, visible=is_steered):
                editor = view_editor(limits.view, read, container=True, elem_id="view")
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
        any_seed.click(None, outputs=seed, js=f"() => Math.floor(Math.random() * {limits.seed.maximum})")
        gr.on(
            [draw_button.click, *([subject.submit] if pipeline.takes_text else [])],
            draw,
            [history, *inputs],
            [history, gallery, editor, plain, asked],
            show_progress_on=[plain, asked],
            concurrency_limit=1,  # one request at a time uses the whole device
            preprocess=False,  # `limits` checks the values exactly as sent
            api_name="draw",
        )
        gallery.select(go_back, history, [*inputs, plain, asked], show_progress="hidden", api_visibility="private")
        demo.unload(end_visit)
    demo.queue(api_open=False, max_size=queue)  # no call bypasses the queue
    return demo


def _head(pipeline: ImprovedLDMPipeline, name: str, about: str) -> str:
    """The style and the head of the page."""
    denoiser = pipeline.denoiser
    size = size_text(resolution_of(*pipeline.default_size))
    model = f"{type(denoiser).__name__}, {denoiser.num_parameters() / 1e6:,.1f} M parameters, {size} px"
    return (
        f"<style>{STYLE}</style><div id='head'><h1>improved_ldm</h1>"
        f"<p>{html.escape(f'{shareable_place(name)} · {model}' if name else model)}</p>"
        f"<p class='about'>{html.escape(about)}</p></div>"
    )


def _subject_input(pipeline: ImprovedLDMPipeline) -> Component:
    """The input for the prompt of a text model or the class of a class model."""
    if pipeline.takes_text:
        return gr.Textbox(
            FIRST_PROMPT,
            label="Prompt",
            lines=2,
            max_lines=2,
            max_length=MAX_PROMPT,
            submit_btn=False,
            elem_id="subject",
        )
    return gr.Dropdown(
        [(pipeline.class_name(label), label) for label in range(pipeline.denoiser.config.num_classes)],
        value=0,
        label="Class",
        elem_id="subject",
    )


def _scale_inputs(pipeline: ImprovedLDMPipeline, limits: Limits) -> list[Component]:
    """The inputs for both guidance scales and the number of steps."""
    scale, steps = pipeline.config.default_guidance_scale, pipeline.config.default_num_inference_steps
    reads_control = bool(pipeline.denoiser.control_inputs)
    control = limits.control_guidance_scale
    return [
        _slider(limits.guidance_scale, scale, 0.1, label="Guidance", elem_id="guidance"),
        _slider(control, 1, 0.1, label="Control guidance", visible=reads_control, elem_id="control-guidance"),
        _slider(limits.num_inference_steps, steps, 1, label="Steps", elem_id="steps"),
    ]


def _slider(values: Range, value: float, step: float, **kwargs) -> gr.Slider:
    return gr.Slider(values.minimum, values.maximum, value, step=step, **kwargs)


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


def _with_name(function: Callable, old: str, new: str) -> inspect.Signature:
    """The signature of a function with one parameter renamed."""
    signature = inspect.signature(function)
    parameters = [value.replace(name=new) if key == old else value for key, value in signature.parameters.items()]
    return signature.replace(parameters=parameters)


def _caption(pipeline: ImprovedLDMPipeline, settings: Settings) -> str:
    subject = settings.subject if pipeline.takes_text else pipeline.class_name(settings.subject)
    asked = f" · {described(settings.view)}" if settings.view != default_view(pipeline) else ""
    return f"{subject} · seed {settings.seed}{asked}"
