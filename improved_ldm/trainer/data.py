"""The sets of a run: opened, and looked at before training."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from improved_ldm.data.buckets import Buckets, default_step
from improved_ldm.data.mixture import Mixture, Source
from improved_ldm.data.sources import Rows, RowStream, open_rows
from improved_ldm.data.tally import skipped_rows
from improved_ldm.naming import DATA_KEYS, naming_keys, naming_part
from improved_ldm.places import shareable_place
from improved_ldm.trainer.data_sections import (
    DataConfig,
    ImageDataConfig,
    ImageSourceConfig,
    LabelledDataConfig,
    LabelledSourceConfig,
    SourceConfig,
    TransformConfig,
)

SURVEYED_ROWS = 256


@dataclass(frozen=True)
class Survey:
    """What the first rows of a set show.

    Args:
        captions: distinct captions, in order of appearance.
        original_side: median of the images' shorter sides, pixels.
    """

    captions: list[str]
    original_side: int


def open_data(config: DataConfig, takes_text: bool, keys: Mapping[str, str] = DATA_KEYS) -> Mixture:
    """Open the sets of a run, with captions or with class labels; the arguments are those of `open_sets`."""
    return open_sets(config, text_columns, keys) if takes_text else open_labelled(config, keys)


def open_labelled(config: LabelledDataConfig, keys: Mapping[str, str] = DATA_KEYS) -> Mixture:
    """Open the sets of a run with class labels; the arguments are those of `open_sets`."""

    def columns(source: LabelledSourceConfig) -> dict[str, Any]:
        return {"caption_column": None, "label_column": source.label_column}

    return open_sets(config, columns, keys, reads_labels=True)


def open_images(config: ImageDataConfig, keys: Mapping[str, str] = DATA_KEYS) -> Mixture:
    """Open the sets of a run, without captions or labels; the arguments are those of `open_sets`."""
    return open_sets(config, lambda _: {"caption_column": None}, keys)


def open_sets(
    config: ImageDataConfig,
    columns_of: Callable[[ImageSourceConfig], dict[str, Any]],
    keys: Mapping[str, str] = DATA_KEYS,
    reads_labels: bool = False,
) -> Mixture:
    """Open the sets of a run.

    Args:
        config: the sets.
        columns_of: function from a set to the arguments of `open_rows` that say what is read besides images.
        keys: keys of the configuration by the names of arguments, for messages.
        reads_labels: whether labels are read with the rows.

    Raises:
        FileNotFoundError, ValueError: as in `open_rows`, with the names of the configuration's keys.
    """
    sources, names = [], _distinct_names([shareable_place(place) for place in config.places])
    for number, source in enumerate(config.each_source()):
        prefix = f"data.sources[{number}]" if config.sources else "data"
        with naming_keys(**{name: key.replace("data", prefix, 1) for name, key in keys.items()}):
            rows = open_rows(source.source, source.split, source.name, source.image_column, **columns_of(source))
        rows = source.apply(rows if reads_labels else replace(rows, label_column=None))
        sources.append(Source(rows, names[number] if config.sources else "", source.weight))
    with naming_keys(num_classes="data.num_classes"):
        return Mixture.join(tuple(sources), config.num_classes if reads_labels else None)


def _distinct_names(names: list[str]) -> list[str]:
    """The names of sets, with the number of the set where several have the same."""
    return [f"{name} (number {number})" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]


def text_columns(source: SourceConfig) -> dict[str, Any]:
    """The arguments of `open_rows` for captions."""
    template = source.caption_template
    return {
        "caption_column": source.caption_column,
        "caption_weights": source.caption_weights,
        "caption_template": template,
        "label_column": source.label_column if template else None,
    }


def survey(mixture: Mixture) -> Survey:
    """Look at the first rows of each set.

    Raises:
        ValueError: if none of a set's images can be read, or captions are wanted and all are empty.
        CorruptImagesError: if too many of them cannot be read.
    """
    looks = []
    for source in mixture.sources:
        with naming_part(source.name):
            looks.append(_survey_of(source.rows))
    in_turn = itertools.zip_longest(*(look.captions for look in looks))
    captions = dict.fromkeys(caption for captions in in_turn for caption in captions if caption)
    return Survey(list(captions), round(median(look.original_side for look in looks)))


def _survey_of(rows: Rows) -> Survey:
    captions, sides = {}, []
    stream = RowStream(rows, shuffle_window=1, repeat=False, min_size=(1, 1))
    for row in stream:
        if row.caption:
            captions[row.caption] = None
        sides.append(min(row.size))
        if len(sides) == SURVEYED_ROWS:
            break
    if not sides:
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in skipped_rows(stream.state_dict()).items())
        raise ValueError(f"the set holds no image that can be read and is used{f' ({reasons})' if reasons else ''}.")
    if rows.caption_column is not None and not captions:
        raise ValueError(f"column {rows.caption_column!r} holds no caption in the first {len(sides)} rows.")
    return Survey(list(captions), round(median(sides)))


def count_classes(config: LabelledDataConfig, mixture: Mixture) -> int:
    """The number of classes of opened sets; a ValueError if it is not known."""
    count = len(mixture.class_names or ()) or config.num_classes
    if count is None:
        column = config.label_column
        raise ValueError(f"column {column!r} does not name its classes: give `--data.num_classes`.")
    return count


def run_buckets(config: TransformConfig) -> Buckets | None:
    """The buckets of a run; None if all its samples have one size.

    Raises:
        ValueError: if the keys of the buckets do not suit each other.
    """
    if not config.buckets:
        return None
    if not isinstance(config.resolution, int):
        raise ValueError(
            f"`transform.resolution` is {config.resolution}; with `transform.buckets` it must be one number, the side "
            "of the square that has the area of all buckets."
        )
    keys = ("resolution", "bucket_step", "max_aspect")
    with naming_keys(**{key: f"transform.{key}" for key in keys}):
        step = config.bucket_step or default_step(config.resolution)
        return Buckets(config.resolution, step, config.max_aspect)


def check_buckets(config: TransformConfig, multiple: int):
    """Raise a ValueError if the sides of buckets do not divide into latent patches of `multiple` pixels."""
    buckets = run_buckets(config)
    if buckets is not None and buckets.step % multiple:
        step = f"{buckets.step} by default" if config.bucket_step is None else buckets.step
        needed = f"a multiple of {multiple} pixels, a latent patch"
        raise ValueError(f"`transform.bucket_step` is {step}; it must be {needed}.")
