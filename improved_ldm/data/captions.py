"""Captions: which of several is drawn, and the caption that a template makes of the name of a class."""

import math
import re
from collections.abc import Sequence
from random import Random
from typing import Any

from improved_ldm.seeds import derive_seed

CAPTION = 0x63617074  # makes the draw of a caption independent of the other draws of its row
LABEL = "{label}"  # the part of a template that the name of the class replaces
NUMBER = re.compile(r"^\d+[_.](?=.)")  # of a folder: the repeats of kohya's scripts, or the number of a class


def check_captions(columns: str | Sequence[str] | None, weights: Sequence[float] | None, template: str | None):
    """Check what is asked for as captions.

    Args:
        columns: column of captions, or several, of which one is drawn.
        weights: positive weight of each column; None weighs them equally.
        template: template of captions.

    Raises:
        ValueError: if there are no columns, one is listed twice, the weights do not fit them, or the template does not
            hold `{label}` once.
    """
    if template is not None and template.count(LABEL) != 1:
        raise ValueError(
            f"`caption_template` is {template!r}; it must hold {LABEL} once, as in 'a photo of a {LABEL}'."
        )
    names = [columns] if isinstance(columns, str) else list(columns or ())
    if columns is not None and (not names or len(set(names)) < len(names)):
        raise ValueError(f"`caption_column` is {names}; it must name at least one column, and each once.")
    if weights is None:
        return
    if len(weights) != len(names):
        raise ValueError(f"`caption_weights` has {len(weights)} values; `caption_column` has {len(names)} columns.")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"`caption_weights` is {list(weights)}; each weight must be positive and finite.")


def text_of_file(content: bytes) -> str:
    """The text of a caption file, without byte order mark, spaces around it and the carriage returns of its lines.

    Raises:
        UnicodeDecodeError: if it is not UTF-8.
    """
    return content.decode("utf-8-sig").replace("\r\n", "\n").strip()


def captions_of(value: Any) -> list[str]:
    """The captions that a value of a column holds; null and blank ones are left out.

    Args:
        value: a string, the bytes of a caption file, a list of these, or None.

    Raises:
        TypeError: if it holds anything else.
        UnicodeError: if a caption is not UTF-8.
    """
    captions = [_caption(item) for item in (value if isinstance(value, list | tuple) else [value])]
    return [caption for caption in captions if caption.strip()]


def _caption(value: Any) -> str:
    if value is None:
        return ""
    text = text_of_file(value) if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise TypeError(f"it is of type {type(text).__name__}")
    text.encode()  # JSON can hold halves of surrogate pairs, which tokenizers refuse
    return text


def draw_caption(options: Sequence[Sequence[str]], weights: Sequence[float] | None, seed: int) -> str:
    """Draw a column by its weight among those with captions, then one of its captions uniformly; "" if there is none.

    Args:
        options: captions of each column.
        weights: positive weight of each column; None weighs them equally.
        seed: seed of the row in this epoch, which alone decides the draw.

    Source: our choice.
    """
    weighed = [pair for pair in zip(options, weights or [1.0] * len(options), strict=True) if pair[0]]
    if not weighed:
        return ""
    random = Random(derive_seed(seed, CAPTION))
    columns, weights = zip(*weighed, strict=True)
    return random.choice(random.choices(columns, weights)[0])


def class_words(name: str) -> str:
    """The name of a class or of its folder as words: without a number before it, with spaces for underscores."""
    return NUMBER.sub("", name).replace("_", " ").strip()


def caption_of_class(template: str, name: str) -> str:
    """The caption that a template makes of the name of a class."""
    return template.replace(LABEL, class_words(name))
