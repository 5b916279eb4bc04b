"""The adapters on a model: which are active, with which weight per block, and which are fused into the weights."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Weights = float | dict[str, Any] | None  # of an adapter: one number, or one per block; None is 1
UNFUSED_SCALING = "_scaling_before_fusing"  # attribute of a layer with a fused adapter: the scaling per adapter
UNET_BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}  # diffusers' names → our modules


def adapted_layers(model: nn.Module) -> "dict[str, BaseTunerLayer]":
    """The layers of a model that have adapters, by name."""
    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def names_on(layer: nn.Module) -> set[str]:
    """The names of the adapters on a layer."""
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part)}


def as_names(adapter_names: str | Iterable[str], known: Iterable[str]) -> list[str]:
    """The names of adapters as a list.

    Raises:
        ValueError: If a name is not known, or is given twice.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    known = list(dict.fromkeys(known))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"`adapter_names` has {unknown[0]!r}; loaded adapters: {', '.join(map(repr, known)) or 'none'}."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"`adapter_names` is {names}; it must not list an adapter twice.")
    return names


def as_weight(argument: str, value: Any) -> float:
    """A number that scales an adapter.

    Raises:
        ValueError: If the value is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{argument} is {value!r}; it must be a finite number.")
    return float(value)


def weights_of_each(names: list[str], weights: Weights | list[Weights]) -> list[Weights]:
    """One weight per adapter; a single weight applies to all of them.

    Raises:
        ValueError: If the number of weights and of adapters differ.
    """
    if not isinstance(weights, list | tuple):
        return [weights] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"{len(weights)} weights are given for {len(names)} adapters, {names}; give one per adapter.")
    return list(weights)


def block_weights(model: nn.Module, names: list[str], weights: list[Weights]) -> dict[str, dict[str, float]]:
    """The weight of each adapter on each layer that has it, by adapter and layer.

    Args:
        model: Model with adapters.
        names: Names of adapters.
        weights: One weight per adapter: a number, or a dict of numbers by block. A block is a path of modules
            (`transformer_blocks.0`), as one key or as nested dicts. A UNet also accepts diffusers' `down`, `mid` and
            `up` and, inside them, `block_1`, where a list has one number per attention. If several blocks contain a
            layer, the longest path applies; layers in no block have 1.

    Raises:
        ValueError: If a weight is not a number, or the adapter has no layer in a block.
    """
    return {name: _layer_weights(model, name, value) for name, value in zip(names, weights, strict=True)}


def _layer_weights(model: nn.Module, name: str, weights: Weights) -> dict[str, float]:
    layers = [path for path, layer in adapted_layers(model).items() if name in names_on(layer)]
    if not isinstance(weights, dict):
        weight = 1.0 if weights is None else as_weight(f"the weight of {name!r}", weights)
        return dict.fromkeys(layers, weight)
    blocks: dict[str, float] = {}
    for key, value in _flat(weights):
        path = _modules(key)
        if not any(_is_in(layer, path) for layer in layers):
            raise ValueError(
                f"the weights of {name!r} have the block {key!r}, in which it has no layer; it has layers in "
                f"{', '.join(_blocks(layers)) or 'no block'}."
            )
        each = _of_attentions(key, value, layers, path) if isinstance(value, list | tuple) else {path: value}
        blocks |= {path: as_weight(f"the weight of {name!r} for {key!r}", number) for path, number in each.items()}
    longest_first = sorted(blocks, key=len, reverse=True)
    return {layer: next((blocks[path] for path in longest_first if _is_in(layer, path)), 1.0) for layer in layers}


def _flat(weights: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The weights of nested dicts, with the keys joined by dots."""
    for key, value in weights.items():
        inner = (
            [(f"{key}.{rest}", number) for rest, number in _flat(value)] if isinstance(value, dict) else [(key, value)]
        )
        yield from inner


def _modules(key: str) -> str:
    """The module path of a block that is given by diffusers' names for a UNet or by the modules' own names."""
    first, *rest = str(key).split(".")
    return ".".join([UNET_BLOCKS.get(first, first), *(name.removeprefix("block_") for name in rest)])


def _of_attentions(key: str, values: list[Any], layers: list[str], block: str) -> dict[str, Any]:
    """The weights of a UNet's block: each counts for one attention and the residual block before it."""
    inside = (layer.removeprefix(f"{block}.attentions.") for layer in layers if _is_in(layer, f"{block}.attentions"))
    indices = sorted({int(name.partition(".")[0]) for name in inside})
    if len(values) != len(indices):
        raise ValueError(f"the block {key!r} has {len(values)} weights for the {len(indices)} attentions in it.")
    parts = ("attentions", "resnets")
    return {f"{block}.{part}.{i}": value for i, value in zip(indices, values, strict=True) for part in parts}


def _is_in(layer: str, path: str) -> bool:
    return layer == path or layer.startswith(f"{path}.")


def _blocks(layers: list[str]) -> list[str]:
    """The blocks that contain layers: members of a module list, or modules of the model."""
    heads = [layer.split(".")[:2] for layer in layers]
    return list(dict.fromkeys(".".join(head if head[-1].isdecimal() else head[:1]) for head in heads))


def activate(model: nn.Module, names: list[str], weights: dict[str, dict[str, float]]):
    """Activate adapters, and deactivate all others.

    Args:
        model: Model with adapters.
        names: Names of the adapters; adapters of other models may be among them.
        weights: Weights by adapter and layer, from `block_weights`.

    Raises:
        ValueError: If an adapter is fused, because others would have no effect.
    """
    check_unfused(model)
    for path, layer in adapted_layers(model).items():
        layer.set_adapter(names)
        for name in names:
            if path in weights[name]:
                layer.set_scale(name, weights[name][path])


@contextmanager
def scaled_adapters(models: Iterable[nn.Module | None], scale: float) -> Iterator[None]:
    """Multiply the strength of the active adapters of some models, and restore it exactly on exit.

    diffusers divides by the scale instead, which rounds and, after a scale of 0, loses the weights of `set_adapters`.
    """
    layers = [layer for model in models if model is not None for layer in adapted_layers(model).values()]
    scalings = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling.update(scaling)


def fused_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that are fused into a model's weights."""
    return list(dict.fromkeys(name for layer in adapted_layers(model).values() for name in layer.merged_adapters))


def check_unfused(model: nn.Module, otherwise: str = ""):
    """Raise a ValueError if adapters are fused into a model's weights; `otherwise` names an alternative remedy."""
    if fused := fused_adapters(model):
        names = ", ".join(map(repr, fused))
        raise ValueError(f"{names} is fused into the {type(model).__name__}: call `unfuse_lora` first{otherwise}.")


def names_to_fuse(model: nn.Module, adapter_names: str | list[str] | None) -> list[str]:
    """The adapters to fuse, by default the active ones.

    Raises:
        ValueError: If an adapter is unknown or fused already, or adapters are disabled.
    """
    layers = adapted_layers(model).values()
    names = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    if adapter_names is not None:
        names = as_names(adapter_names, getattr(model, "peft_config", {}))
    if again := [name for name in names if name in fused_adapters(model)]:
        raise ValueError(f"{again[0]!r} is fused into the {type(model).__name__} already; call `unfuse_lora` first.")
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("the adapters are disabled; call `enable_lora` first.")
    return names


def fuse(model: nn.Module, names: list[str], scale: float, safe: bool):
    """Add adapters, times a scale, to a model's weights.

    Raises:
        ValueError: If `safe` is set and an adapter has NaN or infinite weights.
    """
    layers = adapted_layers(model)
    if safe:
        for path, layer in layers.items():
            for key, value in layer.named_parameters():
                if key.split(".")[-2] in names and not torch.isfinite(value).all():
                    raise ValueError(f"an adapter has NaN or infinite weights on {path!r}, {key}; it is not fused.")
    for layer in layers.values():
        here = [name for name in names if name in layer.scaling]
        setattr(layer, UNFUSED_SCALING, {**getattr(layer, UNFUSED_SCALING, {}), **{n: layer.scaling[n] for n in here}})
        for name in here:
            layer.scaling[name] *= scale
        if here:
            layer.merge(safe_merge=safe, adapter_names=here)


def unfuse(model: nn.Module):
    """Remove fused adapters from a model's weights, and restore their scales."""
    for layer in adapted_layers(model).values():
        if layer.merged:
            layer.unmerge()
        layer.scaling.update(getattr(layer, UNFUSED_SCALING, {}))
        layer.__dict__.pop(UNFUSED_SCALING, None)
