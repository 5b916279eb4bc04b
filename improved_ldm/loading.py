"""Checks before a folder or a repository is loaded: the version that wrote it, and that no weights are a pickle.

A pickle can run any code. Weights are read from safetensors, even if a folder has both.
"""

import functools
import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import diffusers
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from packaging.version import Version

from improved_ldm.version import __version__

DENOISER_NAMES = ("transformer", "unet")  # components of a pipeline, which has one of them
VERSION_KEY = "_improved_ldm_version"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
OTHER_SUFFIXES = (".safetensors", ".index", ".json")  # of weights and their indices
SHARD = re.compile(r"-\d{5}-of-\d{5}")
PICKLED_WEIGHTS = ("pytorch_model", "adapter_model")  # loaders look for them even next to other safetensors
ORIGINS = ("_name_or_path", "name_or_path")  # keys of configurations that record where a model was loaded from
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "pytorch_lora_weights.safetensors")


class VersionedConfig:
    """A diffusers config that records which version wrote it, and refuses unknown arguments of newer versions."""

    def to_json_string(self) -> str:
        """The config as the text of a JSON file."""
        self.register_to_config(**{VERSION_KEY: __version__})
        return super().to_json_string()

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        """Split a config into the constructor's arguments, unused values and hidden values.

        Raises:
            ValueError: If a newer version added arguments.
        """
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        cls.check_known(config_dict, unused.keys() & config_dict.keys())
        return init_dict, unused, hidden

    @classmethod
    def check_known(cls, config_dict: dict[str, Any], unknown: Iterable[str]):
        """Raise a ValueError if a newer version wrote the config and some of it is unknown."""
        writer = config_dict.get(VERSION_KEY, __version__)
        if unknown and Version(writer) > Version(__version__):
            names = ", ".join(f"`{name}`" for name in sorted(unknown))
            raise ValueError(
                f"the config of {cls.__name__} was written by improved_ldm {writer} and has {names}, which "
                f"{__version__} does not know; pip install -U improved_ldm"
            )


class CheckedModel(VersionedConfig):
    """A diffusers model whose weights are read from safetensors only."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs):
        """Load a model as diffusers does; see `ModelMixin.from_pretrained` for the arguments.

        Raises:
            ValueError: If `use_safetensors` is False, a folder has weights only as a pickle, or a newer version wrote
                a config that this one does not know.
        """
        check_asks_safetensors(kwargs)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_weights([folder])
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    @functools.wraps(ModelMixin.save_pretrained)  # diffusers inspects its signature
    def save_pretrained(self, *args, **kwargs):
        given = inspect.signature(ModelMixin.save_pretrained).bind(self, *args, **kwargs).arguments
        check_safe(given.get("safe_serialization", True))
        super().save_pretrained(*args, **kwargs)


class CheckedPipeline(VersionedConfig):
    """A diffusers pipeline whose folder is checked before any of its components is loaded."""

    def __init_subclass__(cls, **kwargs):
        """Hide the defaults of components from diffusers, which would load such components instead of given ones."""
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)
        shown = [
            parameter.replace(default=parameter.empty) if name in cls._optional_components else parameter
            for name, parameter in signature.parameters.items()
        ]
        shown.sort(key=lambda parameter: (parameter.kind, parameter.default is not parameter.empty))
        cls.__init__.__signature__ = signature.replace(parameters=shown)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> Self:
        """Load a pipeline as diffusers does; see `DiffusionPipeline.from_pretrained` for the arguments.

        Raises:
            ValueError: If the folder is that of an adapter, or its content is refused.
        """
        folder = Path(pretrained_model_name_or_path)
        if any((folder / name).is_file() for name in ADAPTER_FILES) and not (folder / "model_index.json").is_file():
            raise ValueError(
                f"{folder} holds an adapter; load the pipeline that it was made for, then the adapter with "
                "`load_lora_weights`."
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, push_to_hub: bool = False, **kwargs
    ):
        """Save the pipeline as diffusers does, without the paths that its components were loaded from.

        Args:
            save_directory: Folder of the pipeline.
            safe_serialization: Must be True; weights are saved as safetensors.
            push_to_hub: Whether to push the folder as well, with the arguments of `push_to_hub`.
            kwargs: As in `DiffusionPipeline.save_pretrained`.

        Raises:
            ValueError: If `safe_serialization` is False.
        """
        check_safe(safe_serialization)
        of_push = inspect.signature(self.push_to_hub).parameters if push_to_hub else ()
        pushed = {name: kwargs[name] for name in kwargs if name in of_push}
        saved = {name: value for name, value in kwargs.items() if name not in pushed or name == "variant"}
        super().save_pretrained(save_directory, safe_serialization=True, **saved)
        folder = Path(save_directory)
        configs = (file for name in self.components for file in folder.glob(f"{name}/*config.json"))
        for file in (folder / self.config_name, *configs):
            _forget_origins(file)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": folder.name, **pushed})

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **replaced: Any) -> Self:
        """Another pipeline with the same components and settings; no weights are copied or cast.

        Args:
            pipeline: Pipeline of this class, or any pipeline whose components fit.
            replaced: Components and settings that differ; `dtype` (or `torch_dtype`) casts all models, also those of
                `pipeline`, because they are shared.

        Raises:
            TypeError: If the class does not have an argument.
        """
        dtype = replaced.pop("torch_dtype", None) or replaced.pop("dtype", None)
        taken = inspect.signature(cls.__init__).parameters
        unknown = sorted(replaced.keys() - taken)
        if unknown:
            raise TypeError(f"`from_pipe` has {', '.join(unknown)}; it may have {', '.join(sorted(taken))}.")
        if any(replaced.get(name) is not None for name in DENOISER_NAMES):
            replaced = {**dict.fromkeys(DENOISER_NAMES), **replaced}
        values = {**pipeline.config, **pipeline.components, **replaced}
        made = cls(**{name: value for name, value in values.items() if name in taken})
        return made if dtype is None else made.to(dtype)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        """The constructor's arguments in a folder's index, in the order of loading: `FolderCheck` first.

        Raises:
            ValueError: If a newer version added arguments or classes, or the index has two denoisers.
        """
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        package = getattr(diffusers.pipelines, "improved_ldm", None)  # missing if the folder's own code runs
        classes = {value[1] for value in init_dict.values() if isinstance(value, list) and value[0] == "improved_ldm"}
        cls.check_known(config_dict, {name for name in classes if package is not None and not hasattr(package, name)})
        absent = [name for name in DENOISER_NAMES if init_dict.get(name, [None])[0] is None]
        if not absent:
            raise ValueError("the index names both a `transformer` and a `unet`; a pipeline has one denoiser.")
        first = {absent[0]: [__name__, FolderCheck.__name__]}  # then the denoiser, which refuses pickles itself
        first |= {name: init_dict[name] for name in DENOISER_NAMES if name in init_dict and name != absent[0]}
        return first | {name: value for name, value in init_dict.items() if name not in first}, unused, hidden


class FolderCheck(ModelMixin):
    """A component that checks the folder of a pipeline instead of loading weights; it loads as None.

    A check before loading would be simpler, but `DiffusionPipeline.from_pretrained(source)` has no hook for one. It
    calls, in this order,

    1. `DiffusionPipeline.download(source)`, which finds the folder and calls none of our classes,
    2. `DiffusionPipeline.load_config(folder)`, which reads the index,
    3. `ImprovedLDMPipeline.extract_init_dict(index)`, which is ours, but does not get the folder,
    4. `from_pretrained(folder / name)` of each component that 3 returns and the user does not pass, in the order of 3,
    5. `ImprovedLDMPipeline(**components)`, after everything is loaded.

    So the check must be the first component in 4. A pipeline has one denoiser, so the name of the other one is free.
    """

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs) -> None:
        """Raise a ValueError if a component in a pipeline's folder has its weights only as a pickle."""
        folder = Path(folder)
        if not (folder / "model_index.json").is_file():
            folder = folder.parent  # a folder with the absent component's name exists nevertheless
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        names = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
        check_weights({folder / name if (folder / name).is_dir() else folder for name in names})

    @classmethod
    def load_config(cls, *args, **kwargs) -> tuple[dict, dict, None]:
        """An empty config; with `device_map`, diffusers computes the size of a model before it is loaded."""
        return {}, {}, None

    @classmethod
    def from_config(cls, *args, **kwargs) -> None:
        """No model."""


def without_origins(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a saved model without the path that it was loaded from, which loading sets again."""
    return {key: value for key, value in values.items() if key not in ORIGINS}


def _forget_origins(file: Path):
    values = json.loads(file.read_text(encoding="utf-8"))
    kept = without_origins(values)
    if kept != values:
        file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def check_safe(safe_serialization: bool):
    """Raise a ValueError if weights would be saved as a pickle, which cannot be loaded."""
    if not safe_serialization:
        raise ValueError("`safe_serialization` is False; weights are saved as safetensors only.")


def check_asks_safetensors(arguments: dict[str, Any]):
    """Raise a ValueError if the arguments of a loader request weights as a pickle."""
    if arguments.get("use_safetensors") is False:
        raise ValueError("`use_safetensors` is False; weights are read from safetensors only.")


def check_weights(folders: Iterable[Path]):
    """Raise a ValueError if one of the folders has weights only as a pickle, or has the config of an adapter."""
    folders = sorted(folders)
    for file in (folder / ADAPTER_CONFIG for folder in folders):
        if file.exists():
            raise ValueError(
                f"{file}: the config of an adapter; the base model that it names would be loaded without a check. "
                "It is not loaded; merge the adapter into the component, or load it with `load_lora_weights`."
            )
    pickles = sorted(file for folder in folders for file in _pickled_weights(folder))
    if pickles:
        raise ValueError(
            f"{', '.join(map(str, pickles))}: weights as a pickle, which can run any code, and not as safetensors. "
            "They are not loaded; ask the author for safetensors, or convert them if you trust the author."
        )


def is_pickle(file: str | Path) -> bool:
    """Whether a file has the suffix of a pickle, in lower or upper case."""
    return Path(file).suffix.lower() in PICKLE_SUFFIXES


def _pickled_weights(folder: Path) -> list[Path]:
    """The files that would make a loader read a pickle.

    If the folder has safetensors, pickles that no loader reads as weights are allowed, such as `training_args.bin`.
    """
    files = [file for file in folder.iterdir() if file.is_file()]
    pointers = [file for file in files if _points_to_pickles(file)]
    safe = {_weights_name(file) for file in files if _leads_to_safetensors(file) and file not in pointers}
    pickles = [file for file in files if is_pickle(file) or file in pointers]
    read = [file for file in pickles if _comes_first(file, pointers) or _weights_name(file) not in safe]
    return [file for file in read if not safe or file in pointers or _is_sought(file)]


def _points_to_pickles(file: Path) -> bool:
    """Whether an index or a transformers config names weights that are not safetensors: `"x": "model.bin"`."""
    if not _is_index(file) and file.name != "config.json":
        return False
    content = json.loads(file.read_text(encoding="utf-8"))
    named = [*content.get("weight_map", {}).values(), content.get("transformers_weights") or ".safetensors"]
    return not all(name.endswith((".safetensors", ".safetensors.index.json")) for name in named)


def _is_index(file: Path) -> bool:
    """Whether a file lists the shards of weights, as `model.safetensors.index.json` does."""
    return ".index." in file.name


def _leads_to_safetensors(file: Path) -> bool:
    """Whether a loader finds weights through a file: an index or `model.safetensors`, but not shards alone."""
    return _is_index(file) or (file.suffix == ".safetensors" and not SHARD.search(file.name))


def _comes_first(file: Path, pointers: list[Path]) -> bool:
    """Whether a loader follows a file before it looks for safetensors; it reads `model.bin.index.json` after them."""
    return file in pointers and ".bin." not in file.name


def _is_sought(file: Path) -> bool:
    """Whether a loader looks for a file of this name next to other safetensors, as for `adapter_model.bin`."""
    return any(name in file.name for name in PICKLED_WEIGHTS)


def _weights_name(file: Path) -> str:
    """The name of stored weights without format and shard; transformers names a pickled `model` `pytorch_model`."""
    parts = SHARD.sub("", file.name).split(".")
    name = ".".join(part for part in parts if f".{part.lower()}" not in (*PICKLE_SUFFIXES, *OTHER_SUFFIXES))
    return name.replace("pytorch_model", "model")
