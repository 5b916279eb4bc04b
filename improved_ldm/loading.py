"""What is checked before a folder or a repository is loaded: which version wrote it, and that no weights are a pickle.

A pickle can run any code. Weights are read from safetensors, also where a folder holds both.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from packaging.version import Version

from improved_ldm.version import __version__

DENOISER_NAMES = ("transformer", "unet")  # in a pipeline, which has one of them
VERSION_KEY = "_improved_ldm_version"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
OTHER_SUFFIXES = (".safetensors", ".index", ".json")  # of weights and their indices
SHARD = re.compile(r"-\d{5}-of-\d{5}")
PICKLED_WEIGHTS = ("pytorch_model", "adapter_model")  # what loaders look for beside other safetensors
ADAPTER_CONFIG = "adapter_config.json"


class VersionedConfig:
    """A diffusers config that records which version wrote it, and does not drop what a newer version added."""

    def to_json_string(self) -> str:
        """The config as a file."""
        self.register_to_config(**{VERSION_KEY: __version__})
        return super().to_json_string()

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        """The constructor's arguments in a config, what is left over, and what stays hidden.

        Raises:
            ValueError: for arguments that a newer version added.
        """
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        cls.check_known(config_dict, unused.keys() & config_dict.keys())
        return init_dict, unused, hidden

    @classmethod
    def check_known(cls, config_dict: dict[str, Any], unknown: Iterable[str]):
        """Raise a ValueError where a newer version wrote the config and something in it is unknown."""
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
            ValueError: where `use_safetensors` is False, a folder holds weights as a pickle only, or a newer version
                wrote a config that this one does not know.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` is False; weights are read from safetensors only.")
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_weights([folder])
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})


class CheckedPipeline(VersionedConfig):
    """A diffusers pipeline whose folder is checked before any of its components is loaded."""

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        """The constructor's arguments in a folder's index, the check of the folder before them.

        `DiffusionPipeline.from_pretrained` tells the class nothing of the folder, but loads what it finds here, in
        this order, from it. So the name that the denoiser does not have is given to `WeightsCheck`.

        Raises:
            ValueError: for arguments or classes that a newer version added, or an index with two denoisers.
        """
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        package = getattr(diffusers.pipelines, "improved_ldm", None)  # not there where the folder's own code runs
        classes = {value[1] for value in init_dict.values() if isinstance(value, list) and value[0] == "improved_ldm"}
        cls.check_known(config_dict, {name for name in classes if package is not None and not hasattr(package, name)})
        absent = [name for name in DENOISER_NAMES if init_dict.get(name, [None])[0] is None]
        if not absent:
            raise ValueError("the index names both a `transformer` and a `unet`; a pipeline has one denoiser.")
        first = {absent[0]: [__name__, WeightsCheck.__name__]}  # then the denoiser, which takes no pickle
        first |= {name: init_dict[name] for name in DENOISER_NAMES if name in init_dict and name != absent[0]}
        return first | {name: value for name, value in init_dict.items() if name not in first}, unused, hidden


class WeightsCheck(SchedulerMixin):
    """In diffusers' eyes a component without weights; loading it checks a pipeline's folder and gives None."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs) -> None:
        """Raise a ValueError where a component of a pipeline's folder has its weights as a pickle only."""
        folder = Path(folder)
        if not (folder / "model_index.json").is_file():
            folder = folder.parent  # a folder of the absent component's name is there all the same
        index = json.loads((folder / "model_index.json").read_text())
        names = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
        check_weights({folder / name if (folder / name).is_dir() else folder for name in names})


def check_weights(folders: Iterable[Path]):
    """Raise a ValueError where one of the folders holds weights as a pickle only, or the config of an adapter."""
    folders = sorted(folders)
    for file in (folder / ADAPTER_CONFIG for folder in folders):
        if file.exists():
            raise ValueError(
                f"{file}: the config of an adapter, whose base would be loaded from wherever it says, unchecked. "
                "It is not loaded; merge the adapter into the component, or load it with `load_lora_weights`."
            )
    pickles = sorted(file for folder in folders for file in _pickled_weights(folder))
    if pickles:
        raise ValueError(
            f"{', '.join(map(str, pickles))}: weights as a pickle, which can run any code, and not as safetensors. "
            "They are not loaded; ask for safetensors, or convert them where you trust their source."
        )


def is_pickle(file: str | Path) -> bool:
    """Whether a file is called like a pickle, in small letters or large ones."""
    return Path(file).suffix.lower() in PICKLE_SUFFIXES


def _pickled_weights(folder: Path) -> list[Path]:
    """What makes a loader read a pickle; with safetensors there, pickles that no loader takes for weights may stay."""
    files = [file for file in folder.iterdir() if file.is_file()]
    indices = [file for file in files if ".index." in file.name]
    pointers = [file for file in (*indices, folder / "config.json") if file in files and _points_to_pickles(file)]
    whole = [file for file in files if file.suffix == ".safetensors" and not SHARD.search(file.name)]
    safe = {_weights_name(file) for file in (*whole, *indices) if file not in pointers}
    pickles = [file for file in files if is_pickle(file)] + pointers
    always = [file for file in pointers if ".bin." not in file.name]  # a loader follows these before anything else
    alone = [file for file in pickles if file in always or _weights_name(file) not in safe]
    sought = [file for file in alone if file in pointers or any(name in file.name for name in PICKLED_WEIGHTS)]
    return sought if safe else alone


def _points_to_pickles(file: Path) -> bool:
    """Whether an index or a transformers config names files of weights that are not safetensors."""
    content = json.loads(file.read_text())
    named = [*content.get("weight_map", {}).values(), content.get("transformers_weights") or ".safetensors"]
    return not all(name.endswith((".safetensors", ".safetensors.index.json")) for name in named)


def _weights_name(file: Path) -> str:
    """What is stored, in whichever format and number of files; transformers' pickled `model` is a `pytorch_model`."""
    parts = SHARD.sub("", file.name).split(".")
    name = ".".join(part for part in parts if f".{part.lower()}" not in (*PICKLE_SUFFIXES, *OTHER_SUFFIXES))
    return name.replace("pytorch_model", "model")
