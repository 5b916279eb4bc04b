"""The layers of diffusers' classes as our layers, for adapters that were made for those classes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from improved_ldm.convert.diffusers_classes import dit_rules, pixart_rules, sd3_rules, unet_rules
from improved_ldm.convert.mapping import Rule
from improved_ldm.models.denoiser import Denoiser

PEERS: dict[str, tuple[str, Callable[[Denoiser], list[Rule]]]] = {
    "DiTDenoiser": ("DiTTransformer2DModel", dit_rules),
    "PixArtDenoiser": ("PixArtTransformer2DModel", pixart_rules),
    "MMDiTDenoiser": ("SD3Transformer2DModel", sd3_rules),
    "UNetDenoiser": ("UNet2DConditionModel", unet_rules),
}


@dataclass(frozen=True)
class PublishedLayer:
    """A layer of a class of diffusers.

    Args:
        ours: Layer of the denoiser that has its weights; None if no layer or several layers have them.
        class_name: Class of the layer.
        reorder: Function that puts a tensor's output channels, the first dimension, into our layer's order.
    """

    ours: str | None
    class_name: str
    reorder: Callable[[torch.Tensor], torch.Tensor]


def published_layers(denoiser: Denoiser) -> dict[str, PublishedLayer]:
    """The layers of diffusers' class by name; empty if the denoiser is not equivalent to such a class.

    The names are those in the rules that convert the weights.
    """
    if type(denoiser).__name__ not in PEERS or denoiser.config.conditioning != "published":
        return {}
    class_name, rules = PEERS[type(denoiser).__name__]
    return {
        name.removesuffix(".weight"): _published_layer(rule, class_name)
        for rule in rules(denoiser)
        for name in rule.published
        if name.endswith(".weight")
    }


def _published_layer(rule: Rule, class_name: str) -> PublishedLayer:
    if len(rule.published) > 1 or len(rule.ours) != 1:
        return PublishedLayer(None, class_name, lambda tensor: tensor)
    # the rules of single layers keep the weights or reorder their output channels
    return PublishedLayer(rule.ours[0].removesuffix(".weight"), class_name, lambda tensor: rule.to_ours([tensor])[0])
