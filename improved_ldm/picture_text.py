"""The text of a PNG file that says how its picture was made."""

import json
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from improved_ldm.version import __version__

SOFTWARE = "Software"  # a keyword of the PNG standard


def picture_text(
    semantic: dict[str, Any], seed: int | list[int], control: dict[str, Any], model: str, **more: Any
) -> dict[str, str]:
    """The text of a sampled picture, which is also the `metadata` that matplotlib's `savefig` takes.

    Args:
        semantic: The prompt or the class by its name as the pipeline's argument; a list for a grid.
        seed: Seed of the noise; a list for a grid.
        control: Control arguments of the pipeline; for a grid, those of each column by its label.
        model: Name of the model, without local folders.
        more: Further settings of the pipeline's call.

    Returns:
        Texts by keyword; what is no text is written as JSON.

    Source: the keywords are the pipeline's arguments, our choice.
    """
    values = {**semantic, "seed": seed, "control": control, **more, "model": model}
    values[SOFTWARE] = f"improved_ldm {__version__}"
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def save_png(image: Image.Image, file: Path | BinaryIO, text: dict[str, str]):
    """Save an image as a PNG with a text.

    Args:
        image: Image to save.
        file: File to write.
        text: Texts by keyword of 1 to 79 Latin characters.
    """
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    image.save(file, format="PNG", pnginfo=info)


def read_png_text(file: Path | BinaryIO) -> dict[str, str]:
    """The texts of a PNG file by keyword."""
    with Image.open(file) as image:
        image.load()  # texts can come after the pixels
        return {key: str(value) for key, value in image.text.items()}
