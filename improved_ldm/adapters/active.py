"""The adapters of a pipeline: which are active and with which weight, which are fused, and how they are removed."""

from typing import ClassVar

from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from improved_ldm.loading import DENOISER_NAMES
from improved_ldm.models.active_adapters import (
    Weights,
    activate,
    adapted_layers,
    as_names,
    as_weight,
    block_weights,
    check_unfused,
    fuse,
    fused_adapters,
    names_to_fuse,
    unfuse,
    weights_of_each,
)
from improved_ldm.models.adapters import remove_adapters

KEEP_FUSED = ", or `unload_lora_weights(keep_fused=True)` to keep it in the weights"


class ActiveLoraMixin(LoraBaseMixin):
    """The part of diffusers' interface to adapters that handles loaded ones."""

    _lora_loadable_modules: ClassVar[list[str]] = [*DENOISER_NAMES, "text_encoder"]

    def unwrapped(self, component: str) -> nn.Module | None:
        """A component without the wrapper of `torch.compile`."""
        return unwrap_module(getattr(self, component))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of the adapters by component."""
        models = {component: self.unwrapped(component) for component in self._lora_loadable_modules}
        return {name: list(model.peft_config) for name, model in models.items() if getattr(model, "peft_config", None)}

    def get_active_adapters(self) -> list[str]:
        """The names of the adapters that have an effect."""
        for component in self.get_list_adapters():
            for layer in adapted_layers(self.unwrapped(component)).values():
                return list(layer.active_adapters)
        return []

    def adapter_names(self) -> list[str]:
        """The names of the loaded adapters, on any component."""
        return list(dict.fromkeys(name for names in self.get_list_adapters().values() for name in names))

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: Weights | list[Weights] = None):
        """Activate adapters, and deactivate all others.

        Args:
            adapter_names: Name of one adapter, or names of several.
            adapter_weights: One weight per adapter: a number (default 1), or a dict by component of numbers or of
                dicts by block: `{"transformer": {"transformer_blocks.0": 0.5}, "text_encoder": 0}`. A block is the
                path of a module; a UNet also accepts diffusers' `down`, `mid` and `up` and, inside them, `block_1`.
                Blocks that are not named have 1. A single weight applies to all adapters.

        Raises:
            ValueError: If an adapter, component or block is unknown, a weight is not a number, the number of weights
                is wrong, or an adapter is fused; nothing is changed then.
        """
        names = as_names(adapter_names, self.adapter_names())
        each = weights_of_each(names, adapter_weights)
        adapted = self.get_list_adapters()
        for name, weights in zip(names, each, strict=True):
            on = [component for component, on_component in adapted.items() if name in on_component]
            if isinstance(weights, dict) and (unknown := weights.keys() - set(on)):
                raise ValueError(
                    f"the weights of {name!r} have {sorted(map(str, unknown))[0]!r}; it is on {', '.join(on)}."
                )
        planned = {}
        for component in adapted:
            model = self.unwrapped(component)
            check_unfused(model)
            parts = [weights.get(component) if isinstance(weights, dict) else weights for weights in each]
            planned[component] = block_weights(model, names, parts)
        for component, weights in planned.items():
            activate(self.unwrapped(component), names, weights)

    def unload_lora_weights(self, keep_fused: bool = False):
        """Remove all adapters, and restore the weights and which parameters are trained.

        The weights are restored exactly, or up to rounding if an adapter was fused and unfused.

        Args:
            keep_fused: Whether fused adapters stay in the weights permanently; otherwise they must be removed with
                `unfuse_lora` first.

        Raises:
            ValueError: If an adapter is fused and `keep_fused` is False; nothing is changed then.
        """
        adapted = self.get_list_adapters()
        for component in adapted if not keep_fused else ():
            check_unfused(self.unwrapped(component), otherwise=KEEP_FUSED)
        if self.denoiser.component in adapted:
            self.denoiser.unload_lora(keep_fused)
        if "text_encoder" in adapted:
            remove_adapters(self.text_encoder, adapted["text_encoder"])

    def delete_adapters(self, adapter_names: str | list[str]):
        """Remove adapters by name; removing the last one restores the models.

        Raises:
            ValueError: If an adapter is unknown, or one is fused; nothing is changed then.
        """
        names = as_names(adapter_names, self.adapter_names())
        adapted = self.get_list_adapters()
        for component in adapted:
            check_unfused(self.unwrapped(component))
        for component, on_component in adapted.items():
            here = [name for name in names if name in on_component]
            if component == "text_encoder":
                remove_adapters(self.text_encoder, here)
            else:
                self.denoiser.delete_adapters(here)

    @property
    def fused_loras(self) -> set[str]:
        """The names of the adapters that are fused into the weights."""
        return {name for component in self.get_list_adapters() for name in fused_adapters(self.unwrapped(component))}

    @property
    def num_fused_loras(self) -> int:
        """The number of adapters that are fused into the weights."""
        return len(self.fused_loras)

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: str | list[str] | None = None,
    ):
        """Add adapters to the weights, so that they cost no time; they cannot be changed until `unfuse_lora`.

        Args:
            components: Components of the pipeline; default: all that have adapters.
            lora_scale: Factor of the adapters' own weights.
            safe_fusing: Whether adapters with NaN or infinite weights are refused.
            adapter_names: Names of the adapters; default: the active ones.

        Raises:
            ValueError: If a component or an adapter is unknown, an adapter is fused already, adapters are disabled, or
                there is no adapter; nothing is changed then.
        """
        scale = as_weight("`lora_scale`", lora_scale)
        adapted = self.get_list_adapters()
        chosen = self._components(components)
        names = None if adapter_names is None else as_names(adapter_names, self.adapter_names())
        planned = {}
        for component in (name for name in chosen if name in adapted):
            here = None if names is None else [name for name in names if name in adapted[component]]
            planned[component] = names_to_fuse(self.unwrapped(component), here)
        if not any(planned.values()):
            raise ValueError(f"no adapter is active on {', '.join(chosen)}; load one with `load_lora_weights`.")
        for component, here in planned.items():
            fuse(self.unwrapped(component), here, scale, safe_fusing)

    def unfuse_lora(self, components: list[str] | None = None):
        """Remove fused adapters from the weights, up to rounding, if there are any.

        Args:
            components: Components of the pipeline; default: all.

        Raises:
            ValueError: If a component is unknown.
        """
        for component in self._components(components):
            if (model := self.unwrapped(component)) is not None:
                unfuse(model)

    def _components(self, components: list[str] | None) -> list[str]:
        """The given components, by default all that can have adapters."""
        for component in components or ():
            if component not in self._lora_loadable_modules:
                valid = ", ".join(self._lora_loadable_modules)
                raise ValueError(f"`components` has {component!r}; it may have {valid}.")
        return list(components or self._lora_loadable_modules)

    def disable_lora(self):
        """Sample without the adapters until `enable_lora`.

        Raises:
            ValueError: If an adapter is fused.
        """
        for component in self.get_list_adapters():
            check_unfused(self.unwrapped(component))
        super().disable_lora()
