"""The page's editor of a view: a crop rectangle on a canvas, its numbers, the original size and the flip."""

import base64
import io
from dataclasses import asdict
from pathlib import Path

import gradio as gr
from PIL import Image

from improved_ldm.demo.comparison import View

HERE = Path(__file__).parent


def view_editor(side: float, read: frozenset[str], **kwargs) -> gr.HTML:
    """A component whose value is the fields of a `View`, kept in one place that all its inputs show and change.

    Its property `picture`, a URL, is shown under the rectangle.

    Args:
        side: of the whole image, which is the view at the start, pixels; it may be asked for smaller, not larger.
        read: `control_inputs` of the denoiser; only those are shown.
        kwargs: of the component.
    """
    # no subclass of a component: Gradio would write a .pyi file beside its source
    return gr.HTML(
        asdict(View.of_whole_image(side)),
        html_template=(HERE / "editor.html").read_text(),
        css_template=(HERE / "editor.css").read_text(),
        js_on_load=(HERE / "editor.js").read_text(),
        apply_default_css=False,
        side=side,
        reads=" ".join(sorted(read)),
        picture="",
        **kwargs,
    )


def picture_url(image: Image.Image) -> str:
    """An image as a URL that holds it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
