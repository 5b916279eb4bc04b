"""The demo page: the plain and the controlled image side by side, the settings, and a gallery of earlier images."""

import functools
import html
import inspect
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from gradio.components import Component

from improved_ldm.conditioning.control import variables_read
from improved_ldm.demo.bundled import first_prompt
from improved_ldm.demo.comparison import Settings
from improved_ldm.demo.editor import picture_url, view_editor
from improved_ldm.demo.limits import MAX_PROMPT, MAX_SEED, MAX_WAITING, Range
from improved_ldm.demo.link import write_link
from improved_ldm.demo.opening import Strip, control_strip, guidance_strip
from improved_ldm.demo.server import Page
from improved_ldm.demo.studio import Studio
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.places import name_of
from improved_ldm.resolution import resolution_of, size_text

HERE = Path(__file__).parent
STYLE = (HERE / "page.css").read_text(encoding="utf-8")
VISIT = 3600  # seconds after which images are removed if the end of a visit was not noticed
DEVICE = "device"  # of which one request at a time uses all


def build_demo(
    pipeline: ImprovedLDMPipeline,
    name: str = "",
    about: str = "",
    queue: int = MAX_WAITING,
    prompt: str | None = None,
) -> Page:
    """Draw the first images of a pipeline and build its page, ready to `launch`.

    Args:
        pipeline: Pipeline to sample from, on its current device.
        name: Place of the pipeline. The page shows its name without folders.
        about: Description of the pipeline for visitors.
        queue: Maximum number of waiting requests. Further ones get the answer that the queue is full.
        prompt: Prompt with which the page of a text model starts; default: that of the bundled pipeline.

    Returns:
        The page. It loads nothing from other servers, accepts no files and keeps no images after the visit.

    Raises:
        ValueError: If the prompt is out of bounds.
    """
    pipeline.set_progress_bar_config(disable=True)
    model = name_of(name) if name else type(pipeline.denoiser).__name__
    studio = Studio(pipeline, model, first_prompt() if prompt is None else prompt)
    first, limits, read = studio.first, studio.limits, pipeline.denoiser.control_inputs
    is_steered = any(row.shown(pipeline.default_image_size) for row in variables_read(read))

    def end_visit(request: gr.Request):
        demo.state_holder.delete_state(request.session_hash)  # which calls `forget`

    with Page(studio.pictures, title="improved_ldm", analytics_enabled=False, fill_width=True) as demo:
        gr.HTML(_head(pipeline, model), apply_default_css=False)
        history = gr.State([first], time_to_live=VISIT, delete_callback=studio.forget)
        with gr.Row(elem_id="page"):
            gr.HTML(
                html.escape(about), apply_default_css=False, visible=bool(about), elem_id="about", elem_classes="bare"
            )
            with gr.Row(elem_id="pictures"):
                plain = _image_output("Plain", "plain", first.plain, visible=is_steered)
                asked = _image_output("As asked, equal seed", "asked", first.asked)
            with gr.Column(elem_id="settings"):
                with gr.Row(equal_height=False):
                    with gr.Column(scale=26, min_width=240):
                        subject = _subject_input(pipeline, first.settings)
                        seed, any_seed = _seed_input(first.settings)
                        guidance, steps = _guidance_input(studio), _steps_input(studio)
                    with gr.Column(scale=27, min_width=260, visible=bool(read)):
                        editor = view_editor(
                            first.settings.view,
                            read,
                            limits.side.maximum,
                            limits.shapes,
                            picture_url(studio.first_images[0]),
                            container=True,
                            visible=is_steered,
                            elem_id="view",
                        )
                        control_guidance = _control_guidance_input(studio, is_steered)
                with gr.Row(elem_id="actions"):
                    draw_button = gr.Button("Draw", variant="primary", elem_id="draw")
                    link = _link_button(write_link(first.settings, limits))
            gallery = _gallery(studio.gallery([first]))

        inputs = [subject, seed, guidance, control_guidance, steps, editor]  # in the order of Settings
        outputs = [history, gallery, link, seed, editor, plain, asked]
        signature = _with_name(studio.draw, "subject", limits.subject)  # the names in the API
        draws = {
            "inputs": [history, *inputs],
            "outputs": outputs,
            "show_progress_on": [plain, asked],
            "concurrency_limit": 1,
            "concurrency_id": DEVICE,
            "preprocess": False,  # `limits` checks the values exactly as sent
        }
        any_seed.click(None, outputs=seed, js=f"() => Math.floor(Math.random() * {MAX_SEED})")
        gr.on(
            [draw_button.click, *([subject.submit] if pipeline.takes_text else [])],
            _signed(studio.draw_new, signature),
            api_visibility="private",
            **draws,
        )
        opened = link.submit(studio.open_link, None, inputs, show_progress="hidden", api_visibility="private")
        opened.success(_signed(studio.draw, signature), api_name="draw", **draws)
        gallery.select(
            studio.go_back, history, [*inputs, link, plain, asked], show_progress="hidden", api_visibility="private"
        )
        demo.unload(end_visit)
    demo.queue(api_open=False, max_size=queue)  # no call bypasses the queue
    return demo


def _head(pipeline: ImprovedLDMPipeline, model: str) -> str:
    """The style and the head of the page."""
    denoiser = pipeline.denoiser
    size = size_text(resolution_of(*pipeline.default_size))
    kind = f"{type(denoiser).__name__}, {denoiser.num_parameters() / 1e6:,.1f} M parameters, {size} px"
    return f"<style>{STYLE}</style><div id='head'><h1>improved_ldm</h1><p>{html.escape(f'{model} · {kind}')}</p></div>"


def _subject_input(pipeline: ImprovedLDMPipeline, first: Settings) -> Component:
    """The input for the prompt of a text model or the class of a class model."""
    if pipeline.takes_text:
        return gr.Textbox(
            first.subject,
            label="Prompt",
            lines=2,
            max_lines=2,
            max_length=MAX_PROMPT,
            submit_btn=False,
            elem_id="subject",
        )
    return gr.Dropdown(
        [(pipeline.class_name(label), label) for label in range(pipeline.denoiser.config.num_classes)],
        value=first.subject,
        label="Class",
        elem_id="subject",
    )


def _seed_input(first: Settings) -> tuple[gr.Number, gr.Button]:
    with gr.Row(equal_height=True):
        seed = gr.Number(
            first.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=90, elem_id="seed"
        )
        return seed, gr.Button("Random", size="sm", min_width=80, elem_id="any-seed")


def _guidance_input(studio: Studio) -> gr.Slider:
    pipeline, limit, first = studio.pipeline, studio.limits.guidance_scale, studio.first.settings
    slider = _slider(limit, first.guidance_scale, 0.1, label="Guidance", elem_id="guidance")
    strip = guidance_strip(pipeline, first, studio.first_images[0], limit.maximum)
    _show_strip(strip, f"how strictly the {'prompt' if pipeline.takes_text else 'class'} holds")
    return slider


def _control_guidance_input(studio: Studio, is_steered: bool) -> gr.Slider:
    limit, first = studio.limits.control_guidance_scale, studio.first.settings
    value = first.control_guidance_scale
    slider = _slider(limit, value, 0.1, label="Control guidance", elem_id="control-guidance")
    if is_steered:
        _show_strip(control_strip(studio.pipeline, first, studio.first_images[1]), "how strongly the view acts")
    return slider


def _steps_input(studio: Studio) -> gr.Slider:
    steps = studio.first.settings.num_inference_steps
    return _slider(studio.limits.num_inference_steps, steps, 1, label="Steps", elem_id="steps")


def _slider(values: Range, value: float, step: float, **kwargs) -> gr.Slider:
    return gr.Slider(values.minimum, values.maximum, value, step=step, **kwargs)


def _show_strip(strip: Strip, meaning: str):
    """Show small images above the values of a scale that they are drawn with."""
    figures = "".join(
        f"<figure><img src='{picture_url(image)}' alt='' /><figcaption>{value:g}</figcaption></figure>"
        for value, image in strip
    )
    gr.HTML(f"<div class='strip'><p>{meaning}</p>{figures}</div>", apply_default_css=False, elem_classes="bare")


def _image_output(label: str, name: str, file: str, visible: bool = True) -> gr.Image:
    return gr.Image(
        file,
        label=label,
        format="png",
        type="pil",
        height=330,
        min_width=120,
        interactive=False,
        buttons=["download"],
        visible=visible,
        elem_id=name,
        elem_classes="drawing",
    )


def _gallery(drawn: list[tuple[str, str]]) -> gr.Gallery:
    return gr.Gallery(
        drawn,
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


def _link_button(query: str) -> gr.HTML:
    """A button that copies the link of the settings; its value is the query of the link, which the address shows."""
    return gr.HTML(
        query,
        html_template='<button type="button">Copy link</button>',
        js_on_load=(HERE / "link.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        label="Link",  # its name in the API
        elem_id="link",
        elem_classes="bare",
    )


def _with_name(function: Callable, old: str, new: str) -> inspect.Signature:
    """The signature of a function with one parameter renamed."""
    signature = inspect.signature(function)
    parameters = [value.replace(name=new) if key == old else value for key, value in signature.parameters.items()]
    return signature.replace(parameters=parameters)


def _signed(method: Callable, signature: inspect.Signature) -> Callable:
    """A function that calls a method and has a signature of its own."""

    @functools.wraps(method)
    def call(*values):
        return method(*values)

    call.__signature__ = signature
    return call
