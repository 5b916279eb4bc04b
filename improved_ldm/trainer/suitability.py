"""Whether the autoencoder and the text encoder of a run suit its data, measured on a sample of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from improved_ldm.autoencoder import decode_latents
from improved_ldm.conditioning.text import TOKENIZING, text_positions
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.look import Look
from improved_ldm.data.mixture import Mixture
from improved_ldm.data.spread import spread_rows
from improved_ldm.data.token_counts import TokenCounts
from improved_ldm.data.transforms import pixel_values
from improved_ldm.evaluation.reconstruction import mean_saturation, psnr
from improved_ldm.resolution import size_text
from improved_ldm.trainer.batches import image_transform
from improved_ldm.trainer.checkpoints import checkpoint_steps
from improved_ldm.trainer.config import AdapterRunConfig, SharedConfig
from improved_ldm.trainer.data import run_buckets
from improved_ldm.trainer.grids import RECONSTRUCTIONS, save_reconstructions
from improved_ldm.trainer.processes import on_main_process
from improved_ldm.trainer.run import Run

SAMPLE_ROWS = 64
SAMPLE_PLACES = 8  # of these rows in a set; a file or a part of one is opened for each
BATCH_PIXELS = 2**18  # pixels that are encoded at once; on a CPU, where this takes about a second, no more in all
MIN_IMAGES = 4
# The limits are our choice.
MIN_PSNR = 20  # dB; published autoencoders have 23 and more on photos, the embedded one has 29 on Fashion-MNIST
COLOURED = 0.05  # mean saturation from which on a set counts as coloured
MIN_COLOUR = 0.6  # share of the saturation that must be kept
MAX_CUT = 0.05  # share of the captions that may be cut
MAX_SPELLED = 0.25  # share of the tokens; CLIP spells 0.1% of captions of drawings, the embedded tokenizer 73%


@dataclass(frozen=True)
class Reconstructions:
    """Images of the data as the run trains on them, and what the autoencoder makes of them.

    Args:
        images: (3, height, width) each, in [-1, 1].
        decoded: the same images, encoded and decoded.
    """

    images: list[torch.Tensor]
    decoded: list[torch.Tensor]

    def mean_psnr(self) -> float:
        """Mean PSNR of the images, dB."""
        pairs = zip(self.images, self.decoded, strict=True)
        return torch.cat([psnr(image[None], decoded[None]) for image, decoded in pairs]).mean().item()

    def saturations(self) -> tuple[float, float]:
        """Mean saturation of the images and of their reconstructions."""
        parts = (self.images, self.decoded)
        return tuple(torch.cat([mean_saturation(image[None]) for image in part]).mean().item() for part in parts)


@dataclass(frozen=True)
class Suitability:
    """How well networks suit a set.

    Args:
        warnings: what they lose, with the figures and the key to change.
        reconstructions: some of the images; None if no row of the sample is used.
    """

    warnings: list[str]
    reconstructions: Reconstructions | None


NOTHING = Suitability([], None)


def check_networks(
    run: Run, configs: Sequence[SharedConfig], mixtures: Sequence[Mixture], encoders: Sequence[SampleEncoder]
) -> list[Reconstructions | None]:
    """Warn of autoencoders and text encoders that lose what is in the data of a run, before its first step.

    Stages that resume are left out.

    Args:
        run: the run, which says the warnings.
        configs: configuration of each stage.
        mixtures: the opened sets of each stage.
        encoders: encoder of each stage.

    Returns:
        Reconstructions of images of each stage; None for a stage that resumes.

    Raises:
        ValueError: if a model could learn nothing, because reconstructions are not finite or captions that differ
            have the same tokens.
    """
    stages = list(zip(configs, mixtures, encoders, strict=True))

    def measure() -> list[Suitability]:
        return [NOTHING if _has_begun(stage[0]) else measure_suitability(*stage) for stage in stages]

    found = on_main_process(measure)
    for warning in dict.fromkeys(warning for suitability in found for warning in suitability.warnings):
        run.say(f"warning: {warning}")
    return [suitability.reconstructions for suitability in found]


def _has_begun(config: SharedConfig) -> bool:
    """Whether the networks of a stage were measured before its first checkpoint."""
    return bool(checkpoint_steps(Path(config.output_dir) / "checkpoints"))


def show_reconstructions(run: Run, reconstructions: Reconstructions | None):
    """Save a strip of images and their reconstructions in the folder of a run or stage, on the main process."""
    if reconstructions is None or not run.accelerator.is_main_process:
        return
    file = run.folder / RECONSTRUCTIONS
    save_reconstructions(reconstructions.images, reconstructions.decoded, file)
    run.say(f"{file}: images, and what the autoencoder keeps of them; PSNR {reconstructions.mean_psnr():.1f} dB")


def measure_suitability(config: SharedConfig, mixture: Mixture, encoder: SampleEncoder) -> Suitability:
    """Measure what networks lose of a sample of the data.

    Raises:
        ValueError: as for `check_networks`.
    """
    pixels, captions = _sample(config, mixture)
    if not pixels:
        not_measured = f"none of {SAMPLE_ROWS} rows is used, so what the networks lose of the data is not measured"
        return Suitability([not_measured], None)
    reconstructions = _reconstruct(config, encoder, pixels)
    warnings = _autoencoder_warnings(config, reconstructions)
    if encoder.text_encoder is not None:
        _check_distinct(config, encoder, captions)
        tokens = TokenCounts(encoder.tokenizer)
        tokens.add(captions)
        warnings += _cut_warnings(config, encoder, tokens) + _spelling_warnings(config, tokens)
    return Suitability(warnings, reconstructions)


def _sample(config: SharedConfig, mixture: Mixture) -> tuple[list[torch.Tensor], list[str]]:
    """Images, (3, height, width) uint8 each, and captions of rows from all over the sets, as in training."""
    transform, buckets, each = image_transform(config), run_buckets(config.transform), len(mixture.sources)
    rows = (spread_rows(rows, max(1, SAMPLE_ROWS // each), SAMPLE_PLACES) for rows in mixture.rows)
    seen = [one for part in rows for one in Look(part, transform, buckets, config.seed) if one is not None]
    return [one.pixels for one in seen], [one.caption for one in seen if one.caption]


def _reconstruct(config: SharedConfig, encoder: SampleEncoder, pixels: list[torch.Tensor]) -> Reconstructions:
    """Encode and decode images; on a CPU, a part of them."""
    side_pixels = max(image[0].numel() for image in pixels)
    if encoder.vae.device.type == "cpu":
        count = max(MIN_IMAGES, BATCH_PIXELS // side_pixels)
        pixels = pixels[:: -(-len(pixels) // count)]
    images, decoded = [], []
    for shape in dict.fromkeys(image.shape for image in pixels):
        of_shape = torch.stack([image for image in pixels if image.shape == shape])
        for batch in of_shape.split(max(1, BATCH_PIXELS // of_shape[0, 0].numel())):
            latents = encoder.latents(batch, torch.arange(len(batch)))
            images += pixel_values(batch)
            decoded += decode_latents(encoder.vae, latents).float().cpu()
    if not all(image.isfinite().all() for image in decoded):
        raise ValueError(
            f"`autoencoder.pretrained` is {config.autoencoder.pretrained!r}; its reconstructions of the images are "
            "NaN or infinite."
        )
    return Reconstructions(images, decoded)


def _autoencoder_warnings(config: SharedConfig, reconstructions: Reconstructions) -> list[str]:
    saturation, kept = reconstructions.saturations()
    decibels = reconstructions.mean_psnr()
    lost = ["colours"] if saturation >= COLOURED and kept < MIN_COLOUR * saturation else []
    lost += ["details"] if decibels < MIN_PSNR else []
    if not lost:
        return []
    return _warning(
        config,
        f"the autoencoder {config.autoencoder.pretrained} loses {' and '.join(lost)}, and no sample can have more",
        f"{len(reconstructions.images)} images of {size_text(config.transform.resolution)} pixels: mean saturation "
        f"{saturation:.3f}, of their reconstructions {kept:.3f}; PSNR {decibels:.1f} dB, {MIN_PSNR} or more is usable",
        "set `autoencoder.pretrained` to one trained on your images (training/train_autoencoder.py), or to one of the "
        "Hub, such as stabilityai/sd-vae-ft-mse",
    )


def _check_distinct(config: SharedConfig, encoder: SampleEncoder, captions: list[str]):
    """Raise a ValueError if captions differ, but their tokens do not."""
    different = list(dict.fromkeys(captions))
    if len(different) < 2:
        return
    with TOKENIZING:
        ids = encoder.tokenizer(different, truncation=True, max_length=encoder.max_tokens)["input_ids"]
    if len(set(map(tuple, ids))) == 1:
        raise ValueError(
            f"`text.max_tokens` is {encoder.max_tokens} and `text.pretrained` {config.text.pretrained!r}: "
            f"{len(different)} captions that differ become the same tokens, so nothing could be learnt from them. Two "
            f"are {different[0]!r} and {different[1]!r}."
        )


def _cut_warnings(config: SharedConfig, encoder: SampleEncoder, tokens: TokenCounts) -> list[str]:
    cut, total, longest = tokens.longer_than(encoder.max_tokens), tokens.lengths.total(), tokens.quantile(1)
    if cut <= MAX_CUT * total:
        return []
    positions, remedy = text_positions(encoder.text_encoder.config), f"set `text.max_tokens` to {longest}"
    if longest > positions:
        remedy = (
            f"set `text.pretrained` to one that reads more than {positions} tokens, and `text.max_tokens` to as many: "
            "openai/clip-vit-large-patch14 reads 77"
        )
    return _warning(
        config,
        f"{cut} of {total} captions ({cut / total:.0%}) are cut, and what is cut is not learnt",
        f"they have {tokens.quantile(0.5)} tokens at the median and at most {longest}; `text.max_tokens` is "
        f"{encoder.max_tokens}",
        remedy,
    )


def _spelling_warnings(config: SharedConfig, tokens: TokenCounts) -> list[str]:
    if tokens.spelled_share <= MAX_SPELLED:
        return []
    return _warning(
        config,
        f"the text encoder {config.text.pretrained} does not know the words of the captions",
        f"{tokens.spelled_share:.0%} of their tokens are single letters or bytes; {MAX_SPELLED:.0%} or less is usable",
        "set `text.pretrained` to one trained on your captions (training/train_clip.py), or to one of the Hub, such "
        "as openai/clip-vit-large-patch14",
    )


def _warning(config: SharedConfig, problem: str, figures: str, remedy: str) -> list[str]:
    """A warning in three lines; an adapter has the networks of its base."""
    if isinstance(config, AdapterRunConfig):
        remedy = "choose another `base`, which decides it"
    return ["\n    ".join([problem, figures, remedy])]
