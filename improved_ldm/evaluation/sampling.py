"""Sample the images of an evaluation: the requests, one per image, and the folder that the images are saved to."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tqdm import tqdm

from improved_ldm.conditioning.control import CONTROL_INPUTS
from improved_ldm.data.image_folder import read_metadata
from improved_ldm.data.images import read_image
from improved_ldm.data.transforms import pixel_values, to_pixels
from improved_ldm.evaluation.networks import weights_sha256
from improved_ldm.evaluation.processes import own_batches, rank_and_world_size
from improved_ldm.picture_text import picture_text, save_png
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.places import EXTENSIONS
from improved_ldm.provenance import write_json, write_json_lines, write_whole
from improved_ldm.sampling.arguments import read_schedule
from improved_ldm.seeds import derive_seed

METADATA, SETTINGS = "metadata.jsonl", "settings.json"
TEXT_SETTINGS = (
    "text_padding",
    "text_noise_scale",
    "max_text_tokens",
)  # settings of a pipeline that change its images

Order = Literal["in_turn", "drawn"]


@dataclass(frozen=True)
class Request:
    """A request for one image.

    Args:
        semantic: Prompt or class label.
        seed: Seed of the image's own generator.
        control: Control arguments of the pipeline. The pipeline's defaults apply to all others.
    """

    semantic: str | int
    seed: int
    control: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The request as a line of `metadata.jsonl`, with the column names of a captioned or labelled image set."""
        name = "text" if isinstance(self.semantic, str) else "label"
        return {name: self.semantic, "seed": self.seed, **self.control}


def make_requests(
    choices: Sequence[str] | Sequence[int], count: int, seed: int, control: dict[str, Any], order: Order = "in_turn"
) -> list[Request]:
    """Make requests for images. The first n requests are the same for every `count` ≥ n.

    Args:
        choices: Prompts or class labels to choose from.
        count: Number of images.
        seed: Random seed; image i has the seed `seed` + i.
        control: Control arguments of the pipeline for every image.
        order: `in_turn` cycles through the choices; `drawn` picks one at random per image, with equal probability for
            each entry of `choices`.
    """
    places = (number if order == "in_turn" else derive_seed(seed, number) for number in range(count))
    return [Request(choices[place % len(choices)], seed + number, control) for number, place in enumerate(places)]


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of a pipeline's call.

    Args:
        num_inference_steps: Number of sampler steps.
        guidance_scale: Guidance scale λ.
        control_guidance_scale: Guidance scale β of the control.
    """

    num_inference_steps: int
    guidance_scale: float
    control_guidance_scale: float = 1.0


def check_settings(pipeline: ImprovedLDMPipeline, settings: SamplingSettings, control: dict[str, Any]):
    """Raise a ValueError before sampling for control, guidance or steps that the pipeline does not support."""
    unknown = sorted(control.keys() - CONTROL_INPUTS)
    if unknown:
        raise ValueError(f"`control` has {', '.join(unknown)}; valid keys are {', '.join(sorted(CONTROL_INPUTS))}.")
    size = pipeline.default_size
    pipeline.make_controls(1, *size, **control)
    pipeline.read_guidance(settings.guidance_scale, settings.control_guidance_scale, 0.0, None)
    steps = read_schedule(settings.num_inference_steps, None, None, settings.num_inference_steps)
    pipeline.scheduled(**steps, latent_shape=pipeline.latent_shape(1, *size), device=pipeline.device)


def call_pipeline(
    pipeline: ImprovedLDMPipeline, semantics: Sequence[str] | Sequence[int], seeds: Iterable[int], **call
):
    """Images of one call of a pipeline, each with its own generator.

    Args:
        pipeline: Pipeline to sample from.
        semantics: Prompts or class labels, whichever the pipeline reads.
        seeds: One seed per image.
        call: Further arguments of the pipeline.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(**{pipeline.semantic_argument: semantics}, **call, generator=generators).images


class Sampler:
    """Samples the requested images from a pipeline and saves them, in one folder per setting of the call.

    Batches are fixed and shared among the processes of `torch.distributed`, so neither the number of processes nor an
    interruption changes an image. The weights are hashed once, here.

    Args:
        pipeline: Pipeline to sample from.
        requests: One request per image.
        batch_size: Images per call.
    """

    def __init__(self, pipeline: ImprovedLDMPipeline, requests: list[Request], batch_size: int):
        self.pipeline, self.requests, self.batch_size = pipeline, requests, batch_size
        self.identity = _identity(pipeline)

    def record(self, settings: SamplingSettings) -> dict[str, Any]:
        """Content of `settings.json`: everything in the pipeline that changes an image, and the call's settings."""
        return {**self.identity, **asdict(settings)}

    def check_folder(self, folder: Path, settings: SamplingSettings):
        """Raise a ValueError if a folder holds samples of another pipeline, other settings or other requests."""
        if not (folder / SETTINGS).exists():
            return
        old = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        for name, value in self.record(settings).items():
            if old.get(name) != value:
                there = old.get(name, "(not recorded)")
                raise ValueError(f"{folder} was sampled with `{name}` {there}, not {value}; choose another folder.")
        for there, asked in zip(_metadata(folder), _metadata_lines(self.requests), strict=False):
            if there != asked:
                raise ValueError(f"{folder} was sampled for {there}, not {asked}; choose another folder.")

    def sample(self, folder: Path, settings: SamplingSettings):
        """Sample the missing images of a folder. Each image is written as a PNG, atomically.

        A batch with a missing image is sampled again; existing images are kept.

        Args:
            folder: Folder for the images `000000.png` and so on, `settings.json` and `metadata.jsonl`. `open_rows`
                opens it as an image set.
            settings: Settings of the pipeline's call.

        Raises:
            ValueError: As for `check_folder`.
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
                        text = self._text(self.requests[number], settings)
                        _save_whole(images[number - numbers.start], _file(folder, number), text)
                bar.update(len(numbers))

    def _call(self, numbers: range, settings: SamplingSettings) -> list[Image.Image]:
        requests = self.requests[numbers.start : numbers.stop]
        control = {name: [request.control[name] for request in requests] for name in requests[0].control}
        semantics, seeds = [request.semantic for request in requests], [request.seed for request in requests]
        return call_pipeline(self.pipeline, semantics, seeds, **control, **asdict(settings))

    def _text(self, request: Request, settings: SamplingSettings) -> dict[str, str]:
        semantic = {self.pipeline.semantic_argument: request.semantic}
        model = f"{type(self.pipeline.denoiser).__name__}, sha256 {self.identity['denoiser_sha256']}"
        return picture_text(semantic, request.seed, request.control, model, **asdict(settings))


def _identity(pipeline: ImprovedLDMPipeline) -> dict[str, Any]:
    """Everything in a pipeline that changes an image: weights, the sampler and its settings, and its own settings."""
    networks = {"denoiser": pipeline.denoiser, "vae": pipeline.vae}
    names = ["default_original_size", *["default_size"] * (pipeline.config.default_size is not None)]
    if pipeline.takes_text:
        networks["text_encoder"] = pipeline.text_encoder
        names += TEXT_SETTINGS
    return {
        **{f"{name}_sha256": weights_sha256(network) for name, network in networks.items()},
        "sampler": type(pipeline.scheduler).__name__,
        "sampler_config": json.loads(pipeline.scheduler.to_json_string()),
        **{name: pipeline.config[name] for name in names},
        "guidance_options": pipeline.config.guidance_options and dict(pipeline.config.guidance_options),
        "dtype": str(pipeline.denoiser.dtype).removeprefix("torch."),
    }


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _save_whole(image: Image.Image, file: Path, text: dict[str, str]):
    write_whole(file, partial(save_png, image, text=text))


def _begin_folder(folder: Path, record: dict[str, Any], requests: list[Request]):
    if len(requests) > len(_metadata(folder)):  # a folder may grow
        write_json_lines(folder / METADATA, _metadata_lines(requests))
    write_json(folder / SETTINGS, record)


def _metadata_lines(requests: list[Request]) -> list[dict[str, Any]]:
    lines = [{"file_name": _file(Path(), number).name, **request.record()} for number, request in enumerate(requests)]
    return json.loads(json.dumps(lines))  # tuples become lists, as in the file


def _metadata(folder: Path) -> list[dict[str, Any]]:
    file = folder / METADATA
    return [record for _, record in read_metadata(file)] if file.exists() else []


@dataclass(frozen=True)
class Samples:
    """Images of equal size in a folder, sorted by name.

    Args:
        files: One file per image.
        size: (height, width) in pixels.
        prompts: One prompt per image; None unless `metadata.jsonl` has the prompts of all images.
    """

    files: list[Path]
    size: tuple[int, int]
    prompts: list[str] | None

    def pixels(self, numbers: range) -> torch.Tensor:
        """Some of the images as (batch, 3, height, width) in [-1, 1]."""
        images = [to_pixels(read_image(self.files[number].read_bytes())[0]) for number in numbers]
        return pixel_values(torch.stack(images))


def open_samples(folder: Path, count: int | None = None) -> Samples:
    """Open a folder of images.

    Args:
        folder: Folder of the images; `metadata.jsonl` may hold their captions, as in any captioned image folder.
        count: Number of images to use; None uses all.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If there are no images or fewer than `count`, or if their sizes differ.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`samples` is {folder}; there is no such folder.")
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in EXTENSIONS["imagefolder"] and file.is_file() and not file.name.startswith(".")
    )[:count]
    if len(files) < (count or 1):
        raise ValueError(
            f"`samples` is {folder}; it must contain {count or 'some'} images, but it contains {len(files)}."
        )
    sizes = {}
    for file in files:
        sizes.setdefault(_size(file), file.name)
    if len(sizes) > 1:
        (one, first), (other, second), *_ = sizes.items()
        raise ValueError(
            f"`samples` is {folder}; its images must have equal sizes, but {first} is {one} and {second} is {other}."
        )
    texts = {
        os.path.normpath(name): line.get("text")
        for line in _metadata(folder)
        if isinstance(name := line.get("file_name", line.get("image_file_name")), str)
    }
    prompts = [texts.get(file.name) for file in files]
    return Samples(files, next(iter(sizes)), prompts if all(isinstance(text, str) for text in prompts) else None)


def _size(file: Path) -> tuple[int, int]:
    """(height, width) of an image in pixels, after it is turned upright."""
    try:
        return read_image(file.read_bytes(), min_size=(1, 1))[1]
    except Exception as error:  # which error PIL raises for damaged bytes depends on the format
        raise ValueError(f"`samples` is {file.parent}; {file.name} cannot be read: {error!r}") from error
