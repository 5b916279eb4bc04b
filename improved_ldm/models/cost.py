"""The cost of evaluating a denoiser."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from improved_ldm.models.denoiser import Denoiser


def multiply_adds(denoiser: Denoiser, num_tokens: int = 0) -> float:
    """Multiply-adds of one evaluation of one image at the size of training.

    Args:
        denoiser: Denoiser; only its configuration is used.
        num_tokens: Tokens per prompt, if the denoiser reads text.
    """
    config, conditions = denoiser.config, {}
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = type(denoiser).from_config(config).eval()
        if config.text_dim:
            conditions["encoder_hidden_states"] = torch.empty(1, num_tokens, config.text_dim)
        latents = torch.empty(1, config.in_channels, config.sample_size, config.sample_size)
        model(latents, torch.empty(1), **conditions)
    return counter.get_total_flops() / 2
