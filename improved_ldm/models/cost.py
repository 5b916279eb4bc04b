"""The cost of evaluating and of training a denoiser."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from improved_ldm.models.denoiser import Denoiser


def multiply_adds(denoiser: Denoiser, num_tokens: int = 0) -> float:
    """Multiply-adds of one evaluation of one image at the size of training.

    Args:
        denoiser: Denoiser; only its configuration is used.
        num_tokens: Tokens per prompt, if the denoiser reads text.
    """
    with torch.device("meta"):
        model = type(denoiser).from_config(denoiser.config).eval()
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(_latents(model), torch.empty(1), **_conditions(model, num_tokens))
    return counter.get_total_flops() / 2


def training_flops(denoiser: Denoiser, num_tokens: int = 0, frozen: bool = False) -> float:
    """Floating-point operations of one training step per image at the size of training: forward and backward.

    A recomputation of blocks, the update of the weights, and the encoding of images and text are not part of it.

    Args:
        denoiser: Denoiser; only its configuration is used.
        num_tokens: Tokens per prompt, if the denoiser reads text.
        frozen: Whether only a small adapter is trained, so that the weights need no gradient.
    """
    with torch.device("meta"):
        model = type(denoiser).from_config(denoiser.config).train().requires_grad_(not frozen)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        latents, conditions = _latents(model).requires_grad_(frozen), _conditions(model, num_tokens)
        for further in model.training_passes(latents, 0.5, lambda count: torch.empty(1, count)):
            model(latents, torch.empty(1), **conditions, **further, return_dict=False)[0].sum().backward()
    return float(counter.get_total_flops())


def _latents(model: Denoiser) -> torch.Tensor:
    config = model.config
    return torch.empty(1, config.in_channels, config.sample_size, config.sample_size)


def _conditions(model: Denoiser, num_tokens: int) -> dict[str, torch.Tensor]:
    width = model.config.text_dim
    return {"encoder_hidden_states": torch.empty(1, num_tokens, width)} if width else {}
