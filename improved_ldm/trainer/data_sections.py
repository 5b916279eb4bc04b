"""The sections of a run's configuration that say which images it reads, and how they become samples."""

import re
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field, field_validator, model_validator

from improved_ldm.bounds import (
    Aspect,
    Classes,
    Columns,
    Pixels,
    Place,
    Positive,
    Probability,
    Share,
    Sides,
    Text,
    Window,
    Workers,
)
from improved_ldm.data.captions import check_captions
from improved_ldm.data.filters import RowFilter
from improved_ldm.data.rows import Rows
from improved_ldm.data.transforms import CropPolicy, CropPosition
from improved_ldm.settings import Section

MAX_SOURCES = 1000


class ImageRowsConfig(Section):
    """Which images of a set are used."""

    min_size: Pixels | None = None
    """Smallest shorter side of an image, in pixels; smaller images are left out."""
    max_aspect: Aspect | None = None
    """Largest ratio of an image's longer to its shorter side; longer images are left out."""

    def apply(self, rows: Rows) -> Rows:
        """An opened set, of which these rows are used."""
        return replace(rows, row_filter=RowFilter(self.min_size, self.max_aspect))


class RowsConfig(ImageRowsConfig):
    """Which rows of a set are used, and how their captions begin."""

    caption_pattern: Text | None = None
    """Regular expression that occurs in the caption; other rows are left out."""
    caption_prefix: Text | None = None
    """Text that every caption begins with, such as `a stamp: `; empty captions stay empty."""

    @field_validator("caption_pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None):
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"it is no regular expression: {error}") from error
        return pattern

    def apply(self, rows: Rows) -> Rows:
        """An opened set, of which these rows are used, with captions that begin so."""
        used = RowFilter(self.min_size, self.max_aspect, self.caption_pattern)
        return replace(rows, row_filter=used, caption_prefix=self.caption_prefix or "")


class ImageSourceConfig(ImageRowsConfig):
    """One of several sets of images; keys that it does not give are those of `data`."""

    source: Place
    """As in `data`."""
    weight: Positive = 1.0
    """Share of the samples, relative to the other sources."""
    split: Text | None = None
    """Split of the set."""
    name: Text | None = None
    """Configuration of a Hub dataset that has several."""
    image_column: Text | None = None
    """Column of the images."""


class LabelledSourceConfig(ImageSourceConfig):
    """One of several sets of images with labels; keys that it does not give are those of `data`."""

    label_column: Text | None = None
    """Column of the class labels."""


class SourceConfig(RowsConfig, LabelledSourceConfig):
    """One of several sets; keys that it does not give are those of `data`."""

    caption_column: Columns | None = None
    """Column of the captions, or several, of which one is drawn for each image in each epoch."""
    caption_weights: tuple[Positive, ...] | None = None
    """Weight of each column of captions in the draw."""
    caption_template: Text | None = None
    """Caption of images without another, from the name of their class: `a photo of a {label}`."""


class ImageDataConfig(ImageRowsConfig):
    """Where the images come from."""

    source: Place = "embedded:fashion-mnist"
    """`embedded:fashion-mnist`, `embedded:emoji`, a Hub id, or a file or folder of parquet, webdataset or images."""
    sources: Annotated[tuple[ImageSourceConfig, ...], Field(max_length=MAX_SOURCES)] = ()
    """Several sets instead of `source`, each with a weight, and its own columns and filters."""
    split: Text = "train"
    """Split of the set."""
    name: Text | None = None
    """Configuration of a Hub dataset that has several."""
    image_column: Text = "image"
    """Column of the images."""
    shuffle_window: Window = 1024
    """Number of rows of a stream from the Hub that are shuffled together; other sets are shuffled as a whole."""
    num_workers: Workers = 0
    """Processes that read and transform images."""
    accept_changes: bool = False
    """Resume a run even if its data has changed."""

    source_class: ClassVar[type[ImageSourceConfig]] = ImageSourceConfig

    @model_validator(mode="after")
    def _has_one_kind_of_source(self):
        if self.sources and self.source != ImageDataConfig.model_fields["source"].default:
            raise ValueError(f"`source` is {self.source!r}, but `sources` are given too; give one of the two")
        return self

    @property
    def places(self) -> tuple[str, ...]:
        """The sets, as the user names them."""
        return tuple(source.source for source in self.sources) or (self.source,)

    def each_source(self) -> list[ImageSourceConfig]:
        """The sets, each with all keys."""
        shared = self.model_dump(include=self.source_class.model_fields.keys() - {"weight"})
        if not self.sources:
            return [self.source_class(**shared)]
        given = [source.model_dump(exclude_none=True) for source in self.sources]
        own_columns = {"caption_weights": None}  # weights of other columns than those of the source
        return [
            self.source_class(**{**shared, **(own_columns if "caption_column" in source else {}), **source})
            for source in given
        ]


class LabelledDataConfig(ImageDataConfig):
    """Where the images and their class labels come from."""

    sources: Annotated[tuple[LabelledSourceConfig, ...], Field(max_length=MAX_SOURCES)] = ()
    """Several sets instead of `source`, each with a weight, and its own columns and filters."""
    label_column: Text = "label"
    """Column of the class labels, for class-conditional training and `caption_template`."""
    num_classes: Classes | None = None
    """Number of classes; needed if the set does not name its classes."""

    source_class: ClassVar[type[ImageSourceConfig]] = LabelledSourceConfig


class DataConfig(RowsConfig, LabelledDataConfig):
    """Where the images come from."""

    sources: Annotated[tuple[SourceConfig, ...], Field(max_length=MAX_SOURCES)] = ()
    """Several sets instead of `source`, each with a weight, and its own columns and filters."""
    caption_column: Columns = "text"
    """Column of the captions, or several, of which one is drawn for each image in each epoch."""
    caption_weights: tuple[Positive, ...] | None = None
    """Weight of each column of captions in the draw; default: equal."""
    caption_template: Text | None = None
    """Caption of images without another, from the name of their class: `a photo of a {label}`."""

    source_class: ClassVar[type[ImageSourceConfig]] = SourceConfig

    @model_validator(mode="after")
    def _has_captions(self):
        for source in self.each_source():
            check_captions(source.caption_column, source.caption_weights, source.caption_template)
        return self


class HeldOutConfig(Section):
    """Held-out images."""

    source: Place | None = None
    """Set of the held-out images, with the columns of `data`; default: that of `data`."""
    split: Text | None = None
    """Split of the held-out images; default: `validation` or `test`, if a local set has one."""


class TransformConfig(Section):
    """How an image becomes a sample; the fields are those of `ImageTransform`."""

    resolution: Sides = 256
    """Side length of training images in pixels, or [height, width]."""
    crop_policy: CropPolicy = "resize_then_crop"
    """Scale, then crop; crop a box of varying size, then scale; or crop at the scale of a later stage."""
    crop_position: CropPosition = "random"
    """Position of the crop in the image."""
    crop_probability: Probability = 1.0
    """Probability that `crop_then_resize` takes less than the largest square."""
    min_crop: Share = 1.0
    """Side length of the smallest crop, as a fraction of the largest square."""
    flip_probability: Probability = 0.5
    """Probability of a horizontal flip."""
    reduce_probability: Probability = 0.0
    """Probability that an image is scaled down before it is scaled up again."""
    min_original_size: Pixels | None = None
    """Smallest shorter side of an image that is scaled down, in pixels."""
    target_scale: Sides | None = None
    """`resolution` of a later stage; `crop_at_target_scale` crops at its scale."""
    buckets: bool = False
    """Samples of several aspect ratios, all with the area of `resolution`; each image gets the nearest one."""
    bucket_step: Pixels | None = None
    """Sides of buckets are multiples of it, in pixels; default: about a sixteenth of `resolution`."""
    max_aspect: Aspect = 2.0
    """Largest ratio of the sides of a bucket; longer images are cropped to it."""
