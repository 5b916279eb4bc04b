"""Adapters of the pipeline: LoRA and its variants on the denoiser and the text encoder, from loading to saving."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import MethodType
from typing import Any, Literal, get_args

import torch
from diffusers.models.modeling_utils import ModelMixin
from peft import get_peft_model_state_dict
from peft.utils.hotswap import check_hotswap_configs_compatible
from torch import nn

from improved_ldm.adapters.active import ActiveLoraMixin
from improved_ldm.adapters.files import find_adapter, hub_arguments, read_file, read_peft_settings, write_file
from improved_ldm.adapters.formats import PEFT_PREFIX, ComponentAdapter, read_adapter, to_kohya
from improved_ldm.models.active_adapters import as_names
from improved_ldm.models.adapters import add_text_adapter, adding_adapter, attention_projections

__all__ = ["LoraLoaderMixin", "attention_projections"]

AdapterFormat = Literal["diffusers", "kohya"]


class _OnClassOrInstance:
    """A method whose first argument is the instance, or the class if it is called on the class."""

    def __init__(self, function: Callable):
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable:
        return MethodType(self.function, owner if instance is None else instance)


class LoraLoaderMixin(ActiveLoraMixin):
    """diffusers' interface to adapters, for pipelines whose denoiser is a `transformer` or a `unet`.

    `enable_lora` and `enable_lora_hotswap` are diffusers' own.
    """

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        weight_name: str | None = None,
        return_lora_metadata: bool = False,
        **hub: Any,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """Read an adapter's tensors without loading them; the arguments are those of `load_lora_weights`.

        Args:
            pretrained_model_name_or_path_or_dict: A folder, a file, a Hub id or tensors.
            weight_name: Name of the file, if a folder or a repository has several.
            return_lora_metadata: Whether to return the settings as well; they are None if the file has none.
            hub: As in `load_lora_weights`.

        Raises:
            ValueError: If the file is not safetensors or is damaged, or the folder has no such file or several.
            OSError: If there is no such folder, file or repository.
        """
        tensors, settings = pretrained_model_name_or_path_or_dict, None
        if not isinstance(tensors, dict):
            tensors, settings = read_file(find_adapter(tensors, weight_name, **hub))
        return (tensors, settings) if return_lora_metadata else tensors

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        weight_name: str | None = None,
        **hub: Any,
    ):
        """Load an adapter and activate it; after an error the pipeline is unchanged.

        Args:
            pretrained_model_name_or_path_or_dict: A folder, a file, a Hub id or tensors. Files from diffusers contain
                the adapter's settings; files from PEFT (`adapter_model.safetensors`) have them in
                `adapter_config.json` next to them. Files from kohya (`lora_unet_….lora_down.weight`, `lora_te_…`) and
                ComfyUI (`diffusion_model.….lora_A.weight`) have an `.alpha` per layer. If there is neither, alpha is
                the rank. A denoiser in the `published` mode also accepts adapters that were made for diffusers' class:
                `SD3Transformer2DModel`, `PixArtTransformer2DModel`, `DiTTransformer2DModel`, `UNet2DConditionModel`.
            adapter_name: Name for the adapter; default: `default_0`, `default_1`, …
            hotswap: Whether the weights replace those of the loaded adapter with that name; see `enable_lora_hotswap`.
            weight_name: Name of the file, if a folder or a repository has several.
            hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            ValueError: If the file is a pickle or damaged, the adapter is incomplete or does not fit this pipeline,
                the name is taken, or an adapter is fused.
            OSError: If there is no such folder, file or repository.
        """
        adapters = self._read_adapter(pretrained_model_name_or_path_or_dict, weight_name, hub)
        adapter_name = self._new_adapter_name() if adapter_name is None else adapter_name
        if hotswap:
            self._check_hotswap(adapters, adapter_name)
        else:
            self._check_new_name(adapter_name)
        with ExitStack() as stack:  # load into all components or none
            for component in adapters:
                stack.enter_context(adding_adapter(self.unwrapped(component)))
            for component, adapter in adapters.items():
                self._load_into(component, adapter, adapter_name, hotswap)

    def check_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        weight_name: str | None = None,
        **hub: Any,
    ):
        """Raise the errors that `load_lora_weights` would raise for an adapter's content; nothing is loaded."""
        self._read_adapter(pretrained_model_name_or_path_or_dict, weight_name, hub)

    def _read_adapter(
        self, source: str | Path | dict[str, torch.Tensor], weight_name: str | None, hub: dict[str, Any]
    ) -> dict[str, ComponentAdapter]:
        """The checked adapter of each component from a folder, a file, a Hub id or tensors."""
        if isinstance(source, dict):
            file, tensors, settings = None, source, None
        else:
            file = find_adapter(source, weight_name, **hub)
            tensors, settings = read_file(file)
        if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError("the adapter is a dict with values that are not tensors; give a state dict.")
        if settings is None and tensors and all(key.startswith(PEFT_PREFIX) for key in tensors):
            if file is None:
                raise ValueError(
                    f"the tensors have PEFT's names ({PEFT_PREFIX}…); load the folder, which has the settings."
                )
            peft_settings = read_peft_settings(file, source, **hub_arguments(hub))
            settings = {f"{self.denoiser.component}.{key}": value for key, value in peft_settings.items()}
        models = {name: model for name in self._lora_loadable_modules if (model := self.unwrapped(name)) is not None}
        return read_adapter(tensors, settings, models, self.denoiser.component)

    def _new_adapter_name(self) -> str:
        """A name that no adapter of any component has."""
        names = self.adapter_names()
        return next(name for index in itertools.count(len(names)) if (name := f"default_{index}") not in names)

    def _check_new_name(self, adapter_name: str):
        if adapter_name in self.adapter_names():
            raise ValueError(f"`adapter_name` is {adapter_name!r}, which is loaded already; it must be a new name.")
        if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
            raise ValueError(f"`adapter_name` is {adapter_name!r}; it must be a word without dots.")
        if hasattr(nn.ModuleDict(), adapter_name):
            raise ValueError(f"`adapter_name` is {adapter_name!r}, a method's name in torch; it must be another word.")

    def _check_hotswap(self, adapters: dict[str, ComponentAdapter], adapter_name: str):
        """Raise a ValueError if an adapter cannot replace a loaded one, before the loaded one is changed."""
        if "text_encoder" in adapters:
            raise ValueError("`hotswap` is true, but the adapter is also on the text encoder: load it separately.")
        names = as_names(adapter_name, self.denoiser.peft_config if self.get_list_adapters() else ())
        settings, tensors = adapters[self.denoiser.component].settings, adapters[self.denoiser.component].tensors
        check_hotswap_configs_compatible(self.denoiser.peft_config[names[0]], settings)
        if settings.rank_pattern or settings.alpha_pattern or settings.use_dora:
            raise ValueError("`hotswap` is true, but the adapter is no LoRA with one rank: load it separately.")
        layers = get_peft_model_state_dict(self.denoiser, adapter_name=names[0])
        if new := sorted(tensors.keys() - layers.keys()):
            raise ValueError(f"`hotswap` is true, but {names[0]!r} has no {new[0]!r}: load the adapter separately.")

    def _load_into(self, component: str, adapter: ComponentAdapter, adapter_name: str, hotswap: bool):
        model = self.unwrapped(component)
        if isinstance(model, ModelMixin):
            model.load_lora_adapter(
                {f"{component}.{key}": value for key, value in adapter.tensors.items()},
                prefix=component,
                adapter_name=adapter_name,
                metadata={f"{component}.{key}": value for key, value in adapter.settings.to_dict().items()},
                hotswap=hotswap,
                low_cpu_mem_usage=True,
                _pipeline=self,
            )
        else:
            add_text_adapter(model, adapter.settings, adapter_name, adapter.tensors)

    @_OnClassOrInstance
    def save_lora_weights(
        self,
        save_directory: str | Path,
        transformer_lora_layers: dict[str, torch.Tensor] | None = None,
        unet_lora_layers: dict[str, torch.Tensor] | None = None,
        text_encoder_lora_layers: dict[str, torch.Tensor] | None = None,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        unet_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        format: AdapterFormat = "diffusers",
    ):
        """Save a loaded adapter with its settings, or given layers; the latter also works on the class.

        Args:
            save_directory: Folder for `pytorch_lora_weights.safetensors`.
            transformer_lora_layers: Tensors of the adapter on the transformer, under PEFT's names.
            unet_lora_layers: The same for the UNet.
            text_encoder_lora_layers: The same for the text encoder.
            transformer_lora_adapter_metadata: The adapter's `LoraConfig` as a dict.
            unet_lora_adapter_metadata: The same for the UNet.
            text_encoder_lora_adapter_metadata: The same for the text encoder.
            weight_name: Another name for the file.
            adapter_name: Name of the adapter to save, if no layers are given and several adapters are loaded.
            format: `diffusers`, or `kohya` for other programs: `lora_unet_….lora_down.weight`, `.lora_up.weight` and
                `.alpha`, with the text encoder under `lora_te_…`. The format has no rsLoRA: its alpha is that of a
                plain LoRA with the same strength.

        Raises:
            ValueError: If there is no layer to save, there are several adapters and no name, layers come without their
                settings (rank and alpha are then unknown), or the format is unknown.
        """
        if format not in get_args(AdapterFormat):
            raise ValueError(f"`format` is {format!r}; it must be {' or '.join(map(repr, get_args(AdapterFormat)))}.")
        given = {
            "transformer": (transformer_lora_layers, transformer_lora_adapter_metadata),
            "unet": (unet_lora_layers, unet_lora_adapter_metadata),
            "text_encoder": (text_encoder_lora_layers, text_encoder_lora_adapter_metadata),
        }
        parts = {component: part for component, part in given.items() if part[0]}
        if parts and adapter_name is not None:
            raise ValueError(f"`adapter_name` is {adapter_name!r} and layers are given; give one of the two.")
        if not parts and not isinstance(self, type):
            parts = self._loaded_parts(adapter_name)
        if not parts:
            raise ValueError(
                "no layers are given and no adapter is loaded; "
                f"give {', '.join(f'`{component}_lora_layers`' for component in given)}."
            )
        for component, (_, settings) in parts.items():
            if not settings:
                raise ValueError(
                    f"`{component}_lora_layers` is given without `{component}_lora_adapter_metadata`; "
                    "it must be the adapter's `LoraConfig` as a dict."
                )
        if format == "kohya":
            write_file(save_directory, weight_name, to_kohya(parts), None)
            return
        tensors = {f"{part}.{key}": value for part, (layers, _) in parts.items() for key, value in layers.items()}
        settings = {f"{part}.{key}": value for part, (_, values) in parts.items() for key, value in values.items()}
        write_file(save_directory, weight_name, tensors, settings)

    def _loaded_parts(self, adapter_name: str | None) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
        """Tensors and settings, by component, of a loaded adapter; if no name is given, of the only one."""
        names = self.adapter_names()
        if adapter_name is None and len(names) > 1:
            raise ValueError(f"{', '.join(map(repr, names))} are loaded; give the one to save as `adapter_name`.")
        if adapter_name is not None:
            names = as_names(adapter_name, names)
        return {
            component: (
                get_peft_model_state_dict(self.unwrapped(component), adapter_name=name),
                self.unwrapped(component).peft_config[name].to_dict(),
            )
            for name in names
            for component, on_component in self.get_list_adapters().items()
            if name in on_component
        }

    def lora_layers(self, adapter_name: str = "default") -> dict[str, dict[str, Any]]:
        """The arguments of `save_lora_weights` for a loaded adapter.

        Raises:
            ValueError: If no adapter has that name.
        """
        if adapter_name not in self.adapter_names():
            raise ValueError(f"`adapter_name` is {adapter_name!r}; there are {self.get_list_adapters() or 'none'}.")
        layers = {}
        for component, (tensors, settings) in self._loaded_parts(adapter_name).items():
            layers[f"{component}_lora_layers"] = {name: value.contiguous() for name, value in tensors.items()}
            layers[f"{component}_lora_adapter_metadata"] = settings
        return layers

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any):
        """Save the pipeline, with the arguments of diffusers.

        Raises:
            ValueError: If adapters are loaded, because no pipeline could load their wrapped layers.
        """
        adapters = self.get_list_adapters()
        if adapters:
            raise ValueError(
                f"the pipeline has adapters, {adapters}: save them with `save_lora_weights`, or make them part of the "
                "weights with `fuse_lora` and then `unload_lora_weights(keep_fused=True)`."
            )
        super().save_pretrained(save_directory, **kwargs)
