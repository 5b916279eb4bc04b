"""Captioned images from the Hub, parquet, webdataset shards, image folders or the embedded set, exactly resumable."""

import glob
import io
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import datasets
import fsspec
import torch
from datasets.data_files import DataFilesList, get_data_patterns
from datasets.distributed import split_dataset_by_node
from PIL import Image, ImageOps

from improved_ldm.seeds import derive_seed

logger = logging.getLogger(__name__)

EMBEDDED = {"embedded:fashion-mnist": Path(__file__).parents[1] / "assets" / "fashion-mnist"}
EXTENSIONS = {
    "parquet": (".parquet",),
    "webdataset": (".tar",),
    "imagefolder": (".jpg", ".jpeg", ".png", ".webp"),
}
METADATA = ("metadata.jsonl", "metadata.csv")  # the files that caption an image folder
# Where webdataset shards hold what a parquet file calls image, text and label.
WEBDATASET_COLUMNS = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "text": ("txt", "json.text", "json.caption"),
    "label": ("cls", "json.label"),
}

MAX_CORRUPT = 0.05  # fraction of unreadable images that a run may skip
MIN_ROWS_TO_JUDGE = 100  # rows after which that fraction is held against the set before a pass is over
IN_ORDER_WINDOW = 64  # rows read at once when nothing is shuffled
PARQUET_BATCH = 256  # rows taken from a parquet file at once
SHARDS_PER_READER = 4  # from here on whole shards are dealt out, although some readers then get one more
EXIF_ORIENTATION = 0x0112


class CorruptImagesError(RuntimeError):
    """Too many images of a set cannot be read."""


@dataclass(frozen=True)
class Rows:
    """An opened set of images whose columns are known to exist.

    Args:
        dataset: the streamed rows, images undecoded.
        image_column, caption_column, label_column: where a row keeps them; `a.b` is field b of column a, None is
            not read.
        num_classes: that labels must be below; None where it is not known.
    """

    dataset: datasets.IterableDataset
    image_column: str
    caption_column: str | None
    label_column: str | None
    num_classes: int | None = None

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their labels, or None if the set does not tell."""
        feature = (self.dataset.features or {}).get(self.label_column)
        return feature.names if isinstance(feature, datasets.ClassLabel) else None


@dataclass(frozen=True)
class Row:
    """One image and what is known of it.

    Args:
        image: RGB, possibly decoded at a reduced size.
        size: (height, width) of the stored image, pixels.
        caption: "" where the set has none for this image; None if captions are not read.
        label: class index; None if labels are not read.
        seed: of the random transforms of this row in this epoch.
    """

    image: Image.Image
    size: tuple[int, int]
    caption: str | None
    label: int | None
    seed: int


def open_rows(
    path: str | Path | list,
    split: str = "train",
    name: str | None = None,
    image_column: str = "image",
    caption_column: str | None = "text",
    label_column: str | None = None,
    num_classes: int | None = None,
) -> Rows:
    """Open a set of images for streaming and check that it holds what is asked of it.

    Args:
        path: `embedded:fashion-mnist`; a folder with parquet files, webdataset shards (.tar) or images with a
            metadata file; a file, a glob or a list of such files; or a dataset id on the Hub.
        split: which part of the set. Files are assigned to splits by their names, as `datasets` does.
        name: the configuration of a Hub dataset that has several.
        image_column: the column of encoded images.
        caption_column: the column of captions; None to read none.
        label_column: the column of integer classes; None to read none. For webdataset shards `image`, `text` and
            `label` also find the usual files (jpg, png, webp; txt or json; cls or json).
        num_classes: that labels must be below; None where it is not known.

    Returns:
        The opened rows.

    Raises:
        FileNotFoundError: if there is nothing at a local path, nor on the Hub where it could be an id.
        ValueError: if the format, the split or a column is missing, a column holds something else, or no row is there.
    """
    dataset = _open_dataset(path, split, name)
    if dataset.features:
        dataset = dataset.decode(False)
    first = next(dataset.iter(batch_size=1), None)
    if first is None:
        raise ValueError(f"`path` {path!s} has no rows in its split {split!r}.")
    row = {column: values[0] for column, values in first.items()}
    columns = {
        argument: _find_column(row, column, argument)
        for argument, column in (
            ("image_column", image_column),
            ("caption_column", caption_column),
            ("label_column", label_column),
        )
    }
    _check_types(row, columns)
    dataset = dataset.select_columns(sorted({column.split(".")[0] for column in columns.values() if column}))
    return Rows(dataset, **columns, num_classes=num_classes)


def _open_dataset(path: str | Path | list, split: str, name: str | None) -> datasets.IterableDataset:
    if is_hub_id(path):
        try:
            return datasets.load_dataset(path, name, split=split, streaming=True)
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(
                f"`path` is {path!r}; there is no such folder, and the Hub says: {error}"
            ) from error
    if name is not None:
        raise ValueError(f"`name` is {name!r}; only a dataset on the Hub has configurations, {path!s} is local.")
    files = _local_files(path, split)
    if len(kinds := {_kind(file) for file in files}) > 1 or None in kinds:
        raise ValueError(f"`path` is {path!s}; its files must all be of one kind, .parquet or .tar.")
    kind = kinds.pop()
    # the default is the size of the first row group, with which `datasets` cannot read a file that has no rows
    options = {"batch_size": PARQUET_BATCH} if kind == "parquet" else {}
    return datasets.load_dataset(kind, data_files={split: files}, split=split, streaming=True, **options)


def is_hub_id(path: str | Path | list | None) -> bool:
    """Whether a path has the form of a name on the Hub, and names nothing that is here."""
    return (
        isinstance(path, str)
        and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) is not None
        and not Path(path).exists()
        and _kind(path) is None
    )


def _kind(file: str | Path) -> str | None:
    """The `datasets` builder that reads a file."""
    if Path(file).name in METADATA:
        return "imagefolder"
    suffix = Path(file).suffix.lower()
    return next((kind for kind, extensions in EXTENSIONS.items() if suffix in extensions), None)


def _local_files(path: str | Path | list, split: str) -> list[str]:
    """The files of a split."""
    if isinstance(path, list):
        return [file for item in path for file in _local_files(item, split)]
    if str(path).startswith("embedded:"):
        if path not in EMBEDDED:
            raise ValueError(f"`path` is {path!r}; the embedded sets are {', '.join(EMBEDDED)}.")
        path = EMBEDDED[path]
    if Path(path).is_dir():
        return _folder_files(Path(path), split)
    files = [str(path)] if Path(path).is_file() else sorted(glob.glob(str(path), recursive=True))
    if not files:
        raise FileNotFoundError(f"`path` is {path!s}; there is no such file or folder, and a glob matches nothing.")
    return files


def _folder_files(folder: Path, split: str) -> list[str]:
    found = [file for file in folder.rglob("*") if file.is_file()]
    kinds = {_kind(file) for file in found}
    kind = next((kind for kind in EXTENSIONS if kind in kinds), None)
    if kind is None:
        suffixes = ", ".join(sorted({file.suffix.lower() or file.name for file in found}))
        raise ValueError(
            f"`path` is {folder}; it must hold .parquet files, .tar shards or images "
            f"({', '.join(EXTENSIONS['imagefolder'])}); it holds {suffixes or 'no files'}."
        )
    splits = {
        str(key): [
            file for file in DataFilesList.from_patterns(patterns, base_path=str(folder)) if _kind(file) == kind
        ]
        for key, patterns in get_data_patterns(str(folder)).items()
    }
    if not splits.get(split):
        raise ValueError(f"`split` is {split!r}; {folder} has {', '.join(key for key in splits if splits[key])}.")
    return splits[split]


def _find_column(row: dict[str, Any], column: str | None, argument: str) -> str | None:
    if column is None:
        return None
    is_webdataset = "__key__" in row
    candidates = (column, *(WEBDATASET_COLUMNS.get(column, ()) if is_webdataset else ()))
    found = next((candidate for candidate in candidates if _holds(row, candidate)), None)
    if found is None:
        raise ValueError(f"`{argument}` is {column!r}; the set has the columns {', '.join(row)}.")
    return found


def _holds(row: dict[str, Any], column: str) -> bool:
    outer, _, field = column.partition(".")
    return column in row or (isinstance(row.get(outer), dict) and field in row[outer])


def _value(row: dict[str, Any], column: str) -> Any:
    """The value of a column, or of a field inside it where the column is written a.b."""
    if column in row:
        return row[column]
    outer, _, field = column.partition(".")
    return row[outer][field]


def _check_types(row: dict[str, Any], columns: dict[str, str | None]):
    expected = {
        "image_column": ((bytes, dict), "encoded images"),
        "caption_column": ((str, type(None)), "strings"),
        "label_column": (int, "integers"),
    }
    for argument, (types, what) in expected.items():
        column = columns[argument]
        if column is not None and not isinstance(value := _value(row, column), types):
            raise ValueError(f"`{argument}` is {column!r}; it must hold {what}, not {type(value).__name__}.")


def read_image(stored: dict[str, Any] | bytes, min_size: tuple[int, int] | None = None) -> tuple[Image.Image, tuple]:
    """Decode an image.

    Args:
        stored: the encoded bytes, or a dict with `bytes` or the `path` of a file.
        min_size: (height, width), pixels. A JPEG image is decoded at the smallest scale of 1, 1/2, 1/4 or 1/8 that
            is not below it in either side, which is up to twice as fast; None decodes it whole.

    Returns:
        image: RGB, turned upright, transparency on white.
        size: (height, width) of the stored image, pixels.
    """
    encoded = stored if isinstance(stored, bytes) else stored["bytes"]
    if encoded is None:
        with fsspec.open(stored["path"], "rb") as file:
            encoded = file.read()
    image = Image.open(io.BytesIO(encoded))
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    quarter_turn = orientation >= 5
    size = image.size if quarter_turn else image.size[::-1]
    if min_size is not None:
        image.draft(None, min_size if quarter_turn else min_size[::-1])
    return _to_rgb(image if orientation == 1 else ImageOps.exif_transpose(image)), size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16"):  # 16 bits a pixel, which `convert` would clip
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass
class _Position:
    """Where a reader stands: after `offset` rows of a window that starts where `source` says."""

    epoch: int = 0
    window: int = 0
    offset: int = 0
    source: dict | None = None  # state of the dataset at the start of the window; None is the start of a pass
    seen: int = 0  # rows of this pass
    corrupt: int = 0  # unreadable ones among them


class RowStream(torch.utils.data.IterableDataset):
    """Streams the rows of one rank, each DataLoader worker a part of them, in an order that can be resumed exactly.

    Rows are read window by window. The order inside a window and the seed of every row are functions of
    (`seed`, epoch, reader, position), so the place in the stream is the whole state. One window of encoded images is
    held in memory.

    Args:
        rows: the opened set.
        seed: of the order and of the rows' own seeds.
        shuffle_window: rows that are shuffled among themselves; 0 or 1 keeps the set's order.
        repeat: pass over the set for ever, so that ranks of unequal shares never wait for one another; otherwise
            one pass.
        rank, world_size: which process this is, and of how many.
        min_size: (height, width), pixels, that is enough for the transforms; see `read_image`.

    Raises:
        ValueError: if an argument is out of its range; on iteration, if this reader has no rows to repeat, a label is
            not a class index, or the loaded state belongs to another layout.
        CorruptImagesError: on iteration, if more than `MAX_CORRUPT` of the rows cannot be read, judged from
            `MIN_ROWS_TO_JUDGE` rows on and at the end of every pass.

    Source: our choice; the shuffle buffer of `datasets` is lost when a run is resumed.
    """

    def __init__(
        self,
        rows: Rows,
        seed: int = 0,
        shuffle_window: int = 1024,
        repeat: bool = True,
        rank: int = 0,
        world_size: int = 1,
        min_size: tuple[int, int] | None = None,
    ):
        if shuffle_window < 0:
            raise ValueError(f"`shuffle_window` is {shuffle_window}; it must be ≥ 0.")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` is {rank}; with `world_size` {world_size} it must be in [0, {world_size - 1}].")
        self.rows, self.seed, self.shuffle_window, self.repeat = rows, seed, shuffle_window, repeat
        self.rank, self.world_size, self.min_size = rank, world_size, min_size
        self._position = _Position()
        self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """The place after the last row that was given out."""
        return {"layout": self._layout(), **asdict(self._position)}

    def load_state_dict(self, state: dict[str, Any]):
        """Let the next iteration start where `state_dict` was taken."""
        layout, position = state["layout"], {key: value for key, value in state.items() if key != "layout"}
        if layout != self._layout():
            raise ValueError(f"the state was written with {layout}; this stream has {self._layout()}.")
        self._position = _Position(**position)
        self._loaded = True

    def __iter__(self) -> Iterator[Row]:
        if not self._loaded:
            self._position = _Position()
        self._loaded = False
        return self._passes()

    def _layout(self) -> dict[str, int]:
        """What the order of the rows depends on."""
        reader, readers = self._reader()
        return {"seed": self.seed, "shuffle_window": self.shuffle_window, "reader": reader, "readers": readers}

    def _reader(self) -> tuple[int, int]:
        """The index of this rank's worker among all workers of all ranks, and their number."""
        worker = torch.utils.data.get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return self.rank * count + index, self.world_size * count

    def _passes(self) -> Iterator[Row]:
        yield from self._one_pass()
        while self.repeat:
            self._position = _Position(epoch=self._position.epoch + 1)
            yield from self._one_pass()

    def _one_pass(self) -> Iterator[Row]:
        position = self._position
        for window in self._windows():
            order = list(range(len(window)))
            if self.shuffle_window > 1:
                Random(self._seed_of(position.window)).shuffle(order)
            for offset in range(position.offset, len(order)):
                position.offset, position.seen = offset + 1, position.seen + 1
                row = self._read(window[order[offset]], self._seed_of(position.window, offset))
                if position.seen >= MIN_ROWS_TO_JUDGE:
                    self._judge_corrupt()
                if row is not None:
                    yield row
        self._end_pass()

    def _windows(self) -> Iterator[list[dict[str, Any]]]:
        """The windows of the rest of the pass, advancing the position from one to the next."""
        position = self._position
        dataset = self._dataset_of_reader()
        for batch in dataset.iter(batch_size=self.shuffle_window if self.shuffle_window > 1 else IN_ORDER_WINDOW):
            columns = list(batch)
            yield [dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            position.source, position.offset = dataset.state_dict(), 0
            position.window += 1

    def _dataset_of_reader(self) -> datasets.IterableDataset:
        # `datasets` itself would give a worker whole shards only, and none to those beyond the number of shards.
        reader, readers = self._reader()
        dataset = self.rows.dataset
        strategy = "shards" if dataset.num_shards >= SHARDS_PER_READER * readers else "auto"
        dataset = split_dataset_by_node(dataset, reader, readers, strategy=strategy)
        if self.shuffle_window > 1:
            dataset.set_epoch(derive_seed(self.seed, self._position.epoch))  # shuffles the shards, alike on all ranks
        if self._position.source is not None:
            dataset.load_state_dict(self._position.source)
        return dataset

    def _seed_of(self, *place: int) -> int:
        return derive_seed(self.seed, self._position.epoch, self._reader()[0], *place)

    def _read(self, stored: dict[str, Any], seed: int) -> Row | None:
        """The row, or None if its image cannot be read."""
        rows = self.rows
        try:
            image, size = read_image(_value(stored, rows.image_column), self.min_size)
        except Exception as error:  # what PIL raises on damaged bytes depends on the format
            self._count_corrupt(error)
            return None
        caption = None if rows.caption_column is None else _value(stored, rows.caption_column) or ""
        label = None if rows.label_column is None else _value(stored, rows.label_column)
        if rows.label_column is not None and (label is None or not 0 <= label < (rows.num_classes or math.inf)):
            valid = "≥ 0" if rows.num_classes is None else f"in [0, {rows.num_classes - 1}]"
            raise ValueError(
                f"column {rows.label_column!r} has the value {label}; a label must be an integer {valid}."
            )
        return Row(image, size, caption, label, seed)

    def _count_corrupt(self, error: Exception):
        position = self._position
        position.corrupt += 1
        if position.corrupt.bit_count() == 1:  # a power of two: a damaged set does not flood the log
            logger.warning(
                "%d of %d images skipped as unreadable; the last: %r", position.corrupt, position.seen, error
            )

    def _judge_corrupt(self):
        position = self._position
        if position.corrupt > MAX_CORRUPT * position.seen:
            raise CorruptImagesError(
                f"{position.corrupt} of {position.seen} images cannot be read; at most {MAX_CORRUPT:.0%} may be so."
            )

    def _end_pass(self):
        position = self._position
        if position.seen == 0 and self.repeat:
            raise ValueError(
                f"the set has fewer rows than there are ranks × workers: none for number {self._reader()[0]} "
                f"of {self._reader()[1]}."
            )
        if position.corrupt:
            logger.warning("%d of %d images of this pass skipped as unreadable", position.corrupt, position.seen)
        if position.corrupt > 1 or self._reader()[1] == 1:  # one image says little of a small share of the set
            self._judge_corrupt()
