"""Aspect ratios: what of the images is cut away in training, the loss of whole ones, and samples of other shapes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.data.buckets import Buckets
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.loader import SampleLoader, make_pass
from improved_ldm.data.look import Look
from improved_ldm.data.sources import Rows, open_rows
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.evaluation.sampling import call_pipeline
from improved_ldm.hub.content import run_config
from improved_ldm.picture_text import picture_text
from improved_ldm.trainer.batches import image_transform
from improved_ldm.trainer.components import build_objective
from improved_ldm.trainer.config import RunConfig
from improved_ldm.trainer.data import open_data, run_buckets
from improved_ldm.trainer.grids import save_grid
from improved_ldm.trainer.held_out import level_losses

SHAPES = ((64, 32), (32, 64), (96, 32), (32, 96))  # (height, width) that no bucket has: 2:1 and, beyond all, 3:1
PICTURED = ((64, 32), (48, 48), (32, 64))
PICTURED_PROMPTS = 8
FINE_BUCKETS = {"step": 8, "max_aspect": 8.0}  # so fine that almost nothing of an image is cut away
WHITE = 0.75  # from this value on, in [0, 1], a pixel's darkest channel is background: what is decoded is not clean
LEAST_DRAWN = 0.1  # share of the pixels of a line that are drawn in a line of the drawing


def drawn(image: Image.Image) -> np.ndarray:
    """(height, width) bool, which pixels of an RGB image are not background."""
    return np.asarray(image.convert("RGB")).min(-1) < 255 * WHITE


def aspect_error(image: Image.Image) -> float | None:
    """How far the aspect ratio of the drawing is from that of its canvas, in octaves; None if nothing is drawn.

    The drawing is the smallest box that holds all rows and columns of which `LEAST_DRAWN` is drawn.
    """
    lines = [np.flatnonzero(drawn(image).mean(axis) >= LEAST_DRAWN) for axis in (1, 0)]  # rows, columns
    if not all(map(len, lines)):
        return None
    height, width = (found[-1] - found[0] + 1 for found in lines)
    return float(abs(np.log2(width / height * image.height / image.width)))


def touches_border(image: Image.Image) -> bool:
    """Whether `LEAST_DRAWN` of the outermost line of pixels of a side is drawn."""
    pixels = drawn(image)
    return any(line.mean() >= LEAST_DRAWN for line in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def mean_aspect_error(images: list[Image.Image]) -> float:
    """`aspect_error`, mean over the images with a drawing."""
    return float(np.mean([error for error in map(aspect_error, images) if error is not None]))


def share_touching(images: list[Image.Image]) -> float:
    """Share of the images of which `touches_border` is true."""
    return float(np.mean(list(map(touches_border, images))))


def cut_away(folder: Path) -> float:
    """Share of the training images that a run cuts away in its first pass, from its control records; six digits."""
    values = run_config(folder)
    config = RunConfig.model_validate({key: values[key] for key in ("output_dir", "seed", "data", "transform")})
    look = Look(training_rows(config), image_transform(config), run_buckets(config.transform), config.seed)
    for _ in look:
        pass
    return round(sum(part.cut_away for part in look.samples.values()) / look.usable, 6)  # equal for all seeds


def training_rows(config: RunConfig) -> Rows:
    """The set that a run trains on, with its filter."""
    return open_data(config.data, takes_text=True).sources[0].rows


def batches_of(rows: Rows, side: int, whole: bool) -> SampleLoader:
    """The images of a set in batches of one size: as centred squares, or nearly whole in fine buckets."""
    return make_pass(rows, ImageTransform(side), 32, buckets=Buckets(side, **FINE_BUCKETS) if whole else None)


def held_out_loss(pipeline: ImprovedLDMPipeline, config: RunConfig, whole: bool) -> float:
    """Training loss of the test images, mean over images and timesteps, with noise that does not depend on the run.

    Args:
        pipeline: the pipeline.
        config: data, resolution, objective and text of its run.
        whole: nearly whole images in fine buckets, or centred square crops.
    """
    objective, losses = build_objective(config), []
    encoder = SampleEncoder(pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, config.text.max_tokens)
    for batch in batches_of(open_rows(config.data.source, "test"), config.transform.resolution, whole):
        losses.append(level_losses(pipeline.denoiser, objective, encoder(batch), batch["seed"], config.text))
    return torch.cat(losses).mean().item()


def drawn_prompts(config: RunConfig, count: int) -> list[str]:
    """Captions of training images, evenly spread over the aspect ratios of these images."""
    batches = batches_of(training_rows(config), config.transform.resolution, whole=True)
    captions = [caption for batch in batches for caption in batch["caption"]]
    return [captions[number * len(captions) // count] for number in range(count)]


def sample_shapes(pipeline: ImprovedLDMPipeline, config: RunConfig, seed: int, **call) -> list[Image.Image]:
    """Samples of the same prompts in all `SHAPES`.

    Args:
        pipeline: the pipeline.
        config: data and number of prompts.
        seed: seed of the first image; the others follow.
        call: further arguments of the pipeline.
    """
    count, images = config.evaluation.num_detail_samples, []
    prompts = drawn_prompts(config, count)
    for height, width in SHAPES:
        images += call_pipeline(pipeline, prompts, range(seed, seed + count), height=height, width=width, **call)
        seed += count
    return images


def real_shapes(config: RunConfig) -> dict[str, float]:
    """What is measured of samples, of whole training images."""
    batches = batches_of(training_rows(config), config.transform.resolution, whole=True)
    images = [to_pil_image(pixels) for batch in batches for pixels in batch["pixels"]]
    return {"aspect_error": mean_aspect_error(images), "touches_border": share_touching(images)}


def draw_shapes(folders: dict[str, Path], config: RunConfig, seed: int, file: Path, **call):
    """Draw samples of the same prompts and seeds in several shapes, of pipelines by the names of their settings."""
    prompts = drawn_prompts(config, PICTURED_PROMPTS)
    seeds = [seed * PICTURED_PROMPTS + number for number in range(len(prompts))]
    columns = {}
    for height, width in PICTURED:
        for name, folder in folders.items():
            pipeline = ImprovedLDMPipeline.from_pretrained(folder)
            pipeline.set_progress_bar_config(disable=True)
            images = call_pipeline(pipeline, prompts, seeds, height=height, width=width, **call)
            columns[f"{name}\n{height} x {width}"] = images
    shapes = {f"{height} x {width}": {"height": height, "width": width} for height, width in PICTURED}
    text = picture_text({"prompt": prompts}, seeds, shapes, ", ".join(folders), **call)
    save_grid(list(columns.values()), prompts, list(columns), file, text)
