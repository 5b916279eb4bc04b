"""The variational bound of held-out images under a model, along the steps of ancestral sampling."""

import torch

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.autoencoder import encode_images
from improved_ldm.conditioning.conditions import Conditioning
from improved_ldm.conditioning.control import control_tensor
from improved_ldm.diffusion.bound import VariationalBound
from improved_ldm.diffusion.schedules import reads_variance
from improved_ldm.seeds import normal


@torch.no_grad()
def held_out_bound(
    pipeline: ImprovedLDMPipeline, pixels: torch.Tensor, labels: torch.Tensor, num_inference_steps: int
) -> float:
    """The bound in bits per dimension of the latents: the sum over the steps, each on the betas between two steps.

    The likelihood of the last step is that of 8-bit values, as in the published training loss. The divergence of the
    noisiest latents from pure noise, which no model changes, is left out.

    Args:
        pipeline: class-conditional pipeline for ε; a scheduler that reads no variance takes the smallest, β̃_t.
        pixels: (n, 3, height, width) images in [−1, 1].
        labels: (n,) classes of the images.
        num_inference_steps: number of steps.

    Source: Nichol and Dhariwal, 2021.
    """
    denoiser, device, count = pipeline.denoiser, pipeline.device, len(pixels)
    seeds = torch.arange(count, device=device)
    latents = encode_images(pipeline.vae, pixels.to(device), seeds=seeds).float()
    control = control_tensor(pipeline.make_controls(count, *pixels.shape[-2:])) if denoiser.control_inputs else None
    conditions = Conditioning(class_labels=labels.to(device), control=control).to(device).only(denoiser.inputs)

    scheduler = pipeline.scheduled(num_inference_steps)
    timesteps = scheduler.timesteps.flip(0).long()
    alphas = scheduler.alphas_cumprod[timesteps.cpu()].double()  # of the steps, ascending in noise
    betas = 1 - alphas / torch.cat([torch.ones(1).double(), alphas[:-1]])
    bound, total = VariationalBound(betas), 0.0
    for step, (timestep, alpha) in enumerate(zip(timesteps.tolist(), alphas.tolist(), strict=True)):
        noise = normal(seeds, latents.shape[1:], step << 36)
        noisy = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise
        prediction = denoiser(noisy, torch.tensor(timestep, device=device), **conditions.kwargs()).sample
        mean, variance = prediction[:, : latents.shape[1]], prediction[:, latents.shape[1] :]
        if not reads_variance(scheduler):
            variance = -torch.ones_like(mean)
        total += bound(mean, variance, latents, noisy, seeds.new_full((count,), step)).mean().item()
    return total
