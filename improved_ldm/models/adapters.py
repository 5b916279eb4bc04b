"""Adapters on one model: PEFT wraps layers and freezes everything else; removing the last adapter restores the model.

The text encoder gets its adapters here and not from `PreTrainedModel.add_adapter`, because each release of
transformers requires a certain version of PEFT there, which may not be released yet. PEFT alone is enough.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from diffusers.loaders import PeftAdapterMixin
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from improved_ldm.models.active_adapters import (
    Weights,
    activate,
    adapted_layers,
    as_names,
    as_weight,
    block_weights,
    check_unfused,
    fuse,
    names_on,
    names_to_fuse,
    unfuse,
    weights_of_each,
)

TRAINABLE = "_trainable_without_adapters"  # attribute of a model with adapters: `requires_grad` before, by parameter
ADAPTABLE = (nn.Linear, nn.Conv2d)  # layers that can have an adapter
# names of the projections in attention layers of diffusers and of the text encoders in transformers
ATTENTION_PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("q_proj", "k_proj", "v_proj", "out_proj"),  # CLIP
    *("q", "k", "v", "o"),  # T5
    *("query", "key", "value", "attention.output.dense"),  # BERT
)
# values of `init_lora_weights` with which PEFT changes the model's own weights
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def attention_projections(model: nn.Module) -> list[str]:
    """Names of the linear layers in a model's attention, the default layers for adapters."""
    endings = tuple(f".{name}" for name in ATTENTION_PROJECTIONS)
    return [name for name, module in model.named_modules() if name.endswith(endings) and hasattr(module, "weight")]


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can have an adapter, by their names in the model without adapters."""
    layers, wrapped = {}, None
    for name, module in model.named_modules():
        if wrapped is not None and name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped, module = f"{name}.", module.get_base_layer()
        if isinstance(module, ADAPTABLE):
            layers[name] = module
    return layers


def check_start(settings: "PeftConfig"):
    """Raise a ValueError if PEFT would change the model's own weights when it initialises the adapter."""
    start = getattr(settings, "init_lora_weights", True)
    if isinstance(start, str) and start.startswith(CHANGING_STARTS):
        raise ValueError(
            f"`init_lora_weights` is {start!r}, which changes the model's own weights, so that removing the adapter "
            "would not restore them; use True or 'gaussian', or convert the adapter to LoRA with peft."
        )


class AdapterMixin(PeftAdapterMixin):
    """diffusers' interface to the adapters of a model; removing the last adapter restores the model."""

    def add_adapter(self, adapter_config: "PeftConfig", adapter_name: str = "default"):
        """Add a new adapter for training; all other parameters are frozen while the model has an adapter.

        Raises:
            ValueError: If the name is taken, no layer fits the settings, or an adapter is fused; the model is then
                unchanged.
        """
        check_start(adapter_config)
        with adding_adapter(self):
            super().add_adapter(adapter_config, adapter_name)

    def load_lora_adapter(self, *args, **kwargs):
        """Load an adapter, with the arguments of diffusers. After an error the model is unchanged."""
        with adding_adapter(self):
            super().load_lora_adapter(*args, **kwargs)

    def set_adapters(self, adapter_names: str | list[str], weights: Weights | list[Weights] = None):
        """Activate adapters; see `ImprovedLDMPipeline.set_adapters` for the arguments.

        Raises:
            ValueError: If an adapter or a block is unknown, or a weight is not a number; nothing is changed then.
        """
        names = as_names(adapter_names, getattr(self, "peft_config", {}))
        activate(self, names, block_weights(self, names, weights_of_each(names, weights)))

    def delete_adapters(self, adapter_names: str | list[str]):
        """Remove adapters by name; removing the last one restores the model.

        Raises:
            ValueError: If an adapter is unknown, or one is fused.
        """
        names = as_names(adapter_names, getattr(self, "peft_config", {}))
        check_unfused(self)
        super().delete_adapters(names)
        if not getattr(self, "peft_config", None):
            self.unload_lora()

    def unload_lora(self, keep_fused: bool = False):
        """Remove all adapters and restore the model.

        Args:
            keep_fused: Whether fused adapters stay in the weights.

        Raises:
            ValueError: If an adapter is fused and `keep_fused` is False.
        """
        if not keep_fused:
            check_unfused(self)
        super().unload_lora()
        restore_trainable(self)

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: str | list[str] | None = None
    ):
        """Add adapters to the weights, with the arguments of diffusers.

        Raises:
            ValueError: If an adapter is unknown or fused already, or adapters are disabled.
        """
        fuse(self, names_to_fuse(self, adapter_names), as_weight("lora_scale", lora_scale), safe_fusing)

    def unfuse_lora(self):
        """Remove fused adapters from the weights, if there are any."""
        unfuse(self)

    def disable_lora(self):
        """Predict without the adapters.

        Raises:
            ValueError: If an adapter is fused.
        """
        check_unfused(self)
        super().disable_lora()


def add_text_adapter(
    text_encoder: PreTrainedModel,
    settings: "PeftConfig",
    adapter_name: str = "default",
    tensors: dict[str, torch.Tensor] | None = None,
):
    """Add an adapter to a text encoder and activate it; after an error the text encoder is unchanged.

    Args:
        text_encoder: Text encoder that gets the adapter.
        settings: Rank, alpha and layers of the adapter.
        adapter_name: Name of the adapter.
        tensors: Weights of the adapter under PEFT's names; default: those of a new adapter, which has no effect yet.

    Raises:
        ValueError: If the name is taken, no layer fits the settings, or a tensor fits no layer.
    """
    check_start(settings)
    if adapter_name in getattr(text_encoder, "peft_config", {}):
        raise ValueError(f"`adapter_name` is {adapter_name!r}, which is taken; it must be a new name.")
    with adding_adapter(text_encoder):
        inject_adapter_in_model(settings, text_encoder, adapter_name)
        text_encoder._hf_peft_config_loaded = True  # transformers and diffusers check it
        if tensors is not None:
            loaded = set_peft_model_state_dict(text_encoder, tensors, adapter_name)
            lost = [*loaded.unexpected_keys, *(key for key in loaded.missing_keys if f".{adapter_name}." in key)]
            if lost:
                raise ValueError(
                    f"peft {version('peft')} with transformers {version('transformers')} does not load all tensors of "
                    f"an adapter on a {type(text_encoder).__name__}: {lost[0]}; pip install -U peft transformers"
                )


def remove_adapters(model: nn.Module, names: Iterable[str]):
    """Remove adapters by name; removing the last one restores the model."""
    config = getattr(model, "peft_config", {})
    for path, layer in adapted_layers(model).items():
        for name in names:
            layer.delete_adapter(name)
        if not names_on(layer):
            model.set_submodule(path, layer.get_base_layer())
    for name in names:
        config.pop(name, None)
    if not config:
        if hasattr(model, "peft_config"):
            del model.peft_config
        model._hf_peft_config_loaded = False
        restore_trainable(model)


@contextmanager
def adding_adapter(model: nn.Module) -> Iterator[None]:
    """Record which parameters are trained before a first adapter freezes them; after an error, restore the model."""
    layers = list(adapted_layers(model).values())
    check_unfused(model)
    names = set().union(*map(names_on, layers))
    active = list(layers[0].active_adapters) if layers else []
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if not hasattr(model, TRAINABLE):
        setattr(model, TRAINABLE, trainable)
    try:
        yield
    except BaseException:
        layers = list(adapted_layers(model).values())
        for layer in layers:
            layer.set_adapter(active)
        new = set(getattr(model, "peft_config", {})).union(*map(names_on, layers)) - names
        remove_adapters(model, new)
        _set_trainable(model, trainable)
        raise


def restore_trainable(model: nn.Module):
    """Restore `requires_grad` of all parameters after the last adapter is removed."""
    if hasattr(model, TRAINABLE):
        _set_trainable(model, getattr(model, TRAINABLE))
        delattr(model, TRAINABLE)


def _set_trainable(model: nn.Module, trainable: dict[str, bool]):
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(trainable[name])
