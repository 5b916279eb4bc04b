"""The samples that are measured: what is asked of a pipeline, image by image, and the folder they are drawn into."""

import json
from collections.abc import Iterable, Sequence
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
TEXT_SETTINGS = ("text_padding", "text_noise_scale", "max_text_tokens")  # of a pipeline, beside its weights

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
    """Raise a ValueError for control, guidance or steps that the pipeline does not take, before anything is drawn."""
    unknown = sorted(control.keys() - CONTROL_INPUTS)
    if unknown:
        raise ValueError(f"`control` has {', '.join(unknown)}; it can have {', '.join(sorted(CONTROL_INPUTS))}.")
    side = pipeline.default_size
    controls = pipeline.make_controls(1, side, side, **dict.fromkeys(CONTROL_INPUTS) | control)
    if controls is None and settings.control_guidance_scale != 1:
        raise ValueError(
            f"`control_guidance_scale` is {settings.control_guidance_scale}; the model reads no control, it must be 1."
        )
    steps = settings.num_inference_steps
    pipeline.check_call(side, side, steps, 1, "pil", ())
    try:
        pipeline.set_timesteps(steps, pipeline.latent_shape(1, side, side), pipeline.device)
    except ValueError as error:
        sampler = type(pipeline.scheduler).__name__
        raise ValueError(f"`num_inference_steps` is {steps}; {sampler} refuses it: {error}") from error


def call_pipeline(
    pipeline: ImprovedLDMPipeline, semantics: Sequence[str] | Sequence[int], seeds: Iterable[int], **call
):
    """Images of one call of a pipeline, each from a generator of its own.

    Args:
        pipeline: draws the images.
        semantics: prompts or class labels, as the pipeline reads them.
        seeds: one an image.
        call: further arguments of the pipeline.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    name = "prompt" if pipeline.takes_text else "class_labels"
    return pipeline(**{name: semantics}, **call, generator=generators).images


class Sampler:
    """Draws the requested images of a pipeline into folders, one for each setting of the call.

    Batches are fixed and shared among the processes of `torch.distributed`, so that neither their number nor an
    interruption changes an image. The weights are hashed once, here.

    Args:
        pipeline: draws the images.
        requests: one an image.
        batch_size: images a call.
    """

    def __init__(self, pipeline: ImprovedLDMPipeline, requests: list[Request], batch_size: int):
        self.pipeline, self.requests, self.batch_size = pipeline, requests, batch_size
        self.identity = _identity(pipeline)

    def record(self, settings: SamplingSettings) -> dict[str, Any]:
        """What `settings.json` holds: all of the pipeline that changes an image, and how it is called."""
        return {**self.identity, **asdict(settings)}

    def check_folder(self, folder: Path, settings: SamplingSettings):
        """Raise a ValueError if a folder holds samples of another pipeline, other settings or other requests."""
        if not (folder / SETTINGS).exists():
            return
        old = json.loads((folder / SETTINGS).read_text())
        for name, value in self.record(settings).items():
            if old.get(name) != value:
                there = old.get(name, "that is not recorded")
                raise ValueError(f"{folder} was drawn with `{name}` {there}, not {value}; choose another folder.")
        for there, asked in zip(_metadata(folder), _metadata_lines(self.requests), strict=False):
            if there != asked:
                raise ValueError(f"{folder} was drawn for {there}, not {asked}; choose another folder.")

    def draw(self, folder: Path, settings: SamplingSettings):
        """Draw what is missing in a folder, each image as a PNG that is whole or not there.

        A batch of which an image is missing is drawn again, and what is there is kept.

        Args:
            folder: gets `000000.png` and so on, `settings.json` and `metadata.jsonl`, and is an image set that
                `open_rows` takes.
            settings: how the pipeline is called.

        Raises:
            ValueError: as `check_folder` does.
        """
        self.check_folder(folder, settings)
        is_main = rank_and_world_size()[0] == 0
        if is_main:
            _begin_folder(folder, self.record(settings), self.requests)
        folder.mkdir(parents=True, exist_ok=True)
        batches = own_batches(len(self.requests), self.batch_size)
        with tqdm(total=sum(map(len, batches)), unit="img", desc="sampling", disable=not is_main) as bar:
            for numbers in batches:
                missing = [number for number in numbers if not _file(folder, number).exists()]
                if missing:
                    images = self._call(numbers, settings)
                    for number in missing:
                        _save_whole(images[number - numbers.start], _file(folder, number))
                bar.update(len(numbers))

    def _call(self, numbers: range, settings: SamplingSettings) -> list[Image.Image]:
        requests = self.requests[numbers.start : numbers.stop]
        control = {name: [request.control[name] for request in requests] for name in requests[0].control}
        semantics, seeds = [request.semantic for request in requests], [request.seed for request in requests]
        return call_pipeline(self.pipeline, semantics, seeds, **control, **asdict(settings))


def _identity(pipeline: ImprovedLDMPipeline) -> dict[str, Any]:
    """All of a pipeline that changes an image: weights, the sampler with its settings, and its own settings."""
    networks = {"denoiser": pipeline.denoiser, "vae": pipeline.vae}
    names = ["default_original_size"]
    if pipeline.takes_text:
        networks["text_encoder"] = pipeline.text_encoder
        names += TEXT_SETTINGS
    return {
        **{f"{name}_sha256": weights_sha256(network) for name, network in networks.items()},
        "sampler": type(pipeline.scheduler).__name__,
        "sampler_config": json.loads(pipeline.scheduler.to_json_string()),
        **{name: pipeline.config[name] for name in names},
        "dtype": str(pipeline.denoiser.dtype).removeprefix("torch."),
    }


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _save_whole(image: Image.Image, file: Path):
    unfinished = file.with_suffix(".unfinished")
    image.save(unfinished, format="PNG")
    unfinished.replace(file)


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
