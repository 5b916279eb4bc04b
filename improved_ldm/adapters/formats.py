"""Adapters with the names of PEFT, diffusers, kohya and ComfyUI: each tensor is assigned to its layer and checked."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from torch import nn

from improved_ldm.adapters.checks import (
    PEFT_PARTS,
    ComponentAdapter,
    LayerAdapter,
    complete_adapter,
    lora_settings,
    rank_and_alpha,
)
from improved_ldm.convert.adapters import PublishedLayer, published_layers
from improved_ldm.loading import DENOISER_NAMES
from improved_ldm.models.adapters import adaptable_layers, attention_projections

PEFT_PREFIX = "base_model.model."
# prefixes of layer names in a file → component; `denoiser` stands for `transformer` or `unet`
DOTTED = {PEFT_PREFIX: "denoiser", "diffusion_model.": "denoiser"}  # PEFT, ComfyUI
UNDERSCORED = {  # kohya, which replaces every dot in the layer's name with an underscore
    "lora_unet_": "denoiser",
    "lora_transformer_": "denoiser",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
}
KOHYA_PREFIXES = {"transformer": "lora_unet_", "unet": "lora_unet_", "text_encoder": "lora_te_"}
# `PEFT_PARTS` under kohya's names
KOHYA_PARTS = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha", "scale": "dora_scale"}
PARTS = {name: part for parts in (PEFT_PARTS, KOHYA_PARTS) for part, name in parts.items()}


class _Layers:
    """The layers of one model that can have an adapter, by their names in files."""

    def __init__(self, model: nn.Module, component: str):
        self.model, self.modules = model, adaptable_layers(model)
        self.published = published_layers(model) if component in DENOISER_NAMES else {}
        self.underscored = defaultdict(set)
        for name in (*self.modules, *self.published):
            self.underscored[name.replace(".", "_")].add(name)

    def find(self, name: str, underscored: bool) -> str | None:
        """The name of a layer, ours or that of diffusers' class, or None.

        Raises:
            ValueError: If the name is ambiguous.
        """
        known = self.underscored if underscored else self.modules.keys() | self.published.keys()
        separator = "_" if underscored else "."
        head = f"text_model{separator}"  # prefix of CLIP's layers in some releases of transformers
        found = next((way for way in (name, name.removeprefix(head), head + name) if way in known), None)
        if found is None or not underscored:
            return found
        if len(names := sorted(known[found])) > 1:
            raise ValueError(f"{name!r} in the adapter may be {' or '.join(names)}; name layers with dots.")
        return names[0]


def read_adapter(
    tensors: dict[str, torch.Tensor], settings: dict[str, Any] | None, models: dict[str, nn.Module], denoiser: str
) -> dict[str, ComponentAdapter]:
    """Assign each tensor of an adapter to its layer, and check them all.

    Args:
        tensors: Tensors of a file, with the names of PEFT, diffusers, kohya or ComfyUI; for a denoiser in the
            published mode also with the layer names of diffusers' class.
        settings: Settings in files of diffusers: `LoraConfig` as a dict whose keys begin with the component. None if a
            file has none: alpha is then read from the file per layer, or is the rank.
        models: Models that can have adapters, by component.
        denoiser: Name of the denoiser's component.

    Returns:
        The adapters to load, by component.

    Raises:
        ValueError: If a key matches no layer of its shape, A or B is missing, the settings do not match the tensors,
            or a layer of diffusers' class is not a single layer here.
    """
    layers = {component: _Layers(model, component) for component, model in models.items()}
    adapters: dict[str, dict[str, LayerAdapter]] = defaultdict(dict)
    unfit = []
    for key, value in _modern(tensors).items():
        component, name, part, underscored = _parse(key, denoiser)
        known = layers.get(component)
        found = known and part and known.find(name, underscored)
        if not found:
            unfit.append(key)
            continue
        ours, reorder = _ours(found, known)
        module = known.modules.get(ours)
        if module is None or not _fits(value, part, module):
            unfit.append(key)
            continue
        part = "magnitude" if part == "scale" else part
        adapter = adapters[component].setdefault(ours, LayerAdapter(module, found if underscored else name, {}))
        if part in adapter.tensors:
            raise ValueError(f"{key!r} is in the adapter twice, under two names.")
        if part == "magnitude":
            value = value.flatten()
        adapter.tensors[part] = reorder(value) if part in ("B", "bias", "magnitude") else value
    if unfit or not tensors:
        raise ValueError(_unfit_message(unfit, tensors, layers, type(models[denoiser]).__name__))
    values = {component: part_of(settings or {}, component) for component in models}
    for component in models:
        if settings and bool(values[component]) != (component in adapters):
            lacking = "tensors" if values[component] else "settings"
            raise ValueError(f"the adapter is incomplete: it has no {lacking} for the {component}.")
    if "text_encoder" in adapters and not settings and any(_is_own_name(key) for key in tensors):
        raise ValueError(
            "the adapter is on the text encoder; its file must have the settings, `lora_adapter_metadata`."
        )
    return {
        component: complete_adapter(component, found, values[component], models[component])
        for component, found in adapters.items()
    }


def to_kohya(parts: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """An adapter with kohya's names; diffusers' `convert_state_dict_to_kohya` loses an alpha that is not the rank.

    Args:
        parts: By component, the tensors under PEFT's names and the settings as a dict.

    Returns:
        Tensors by name: `lora_unet_…` for the denoiser, `lora_te_…` for the text encoder, with `.alpha`.

    Raises:
        ValueError: If kohya has no name for a tensor.
    """
    renamed = {}
    for component, (tensors, values) in parts.items():
        settings = lora_settings(values, component)
        for key, value in tensors.items():
            name, part = _split(key)
            if part not in ("A", "B", "magnitude"):
                raise ValueError(f"kohya has no name for {key!r} of the {component}.")
            layer_name = KOHYA_PREFIXES[component] + name.replace(".", "_")
            if part == "magnitude":
                part, value = "scale", value.reshape(-1, *(1,) * (tensors[f"{name}.{PEFT_PARTS['A']}"].ndim - 1))
            if part == "A":
                rank, alpha = rank_and_alpha(settings, name)
                alpha = alpha * math.sqrt(rank) if settings.use_rslora else alpha  # kohya scales by alpha / rank only
                renamed[f"{layer_name}.alpha"] = torch.tensor(float(alpha), dtype=torch.float64)
            new_key = f"{layer_name}.{KOHYA_PARTS[part]}"
            if new_key in renamed:
                raise ValueError(f"{name!r} and another layer are both named {layer_name!r} by kohya.")
            renamed[new_key] = value
    return renamed


def part_of(values: dict[str, Any], component: str) -> dict[str, Any]:
    """The values of one component, without its name in the keys."""
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _is_own_name(key: str) -> bool:
    """Whether a key is that of a text encoder in a file that this package or diffusers writes with settings."""
    return key.startswith("text_encoder.") and ".lora_A." in key


def _modern(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with PEFT's names instead of those that diffusers used before PEFT."""
    renamed = convert_unet_state_dict_to_peft(tensors)
    if any("lora_linear_layer" in key for key in renamed):
        renamed = convert_state_dict_to_peft(renamed)
    if len(renamed) < len(tensors):
        raise ValueError("the adapter has tensors twice, under names of two releases of diffusers.")
    return renamed


def _split(key: str) -> tuple[str, str | None]:
    """The layer and the part of a key."""
    key = key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key
    for ending, part in PARTS.items():
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}"), part
    return key, None


def _parse(key: str, denoiser: str) -> tuple[str, str, str | None, bool]:
    """Component, layer, part and whether the layer's dots are underscores."""
    name, part = _split(key)
    for prefix, component in (DOTTED | UNDERSCORED).items():
        if name.startswith(prefix):
            component = denoiser if component == "denoiser" else component
            return component, name.removeprefix(prefix), part, prefix in UNDERSCORED
    component, _, name = name.partition(".")
    return component, name, part, False


def _ours(name: str, known: _Layers) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Our layer for a name in a file, and the function that puts its output channels into our order."""
    if name in known.modules:
        return name, lambda tensor: tensor
    published: PublishedLayer = known.published[name]
    if published.ours is None:
        raise ValueError(
            f"the adapter is on {name!r} of {published.class_name}, which is no single layer here: "
            "it cannot be loaded exactly."
        )
    return published.ours, published.reorder


def _fits(value: torch.Tensor, part: str, module: nn.Module) -> bool:
    """Whether a tensor has the shape and the kind of dtype of a part of an adapter on a layer."""
    if part == "alpha":
        return value.numel() == 1
    out_channels, inner = _shape(module)
    shape = tuple(value.shape)
    fits = {
        "A": shape[1:] == inner and len(shape) > 1 and shape[0] > 0,
        "B": shape[:1] == (out_channels,) and shape[2:] == (1,) * (len(inner) - 1) and len(shape) > 1,
        "bias": shape == (out_channels,),
        "magnitude": value.numel() == max(shape, default=0) == out_channels,
        "scale": value.numel() == out_channels and shape[:1] == (out_channels,),  # (1, in) belongs to another method
    }
    return value.is_floating_point() and fits[part]


def _shape(module: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Output channels of a layer, and the other dimensions of its weight."""
    if isinstance(module, nn.Linear):
        return module.out_features, (module.in_features,)  # the weight may be packed
    return module.weight.shape[0], tuple(module.weight.shape[1:])


def _unfit_message(unfit: list[str], tensors: dict, layers: dict[str, _Layers], class_name: str) -> str:
    shapes = {key: tuple(value.shape) for key, value in _modern(tensors).items()}
    whole_numbers = [key for key in unfit if not _modern(tensors)[key].is_floating_point()]
    note = f" {len(whole_numbers)} of them are integers." if whole_numbers else ""
    examples = []
    for component, known in layers.items():
        name = next(iter([*attention_projections(known.model), *known.modules]))
        examples.append(f"{component}.{name}.lora_A.weight (rank, {_shape(known.modules[name])[1][0]})")
    return (
        f"the adapter does not fit this pipeline with its {class_name}: "
        f"{len(unfit)} of its {len(tensors)} keys find no layer of their shape, such as "
        f"{', '.join(f'{name} {shapes[name]}' for name in unfit[:3]) or 'none'};{note} "
        f"expected are keys such as {', '.join(examples)}."
    )
