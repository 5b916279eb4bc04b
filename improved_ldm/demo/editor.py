"""The page's editor of a view: a crop rectangle on a canvas, its numbers, the side of the image, and the choices."""

import base64
import html
import io
from pathlib import Path

import gradio as gr
from PIL import Image

from improved_ldm.conditioning.control_row import Variable
from improved_ldm.demo.comparison import CHOICES, View

HERE = Path(__file__).parent
PLACE_OF_CHOICES = "<!-- choices -->"  # placeholder in the template
BY_DEFAULT = "as it comes"


def view_editor(
    view: View, read: frozenset[str], side: float, shapes: dict[str, tuple[int, int]], picture: str, **kwargs
) -> gr.HTML:
    """A component whose value is a `View` that all its inputs show and edit.

    Its property `picture` is the URL of the image below the rectangle.

    Args:
        view: Initial view.
        read: `control_inputs` of the denoiser; only these are shown.
        side: Largest side that can be requested.
        shapes: Sizes of samples by label, from which a shape can be chosen if there are several.
        picture: Initial URL of the image below the rectangle.
        kwargs: Further arguments of the component.
    """
    from_tallest = sorted(shapes.items(), key=lambda shape: shape[1][1] / shape[1][0])
    choices = "".join(_choice_input(row, side) for row in CHOICES if row.name in read)
    template = (HERE / "editor.html").read_text(encoding="utf-8")
    # not a subclass of a component, because Gradio would write a .pyi file next to its source
    return gr.HTML(
        view,
        html_template=template.replace(PLACE_OF_CHOICES, choices),
        css_template=(HERE / "editor.css").read_text(encoding="utf-8"),
        js_on_load=(HERE / "editor.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        label="View",  # its name in the API
        side=side,
        reads=" ".join(sorted(read)),
        shapes=[[label, f"{size[0]}×{size[1]}", *size] for label, size in from_tallest],
        picture=picture,
        **kwargs,
    )


def _choice_input(row: Variable, side: float) -> str:
    """The HTML of a control input: a checkbox for a switch, or else a menu of its shown values."""
    name = row.name.replace("_", " ")
    attributes = f'name="{row.name}" data-choice aria-label="{name}"'
    if row.is_switch:
        element = f'<input type="checkbox" role="switch" {attributes} />'
    else:
        labels = {"": BY_DEFAULT, **{html.escape(label): html.escape(label) for label in row.shown((side, side))}}
        options = "".join(f'<option value="{value}">{label}</option>' for value, label in labels.items())
        element = f"<select {attributes}>{options}</select>"
    return f'<label class="row"><span>{name.capitalize()}</span>{element}</label>'


def picture_url(image: Image.Image) -> str:
    """An image as a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
