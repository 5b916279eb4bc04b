"""Our losses and samples on the inputs of the published code, next to what it gave."""

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.conditioning.control import null_control
from improved_ldm.conditioning.text import TextTokens
from improved_ldm.data.latents import EncodedBatch
from improved_ldm.trainer.config import TextConfig, TrainingConfig
from improved_ldm.trainer.denoiser_task import batch_conditions, batch_loss
from improved_ldm.trainer.randomness import ImageRandomness
from tests.published.sources import SOURCES, numbers

NOISE_SEED = 1234  # of the noise that ancestral samplers add
NULL_CLASS = 10
FACTOR = 2  # of the autoencoder
TEXT = TextConfig(padding="mask")
Pair = tuple[torch.Tensor, torch.Tensor]  # ours and the published


def difference(ours: torch.Tensor, published: torch.Tensor) -> float:
    """The largest difference relative to the largest published value."""
    assert ours.shape == published.shape
    return ((ours - published).abs().max() / published.abs().max().clamp(min=1e-30)).item()


@dataclass(frozen=True)
class RecordedRandomness(ImageRandomness):
    """The random numbers of a published training step.

    Args:
        fraction: Fraction at which the timestep is the recorded one.
        noises: Noise of each pass of the denoiser.
        drops: (batch,) bool of each pass, True where the semantic condition is dropped.
        mask: (batch, patches) uniform, for the mask of a denoiser.
    """

    fraction: float
    noises: list[torch.Tensor]
    drops: list[torch.Tensor]
    mask: torch.Tensor | None

    def timestep_fractions(self) -> torch.Tensor:
        return torch.full((len(self.noises[0]),), self.fraction)

    def dropped(self, semantic_dropout, control_dropout, number=0):
        return self.drops[number], torch.zeros_like(self.drops[number])

    def noise(self, shape, number=0):
        return self.noises[number]

    def mask_uniform(self, count):
        return self.mask


def recorded_batch(name: str) -> EncodedBatch:
    """The latents and conditions of a published training step."""
    recorded = numbers(name)
    latents = recorded["loss.latents"]
    control, labels = null_control(len(latents), "cpu"), recorded.get("loss.class_labels")
    if name == "pixart":
        return EncodedBatch(latents, control, TextTokens(recorded["loss.text"], recorded["loss.mask"], None))
    if name in ("dit", "mdt"):
        return EncodedBatch(latents, control, class_labels=labels)
    context = recorded["class_table"][labels][:, None] if name == "ldm" else recorded["loss.context"]
    text = TextTokens(context, torch.ones(context.shape[:2]).bool(), recorded.get("loss.pooled"))
    return EncodedBatch(latents, control, text)


def recorded_randomness(name: str, number: int) -> RecordedRandomness:
    """The random numbers of a published training step at one of the recorded timesteps."""
    recorded = numbers(name)
    kept = torch.zeros(len(recorded["loss.latents"])).bool()
    if name == "sd3":
        fraction = torch.special.ndtr(recorded["loss.normal"][number])
    else:
        fraction = (recorded["loss.timesteps"][number] + 0.5) / 1000
    passes = ("", "masked_")
    noises = [recorded[key] for part in passes if (key := f"loss.{part}noise") in recorded]
    drops = [recorded.get(f"loss.{part}dropped", kept) for part in passes]
    level = (recorded["loss.mask_ratio"].item() - 0.3) / 0.2 if name == "mdt" else 0.5
    return RecordedRandomness(None, level, fraction.item(), noises, drops, recorded.get("loss.mask_noise"))


def training_step(name: str, number: int) -> dict[str, Pair]:
    """`loss` and `gradient_norm` of the trainer's step at one of the recorded timesteps."""
    source, recorded = SOURCES[name], numbers(name)
    denoiser = source.network().train()
    loss = batch_loss(
        Accelerator(cpu=True),
        denoiser,
        source.make_objective(),
        recorded_batch(name),
        recorded_randomness(name, number),
        TrainingConfig(),
        TEXT,
    )
    loss.backward()
    norms = [parameter.grad.norm() for parameter in denoiser.parameters() if parameter.grad is not None]
    return {
        "loss": (loss.detach(), recorded["loss.loss"][number]),
        "gradient_norm": (torch.stack(norms).norm(), recorded["loss.gradient_norm"][number]),
    }


def loss_terms(name: str, number: int) -> dict[str, Pair]:
    """Each term of the loss per image at one of the recorded timesteps, by its recorded name."""
    source, recorded = SOURCES[name], numbers(name)
    denoiser, objective = source.network(), source.make_objective()
    batch, images = recorded_batch(name), recorded_randomness(name, number)
    timestep = objective.timestep_quantile(images.timestep_fractions())
    given = batch_conditions(batch, TEXT, images).only(denoiser.inputs)
    pairs = {}
    passes = denoiser.training_passes(batch.latents, images.mask_level, images.mask_uniform)
    for further, part, noise, dropped in zip(passes, ("", "masked_"), images.noises, images.drops, strict=False):
        noisy = objective.add_noise(batch.latents, noise, timestep)
        conditions = given.dropped(dropped, dropped, NULL_CLASS, denoiser.null_keeps_mask)
        with torch.no_grad():
            prediction = denoiser(noisy, timestep, **conditions.kwargs(), **further).sample
        for term, ours in objective.losses(prediction, batch.latents, noise, timestep).items():
            pairs[f"{part}{term}"] = (ours, recorded[f"loss.{part}{term}"][number])
    return pairs


def trajectory(name: str, kind: str, key: str, **changes) -> Pair:
    """The latents (2, images, channels, height, width) after half of the steps and after all of them.

    Args:
        name: Key of `SOURCES`.
        kind: `network`, or `function` for the fixed function in its place.
        key: Sampler and number of steps, such as `ddpm_50`.
        changes: Fields of the `Sampler` that differ from the published ones.
    """
    source, recorded = SOURCES[name], numbers(name)
    method, _, steps = key.rpartition("_")
    sampler, num_steps = replace(source.samplers[method], **changes), int(steps)
    denoiser, noise = getattr(source, kind)(), recorded[f"sample.{kind}.latents"]
    pipe = ImprovedLDMPipeline(
        vae=tiny_autoencoder(noise.shape[1]),
        scheduler=source.make_objective().sampling_scheduler(sampler.sampler, sampler.timestep_spacing),
        text_padding="mask",
        **{denoiser.component: denoiser},
    )
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    pipe(
        **sampled_conditions(name),
        guidance_scale=sampler.guidance_scale,
        guidance_options=sampler.guidance_options,
        height=FACTOR * noise.shape[2],
        width=FACTOR * noise.shape[3],
        latents=noise,
        generator=torch.Generator().manual_seed(NOISE_SEED),
        num_inference_steps=num_steps,
        output_type="latent",
        callback_on_step_end=keep,
    )
    return torch.stack([seen[num_steps // 2 - 1], seen[-1]]), recorded[f"sample.{kind}.{key}"]


def sampled_conditions(name: str) -> dict[str, torch.Tensor | list[int]]:
    """The conditions of the recorded samples as arguments of the pipeline."""
    recorded = numbers(name)
    if name == "pixart":
        return {"prompt_embeds": recorded["sample.text"], "prompt_attention_mask": recorded["sample.mask"]}
    if name == "sd3":
        return {
            "prompt_embeds": recorded["sample.context"],
            "pooled_prompt_embeds": recorded["sample.pooled"],
            "negative_prompt_embeds": recorded["sample.null_context"],
            "negative_pooled_prompt_embeds": recorded["sample.null_pooled"],
        }
    labels = recorded["sample.class_labels"]
    if name == "ldm":
        table = recorded["class_table"][:, None]
        return {"prompt_embeds": table[labels], "negative_prompt_embeds": table[[NULL_CLASS] * len(labels)]}
    return {"class_labels": labels.tolist()}


def tiny_autoencoder(latent_channels: int) -> AutoencoderKL:
    """An autoencoder with downsampling factor `FACTOR`; the latents are compared, not the images."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        latent_channels=latent_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()
