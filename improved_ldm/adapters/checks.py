"""Checks that an adapter is complete: every layer has all its parts, with one rank, and settings that match them."""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from improved_ldm.models.adapters import adaptable_layers, check_start

# an adapter's tensors of a layer, as PEFT names them
PEFT_PARTS = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
# settings that need more than a pair of tensors A and B on a layer
NOT_OF_LAYERS = ("modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices")


@dataclass
class LayerAdapter:
    """An adapter on one layer.

    Args:
        module: The layer.
        name: Name of the layer in the file.
        tensors: Tensors by part: `A` (rank, in, …), `B` (out, rank, …), `bias` (out,), `magnitude` (out,), `alpha` ().
    """

    module: nn.Module
    name: str
    tensors: dict[str, torch.Tensor]

    @property
    def rank(self) -> int:
        """Channels between A and B."""
        return len(self.tensors["A"])


@dataclass(frozen=True)
class ComponentAdapter:
    """The part of an adapter that PEFT loads into one model.

    Args:
        tensors: Tensors by PEFT's names.
        settings: Rank, alpha and layers.
    """

    tensors: dict[str, torch.Tensor]
    settings: "LoraConfig"


def complete_adapter(
    component: str, layers: dict[str, LayerAdapter], values: dict[str, Any], model: nn.Module
) -> ComponentAdapter:
    """An adapter on one model, after a check that every layer has all its parts and matching settings.

    Raises:
        ValueError: If the check fails; the message names a layer or a setting.
    """
    has_magnitude, has_bias = (
        any(part in layer.tensors for layer in layers.values()) for part in ("magnitude", "bias")
    )
    if values:
        settings = lora_settings(values, component)
        if any("alpha" in layer.tensors for layer in layers.values()):
            raise ValueError(
                f"the adapter on the {component} has both settings and `.alpha`; it must have one of them."
            )
    else:
        settings = LoraConfig(use_dora=has_magnitude, lora_bias=has_bias)
    _check_parts(component, layers, settings)
    for needed, found, setting in (
        (settings.use_dora, has_magnitude, "use_dora"),
        (settings.lora_bias, has_bias, "lora_bias"),
    ):
        if found and not needed:
            raise ValueError(f"`{setting}` is false in the adapter's settings, but its tensors say otherwise.")
    if values:
        scales = {name: rank_and_alpha(settings, layer.name) for name, layer in layers.items()}
        for name, layer in layers.items():
            if scales[name][0] != layer.rank:
                raise ValueError(
                    f"the adapter's settings give {name!r} the rank {scales[name][0]}; its tensors have {layer.rank}."
                )
        if all(name == layer.name for name, layer in layers.items()):
            _check_targets(component, layers, settings, model)
            return ComponentAdapter(_peft_tensors(layers), settings)
    else:
        scales = {name: (layer.rank, _alpha(name, layer)) for name, layer in layers.items()}
    return ComponentAdapter(_peft_tensors(layers), _with_scales(settings, scales))


def lora_settings(values: dict[str, Any], component: str) -> "LoraConfig":
    """LoRA settings from a dict.

    Raises:
        ValueError: If the settings are not those of LoRA, or need more than tensors on layers.
    """
    if (kind := str(values.get("peft_type", "LORA")).removeprefix("PeftType.")) != "LORA":
        raise ValueError(f"the adapter on the {component} is of the kind {kind!r}; it must be LoRA.")
    try:
        settings = LoraConfig(**values)
    except TypeError as error:
        raise ValueError(f"the adapter's settings for the {component} are not those of LoRA: {error}.") from error
    for setting in NOT_OF_LAYERS:
        if getattr(settings, setting, None):
            raise ValueError(
                f"`{setting}` is {getattr(settings, setting)!r} in the adapter's settings; it must be unset."
            )
    check_start(settings)
    ranks, alphas = (
        [settings.r, *settings.rank_pattern.values()],
        [settings.lora_alpha, *settings.alpha_pattern.values()],
    )
    for setting, value in [*(("r", rank) for rank in ranks), *(("lora_alpha", alpha) for alpha in alphas)]:
        valid = isinstance(value, int if setting == "r" else int | float) and not isinstance(value, bool)
        if not valid or not math.isfinite(value) or (setting == "r" and value < 1):
            raise ValueError(f"`{setting}` is {value!r} in the adapter's settings; it must be a positive number.")
    return settings


def rank_and_alpha(settings: "LoraConfig", name: str) -> tuple[int, float]:
    """Rank and alpha of a layer."""
    rank_key, alpha_key = (get_pattern_key(list(p), name) for p in (settings.rank_pattern, settings.alpha_pattern))
    return settings.rank_pattern.get(rank_key, settings.r), settings.alpha_pattern.get(alpha_key, settings.lora_alpha)


def _check_parts(component: str, layers: dict[str, LayerAdapter], settings: "LoraConfig"):
    """Raise a ValueError if a layer lacks a part, or A and B differ in rank."""
    needed = ["A", "B", *["magnitude"] * settings.use_dora, *["bias"] * settings.lora_bias]
    lacking = {name: part for name, layer in layers.items() for part in needed if part not in layer.tensors}
    if lacking:
        name, part = next(iter(lacking.items()))
        raise ValueError(
            f"the adapter is incomplete: {len(lacking)} of its {len(layers)} layers on the {component} lack a part, "
            f"such as {name!r} without {PEFT_PARTS[part]} (down: lora_A, up: lora_B)."
        )
    for name, layer in layers.items():
        weights = [value for part, value in layer.tensors.items() if part != "alpha"]
        if not all(not value.is_meta and value.isfinite().all() for value in weights):
            raise ValueError(f"the adapter on {name!r} of the {component} has no values, or NaN or infinite ones.")
        if layer.tensors["B"].shape[1] != layer.rank:
            shapes = " and ".join(str(tuple(layer.tensors[part].shape)) for part in "AB")
            raise ValueError(f"the halves of the adapter on {name!r} of the {component} differ in rank: {shapes}.")


def _check_targets(component: str, layers: dict[str, LayerAdapter], settings: "LoraConfig", model: nn.Module):
    """Raise a ValueError if the settings name layers without tensors."""
    if not settings.target_modules:
        return
    targets = [name for name in adaptable_layers(model) if check_target_module_exists(settings, name)]
    if lacking := [name for name in targets if name not in layers]:
        raise ValueError(
            f"the adapter is incomplete: its settings name {len(targets)} layers of the {component}, of which "
            f"{len(lacking)} have no tensors, such as {lacking[0]!r}."
        )


def _alpha(name: str, layer: LayerAdapter) -> float:
    """Alpha, the scale of an adapter on a layer times its rank, for adapters without settings."""
    if "alpha" not in layer.tensors:
        return layer.rank
    alpha = layer.tensors["alpha"].item()
    if not math.isfinite(alpha):
        raise ValueError(f"the `.alpha` of {name!r} in the adapter is {alpha}; it must be a finite number.")
    return int(alpha) if alpha == int(alpha) else alpha


def _with_scales(settings: "LoraConfig", scales: dict[str, tuple[int, float]]) -> "LoraConfig":
    """Settings for exactly these layers, with one rank and alpha per layer."""
    (rank, _), (alpha, _) = (Counter(values).most_common(1)[0] for values in zip(*scales.values(), strict=True))
    whole_name = {name: f"^{re.escape(name)}" for name in scales}
    return replace(
        settings,
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(scales),
        rank_pattern={whole_name[name]: value for name, (value, _) in scales.items() if value != rank},
        alpha_pattern={whole_name[name]: value for name, (_, value) in scales.items() if value != alpha},
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _peft_tensors(layers: dict[str, LayerAdapter]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, layer in layers.items():
        for part, ending in PEFT_PARTS.items():
            if part in layer.tensors:
                tensors[f"{name}.{ending}"] = layer.tensors[part]
        if "magnitude" in layer.tensors and isinstance(layer.module, nn.Conv2d):
            tensors[f"{name}.{PEFT_PARTS['magnitude']}"] = layer.tensors["magnitude"].reshape(1, -1, 1, 1)
    return tensors
