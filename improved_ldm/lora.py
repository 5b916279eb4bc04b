"""Adapters on the pipeline: LoRA and its kin on the denoiser and the text encoder, loaded, mixed, fused and saved."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import get_adapter_name
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from improved_ldm.loading import DENOISER_NAMES

PEFT_PREFIX = "base_model.model."
# what attention layers call their projections, in diffusers and in the text encoders of transformers
ATTENTION_PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("q_proj", "k_proj", "v_proj", "out_proj"),  # CLIP
    *("q", "k", "v", "o"),  # T5
    *("query", "key", "value", "attention.output.dense"),  # BERT
)


def attention_projections(model: nn.Module) -> list[str]:
    """Names of the linear layers of a model's attention, where adapters go by default."""
    endings = tuple(f".{name}" for name in ATTENTION_PROJECTIONS)
    return [name for name, module in model.named_modules() if name.endswith(endings) and hasattr(module, "weight")]


class LoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """diffusers' interface to adapters, for pipelines whose denoiser is a `transformer` or a `unet`.

    `set_adapters`, `get_active_adapters`, `enable_lora`, `disable_lora`, `delete_adapters`, `unload_lora_weights` and
    `enable_lora_hotswap` are diffusers' own.
    """

    _lora_loadable_modules: ClassVar[list[str]] = [*DENOISER_NAMES, "text_encoder"]

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor], **kwargs
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """Read an adapter's tensors, without loading them; the arguments are diffusers' own.

        Raises:
            ValueError: for a file that is not safetensors.
            OSError: if there is no such file.
        """
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, dict):
            _refuse_pickle(Path(source), kwargs.get("weight_name"))
        return super().lora_state_dict(source, **{**kwargs, "use_safetensors": True})

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        weight_name: str | None = None,
        **hub: Any,
    ):
        """Load an adapter and make it the active one.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a file, a Hub id or tensors. Files of diffusers carry the
                adapter's settings; those of PEFT (`adapter_model.safetensors`) have them in `adapter_config.json`
                beside them. Tensors without settings count as plain LoRA whose alpha is its rank.
            adapter_name: to speak of it by; default: `default_0`, `default_1`, …
            hotswap: put the weights in the place of the loaded adapter of that name; see `enable_lora_hotswap`.
            weight_name: of the file, where a folder or a repository holds several.
            hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            ValueError: for a pickle, or an adapter that does not fit this pipeline.
            OSError: if there is no such file.
        """
        source = pretrained_model_name_or_path_or_dict
        tensors, settings = self.lora_state_dict(source, weight_name=weight_name, return_lora_metadata=True, **hub)
        if tensors and all(key.startswith(PEFT_PREFIX) for key in tensors):
            component = self.denoiser.component
            tensors = {f"{component}.{key.removeprefix(PEFT_PREFIX)}": value for key, value in tensors.items()}
            settings = {f"{component}.{key}": value for key, value in _peft_settings(source, hub).items()}
        self._check_fit(tensors)
        components = dict.fromkeys(key.partition(".")[0] for key in tensors)
        if hotswap and "text_encoder" in components:
            raise ValueError("`hotswap` is true, but the adapter is on the text encoder as well: load it anew.")
        adapter_name = adapter_name or get_adapter_name(self.denoiser)
        for component in components:
            model = getattr(self, component)
            if isinstance(model, ModelMixin):
                model.load_lora_adapter(
                    tensors,
                    prefix=component,
                    adapter_name=adapter_name,
                    metadata=settings,
                    hotswap=hotswap,
                    low_cpu_mem_usage=True,
                    _pipeline=self,
                )
            else:
                part, part_settings = _part(tensors, component), _part(settings or {}, component)
                _load_into_text_encoder(model, part, part_settings, adapter_name)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: dict[str, torch.Tensor] | None = None,
        unet_lora_layers: dict[str, torch.Tensor] | None = None,
        text_encoder_lora_layers: dict[str, torch.Tensor] | None = None,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        unet_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
        weight_name: str | None = None,
    ):
        """Save an adapter with its settings; `pipe.lora_layers()` gives the arguments for one that is loaded.

        Args:
            save_directory: folder of `pytorch_lora_weights.safetensors`.
            transformer_lora_layers: tensors of the adapter on the transformer, as PEFT names them.
            unet_lora_layers: the same for the UNet.
            text_encoder_lora_layers: the same for the text encoder.
            transformer_lora_adapter_metadata: the adapter's `LoraConfig` as a dict.
            unet_lora_adapter_metadata: the same for the UNet.
            text_encoder_lora_adapter_metadata: the same for the text encoder.
            weight_name: another name for the file.

        Raises:
            ValueError: if no layers are given, or layers without their settings: rank and alpha could not be told.
        """
        given = {
            "transformer": (transformer_lora_layers, transformer_lora_adapter_metadata),
            "unet": (unet_lora_layers, unet_lora_adapter_metadata),
            "text_encoder": (text_encoder_lora_layers, text_encoder_lora_adapter_metadata),
        }
        parts = {component: part for component, part in given.items() if part[0]}
        if not parts:
            raise ValueError(f"no layers are given; give {', '.join(f'`{name}_lora_layers`' for name in given)}.")
        for component, (_, settings) in parts.items():
            if not settings:
                raise ValueError(
                    f"`{component}_lora_layers` is given without `{component}_lora_adapter_metadata`; "
                    "it must be the adapter's `LoraConfig` as a dict."
                )
        cls._save_lora_weights(
            save_directory,
            lora_layers={component: layers for component, (layers, _) in parts.items()},
            lora_metadata={component: settings for component, (_, settings) in parts.items()},
            weight_name=weight_name,
        )

    def lora_layers(self, adapter_name: str = "default") -> dict[str, dict[str, Any]]:
        """The arguments of `save_lora_weights` for a loaded adapter.

        Raises:
            ValueError: if no adapter has that name.
        """
        layers = {}
        for component, names in self.get_list_adapters().items():
            if adapter_name in names:
                model = getattr(self, component)
                tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
                layers[f"{component}_lora_layers"] = {name: value.contiguous() for name, value in tensors.items()}
                layers[f"{component}_lora_adapter_metadata"] = model.peft_config[adapter_name].to_dict()
        if not layers:
            raise ValueError(f"`adapter_name` is {adapter_name!r}; there are {self.get_list_adapters() or 'none'}.")
        return layers

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any):
        """Add the active adapters to the weights; the arguments are diffusers' own, by default all components."""
        super().fuse_lora(components or self._lora_loadable_modules, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None):
        """Take fused adapters out of the weights again, by default of all components."""
        super().unfuse_lora(components or self._lora_loadable_modules)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any):
        """Save the pipeline; the arguments are diffusers' own.

        Raises:
            ValueError: if adapters are loaded, whose wrapped layers no pipeline could load.
        """
        adapters = self.get_list_adapters()
        if adapters:
            raise ValueError(
                f"the pipeline has adapters, {adapters}: save them with `save_lora_weights`, or make them part of the "
                "weights with `fuse_lora` and then `unload_lora_weights`."
            )
        super().save_pretrained(save_directory, **kwargs)

    def _check_fit(self, tensors: dict[str, torch.Tensor]):
        """Raise a ValueError for an adapter with layers that the pipeline does not have."""
        models = {name: model for name in self._lora_loadable_modules if (model := getattr(self, name)) is not None}
        layers = {
            f"{component}.{name}": module
            for component, model in models.items()
            for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), torch.Tensor)
        }
        unfit = [name for name, value in tensors.items() if not _fits(name, value, layers)]
        if unfit or not tensors:
            examples = [f"{name}.{attention_projections(model)[0]}.lora_A.weight" for name, model in models.items()]
            raise ValueError(
                f"the adapter does not fit this pipeline with its {type(self.denoiser).__name__}: "
                f"{len(unfit)} of its {len(tensors)} keys find no layer of their shape, such as "
                f"{', '.join(f'{name} {tuple(tensors[name].shape)}' for name in unfit[:3]) or 'none'}; "
                f"expected are keys such as {', '.join(_described(name, layers) for name in examples)}."
            )


def _fits(key: str, value: torch.Tensor, layers: dict[str, nn.Module]) -> bool:
    """Whether an adapter's tensor belongs to one of the layers, by name and shape."""
    name, _, part = key.partition(".lora_")
    if name not in layers or not part:
        return False
    weight = layers[name].weight  # (out, in, …)
    if part.startswith("A."):
        return value.shape[1:] == weight.shape[1:]  # (rank, in, …)
    return value.shape[0] == weight.shape[0]  # (out, …)


def _described(key: str, layers: dict[str, nn.Module]) -> str:
    return f"{key} (rank, {layers[key.partition('.lora_')[0]].weight.shape[1]})"


def _part(values: dict[str, Any], component: str) -> dict[str, Any]:
    """The values of one component, without its name."""
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _load_into_text_encoder(
    text_encoder: PreTrainedModel, tensors: dict[str, torch.Tensor], settings: dict[str, Any], adapter_name: str
):
    """Wrap the layers of a text encoder that an adapter is on; diffusers does it for CLIP and plain LoRA only."""
    if not settings:
        raise ValueError(
            "the adapter is on the text encoder; its file must have the settings, `lora_adapter_metadata`."
        )
    inject_adapter_in_model(LoraConfig(**settings), text_encoder, adapter_name)
    set_peft_model_state_dict(text_encoder, tensors, adapter_name)
    text_encoder._hf_peft_config_loaded = True


def _peft_settings(source: str | Path | dict, hub: dict[str, Any]) -> dict[str, Any]:
    """The settings that lie beside an adapter of PEFT.

    Raises:
        ValueError: if there are none.
    """
    if isinstance(source, dict):
        raise ValueError(f"the tensors are named as PEFT does ({PEFT_PREFIX}…); load its folder, with its settings.")
    folder = Path(source).parent if Path(source).is_file() else source
    return LoraConfig.from_pretrained(str(folder), **hub).to_dict()


def _refuse_pickle(source: Path, weight_name: str | None):
    """Raise a ValueError for a file that is not safetensors, or a local folder without one."""
    file = weight_name or (source.name if source.is_file() else None)
    if file is not None and not file.endswith(".safetensors"):
        raise ValueError(f"the adapter is in {file!r}; it must be a .safetensors file: a pickle can run code.")
    if file is None and source.is_dir() and not list(source.glob("*.safetensors")):
        files = ", ".join(sorted(path.name for path in source.iterdir())) or "nothing"
        raise ValueError(f"{source} holds no .safetensors file to load an adapter from; it holds {files}.")
