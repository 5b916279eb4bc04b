"""The samples that are measured: what is asked of a pipeline, image by image, and the folder they are drawn into."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tqdm import tqdm

from improved_ldm.conditioning.control import CONTROL_INPUTS
from improved_ldm.data.sources import EXTENSIONS, read_image
from improved_ldm.data.transforms import to_pixels
from improved_ldm.evaluation.networks import weights_sha256
from improved_ldm.evaluation.processes import own_batches, rank_and_world_size
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.provenance import write_json
from improved_ldm.seeds import derive_seed

METADATA, SETTINGS = "metadata.jsonl", "settings.json"

Order = Literal["in_turn", "drawn"]


@dataclass(frozen=True)
class Request:
    """One image that is asked for.

    Args:
        semantic: the prompt or the class label.
        seed: of the image's own generator.
        control: control arguments of the pipeline; what is left out is asked for as the pipeline does by default.
    """

    semantic: str | int
    seed: int
    control: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The request as a line of `metadata.jsonl`, under the column names of a captioned or labelled image set."""
        name = "text" if isinstance(self.semantic, str) else "label"
        return {name: self.semantic, "seed": self.seed, **self.control}


def make_requests(
    choices: Sequence[str] | Sequence[int], count: int, seed: int, control: dict[str, Any], order: Order = "in_turn"
) -> list[Request]:
    """Ask for images; the first n requests are the same for every `count` ≥ n.

    Args:
        choices: prompts or class labels to choose from.
        count: images.
        seed: image i is drawn from `seed` + i.
        control: control arguments of the pipeline, for every image.
        order: whether the choices are taken in turn, or drawn with `seed`, each as likely as it is frequent.
    """
    places = (number if order == "in_turn" else derive_seed(seed, number) for number in range(count))
    return [Request(choices[place % len(choices)], seed + number, control) for number, place in enumerate(places)]


@dataclass(frozen=True)
class SamplingSettings:
    """How a pipeline is called.

    Args:
        num_inference_steps: network evaluations an image.
        guidance_scale: λ.
        control_guidance_scale: β.
    """

    num_inference_steps: int
    guidance_scale: float
    control_guidance_scale: float = 1.0


def check_call(pipeline: ImprovedLDMPipeline, settings: SamplingSettings, control: dict[str, Any]):
    """Raise a ValueError for control that cannot be or that the pipeline does not read, before anything is drawn."""
    unknown = sorted(control.keys() - CONTROL_INPUTS)
    if unknown:
        raise ValueError(f"`control` has {', '.join(unknown)}; it can have {', '.join(sorted(CONTROL_INPUTS))}.")
    side = pipeline.default_size
    controls = pipeline.make_controls(1, side, side, **dict.fromkeys(CONTROL_INPUTS) | control)
    if controls is None and settings.control_guidance_scale != 1:
        raise ValueError(
            f"`control_guidance_scale` is {settings.control_guidance_scale}; the model reads no control, it must be 1."
        )
    if settings.num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` is {settings.num_inference_steps}; it must be ≥ 1.")


def sampler_record(pipeline: ImprovedLDMPipeline, settings: SamplingSettings) -> dict[str, Any]:
    """What draws the images: the denoiser's weights, the sampler with its own settings, and those of the call."""
    return {
        "denoiser_sha256": weights_sha256(pipeline.denoiser),
        "sampler": type(pipeline.scheduler).__name__,
        "sampler_config": json.loads(pipeline.scheduler.to_json_string()),
        **asdict(settings),
        "dtype": str(pipeline.denoiser.dtype).removeprefix("torch."),
    }


def draw_samples(
    pipeline: ImprovedLDMPipeline,
    requests: list[Request],
    settings: SamplingSettings,
    folder: Path,
    batch_size: int,
) -> dict[str, Any]:
    """Draw what is missing of the requested images into a folder, each as a PNG that is whole or not there.

    Batches are fixed and shared among the processes of `torch.distributed`, so that neither their number nor an
    interruption changes an image. A batch of which an image is missing is drawn again, and what is there is kept.

    Args:
        pipeline: draws the images.
        requests: one an image.
        settings: how the pipeline is called.
        folder: gets `000000.png` and so on, `settings.json` and `metadata.jsonl`, and is an image set that
            `open_rows` takes.
        batch_size: images a call.

    Returns:
        What `settings.json` holds: the denoiser's hash, the sampler and the settings.

    Raises:
        ValueError: if the folder holds samples of another pipeline, of other settings or other requests.
    """
    record = sampler_record(pipeline, settings)
    _check_same(folder, record, requests)
    if rank_and_world_size()[0] == 0:
        _begin_folder(folder, record, requests)
    folder.mkdir(parents=True, exist_ok=True)
    batches = own_batches(len(requests), batch_size)
    with tqdm(total=sum(map(len, batches)), unit="img", desc="sampling", disable=rank_and_world_size()[0] > 0) as bar:
        for numbers in batches:
            missing = [number for number in numbers if not _file(folder, number).exists()]
            if missing:
                images = _draw(pipeline, [requests[number] for number in numbers], settings)
                for number in missing:
                    _save_whole(images[number - numbers.start], _file(folder, number))
            bar.update(len(numbers))
    return record


def _draw(pipeline: ImprovedLDMPipeline, requests: list[Request], settings: SamplingSettings) -> list[Image.Image]:
    semantics = [request.semantic for request in requests]
    control = {name: [request.control[name] for request in requests] for name in requests[0].control}
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    name = "prompt" if pipeline.takes_text else "class_labels"
    return pipeline(**{name: semantics}, **control, **asdict(settings), generator=generators).images


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _save_whole(image: Image.Image, file: Path):
    unfinished = file.with_suffix(".unfinished")
    image.save(unfinished, format="PNG")
    unfinished.replace(file)


def _check_same(folder: Path, record: dict[str, Any], requests: list[Request]):
    """Compare a folder that is there with what is about to be drawn into it."""
    if not (folder / SETTINGS).exists():
        return
    old = json.loads((folder / SETTINGS).read_text())
    for name, value in record.items():
        if old.get(name) != value:
            raise ValueError(f"{folder} was drawn with `{name}` {old.get(name)}, not {value}; choose another folder.")
    for there, asked in zip(_metadata(folder), _metadata_lines(requests), strict=False):
        if there != asked:
            raise ValueError(f"{folder} was drawn for {there}, not {asked}; choose another folder.")


def _begin_folder(folder: Path, record: dict[str, Any], requests: list[Request]):
    if len(requests) > len(_metadata(folder)):  # a folder may grow
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in _metadata_lines(requests))
        unfinished = folder / f"{METADATA}.unfinished"
        unfinished.write_text("".join(lines))
        unfinished.replace(folder / METADATA)
    write_json(folder / SETTINGS, record)


def _metadata_lines(requests: list[Request]) -> list[dict[str, Any]]:
    lines = [{"file_name": _file(Path(), number).name, **request.record()} for number, request in enumerate(requests)]
    return json.loads(json.dumps(lines))  # tuples as the file gives them back


def _metadata(folder: Path) -> list[dict[str, Any]]:
    file = folder / METADATA
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@dataclass(frozen=True)
class Samples:
    """Images of one size in a folder, by name.

    Args:
        files: one an image.
        size: (height, width), pixels.
        prompts: what they were asked to show, where `metadata.jsonl` tells it of all of them.
    """

    files: list[Path]
    size: tuple[int, int]
    prompts: list[str] | None

    def pixels(self, numbers: range) -> torch.Tensor:
        """Some of the images as (batch, 3, height, width) in [-1, 1]."""
        return torch.stack([to_pixels(read_image(self.files[number].read_bytes())[0]) for number in numbers])


def open_samples(folder: Path, count: int | None = None) -> Samples:
    """Open a folder of images.

    Args:
        folder: holds the images; `metadata.jsonl` may hold their captions, as in any captioned image folder.
        count: take so many of them; None takes all.

    Raises:
        FileNotFoundError: if the folder is not there.
        ValueError: if it has no images, or fewer than `count`, or of several sizes.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`samples` is {folder}; there is no such folder.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS["imagefolder"])[:count]
    if len(files) < (count or 1):
        raise ValueError(f"`samples` is {folder}; it must hold {count or 'some'} images, but it holds {len(files)}.")
    sizes = {}
    for file in files:
        with Image.open(file) as image:
            sizes.setdefault(image.size[::-1], file.name)
    if len(sizes) > 1:
        (one, first), (other, second), *_ = sizes.items()
        raise ValueError(f"`samples` is {folder}; its images must have one size: {first} is {one}, {second} {other}.")
    texts = {line["file_name"]: line.get("text") for line in _metadata(folder)}
    prompts = [texts.get(file.name) for file in files]
    return Samples(files, next(iter(sizes)), None if None in prompts else prompts)
