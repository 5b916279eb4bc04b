"""The variational bound that trains a learned variance.

p(z_{t−1} | z_t) = N(μ, exp(v)), where the denoiser's further channels o interpolate in the logarithm:
v = (o + 1) / 2 · log β_t + (1 − o) / 2 · log β̃_t, with the posterior variance β̃_t = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t).
"""

import math

import torch

HALF_BIN = 1 / 255  # of 8-bit values in [−1, 1]
EDGE = 0.999  # values beyond ± this belong to the open first or last bin
LEAST_PROBABILITY = 1e-12


class VariationalBound:
    """The terms of the variational bound on a schedule, in bits per dimension.

    Args:
        betas: (T,) β_t.

    Source: Nichol and Dhariwal, 2021, in the form in which DiT, mDT-v2 and PixArt-α are trained.
    """

    def __init__(self, betas: torch.Tensor):
        betas = betas.double()
        alphas_cumprod = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1).double(), alphas_cumprod[:-1]])  # ᾱ_{t−1}
        posterior = betas * (1 - before) / (1 - alphas_cumprod)
        posterior[0] = posterior[1]  # 0 at t = 0 has no logarithm
        columns = (
            alphas_cumprod.sqrt(),
            (1 - alphas_cumprod).sqrt(),
            posterior.log(),
            betas.log(),
            betas * before.sqrt() / (1 - alphas_cumprod),
            (1 - before) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        )
        self.table = torch.stack(columns, dim=1).float()  # (T, 6)

    def __call__(
        self,
        prediction: torch.Tensor,
        variance: torch.Tensor,
        latents: torch.Tensor,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        is_velocity: bool = False,
    ) -> torch.Tensor:
        """The bound per image: the KL divergence from the posterior or, at t = 0, the likelihood of 8-bit values.

        Args:
            prediction: (batch, channels, height, width) predicted ε or v; the bound does not train it.
            variance: (batch, channels, height, width) o, the denoiser's further channels.
            latents: (batch, channels, height, width) z.
            noisy: (batch, channels, height, width) z_t.
            timestep: (batch,) int.
            is_velocity: Whether the prediction is v.

        Returns:
            (batch,) float32.
        """
        self.table = self.table.to(timestep.device)
        row = self.table[timestep].view(-1, self.table.shape[1], 1, 1, 1).unbind(1)
        signal, noise, log_least, log_most, of_latents, of_noisy = row
        prediction = prediction.detach().float()
        of_prediction = noise if is_velocity else noise / signal
        start = (signal if is_velocity else 1 / signal) * noisy - of_prediction * prediction
        mean, true_mean = (of_latents * z + of_noisy * noisy for z in (start, latents))
        share = (variance.float() + 1) / 2
        log_variance = share * log_most + (1 - share) * log_least

        divergence = (
            log_variance
            - log_least
            + (log_least - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
            - 1
        ) / 2
        nats = torch.where(
            timestep.view(-1, 1, 1, 1) == 0, -_log_likelihood(latents, mean, log_variance / 2), divergence
        )
        return nats.flatten(1).mean(1) / math.log(2)


def _log_likelihood(values: torch.Tensor, mean: torch.Tensor, log_deviation: torch.Tensor) -> torch.Tensor:
    """Log-probability of the 8-bit bins around values in [−1, 1] under a normal distribution."""
    scale, offset = (-log_deviation).exp(), values - mean
    below_upper, below_lower = (_normal_cdf(scale * (offset + side)) for side in (HALF_BIN, -HALF_BIN))
    inside = torch.where(values > EDGE, 1 - below_lower, below_upper - below_lower)
    probability = torch.where(values < -EDGE, below_upper, inside)
    return probability.clamp(min=LEAST_PROBABILITY).log()


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    # the tanh approximation of the published models
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
