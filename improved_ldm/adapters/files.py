"""Files of adapters: finding them in a folder or on the Hub, reading and writing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from huggingface_hub import constants, hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from improved_ldm.loading import ADAPTER_CONFIG, check_asks_safetensors

LIBRARY_ARGUMENTS = ("use_safetensors", "low_cpu_mem_usage")  # of diffusers; both are always on here
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
SUFFIX = ".safetensors"
NOT_ADAPTERS = ("scheduler", "optimizer", "checkpoint")  # in names of other files that training writes


def hub_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `hf_hub_download` among those of a loader.

    Raises:
        ValueError: If weights are requested as a pickle.
        TypeError: If an argument is unknown.
    """
    check_asks_safetensors(given)
    hub = {name: value for name, value in given.items() if name not in LIBRARY_ARGUMENTS}
    if unknown := hub.keys() - {*HUB_ARGUMENTS, "subfolder"}:
        raise TypeError(f"`{unknown.pop()}` is no argument here; there are {', '.join(HUB_ARGUMENTS)}.")
    return hub


def find_adapter(source: str | Path, weight_name: str | None = None, subfolder: str | None = None, **hub: Any) -> Path:
    """The local file of an adapter, which is downloaded if it is on the Hub.

    Args:
        source: A folder, a file or a Hub id.
        weight_name: Name of the file, if there are several.
        subfolder: Subfolder of the folder or the repository.
        hub: Arguments of `hf_hub_download`.

    Raises:
        ValueError: If the file is not safetensors, or the folder has no such file or several.
        OSError: If there is no such folder, file or repository.
    """
    hub = hub_arguments(hub)
    place = Path(source)
    file = weight_name or (place.name if place.is_file() else None)
    if file is not None and not file.endswith(SUFFIX):
        raise ValueError(f"the adapter is in {file!r}; it must be a {SUFFIX} file: a pickle can run code.")
    if place.is_file():
        return place
    folder = place / (subfolder or "")
    if place.is_dir():
        if not folder.is_dir():
            raise NotADirectoryError(f"{str(folder)!r} is no folder; `subfolder` must be one in {str(place)!r}.")
        return _in_folder(folder, weight_name)
    return _on_hub(str(source), weight_name, subfolder, hub)


def _in_folder(folder: Path, weight_name: str | None) -> Path:
    names = sorted(path.name for path in folder.iterdir())
    if weight_name is None:
        weight_name = _only(names, str(folder))
    if not (folder / weight_name).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {weight_name!r}; it holds {', '.join(names) or 'nothing'}.")
    return folder / weight_name


def _on_hub(repository: str, weight_name: str | None, subfolder: str | None, hub: dict[str, Any]) -> Path:
    try:
        if weight_name is None and (hub.get("local_files_only") or constants.HF_HUB_OFFLINE):
            snapshot = snapshot_download(
                repository, allow_patterns=[f"*{SUFFIX}"], **{**hub, "local_files_only": True}
            )
            return _in_folder(Path(snapshot) / (subfolder or ""), None)
        if weight_name is None:
            files = model_info(repository, revision=hub.get("revision"), token=hub.get("token")).siblings
            folder = f"{subfolder}/" if subfolder else ""
            names = [file.rfilename.removeprefix(folder) for file in files if file.rfilename.startswith(folder)]
            weight_name = _only((name for name in names if "/" not in name), repository)
        return Path(hf_hub_download(repository, weight_name, subfolder=subfolder, **hub))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise OSError(
            f"{repository!r} is no local folder or file, and no Hub id that can be read; "
            "a private repository needs `token`."
        ) from error
    except (OSError, httpx.HTTPError) as error:  # network errors, missing files, files that are not cached
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"{repository!r} is no local folder or file, and as a Hub id it cannot be read: {reason}"
        ) from error


def _only(names: Iterable[str], place: str) -> str:
    """The one file of a folder that can be an adapter.

    Raises:
        ValueError: If there is none, or there are several.
    """
    names = sorted(names)
    files = [name for name in names if name.endswith(SUFFIX) and not any(word in name for word in NOT_ADAPTERS)]
    if not files:
        held = ", ".join(names) or "nothing"
        raise ValueError(f"{place} holds no {SUFFIX} file to load an adapter from; it holds {held}.")
    if len(files) > 1:
        raise ValueError(
            f"{place} holds {len(files)} files of weights, {', '.join(files)}; give one as `weight_name`."
        )
    return files[0]


def read_file(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """An adapter's tensors on the CPU, and its settings or None.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (it is no dict)
            text = (content.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}.") from error
    if not text:
        return tensors, None
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} cannot be read: its `{LORA_ADAPTER_METADATA_KEY}` is no JSON.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{str(file)!r} cannot be read: its `{LORA_ADAPTER_METADATA_KEY}` is no dict of settings.")
    return tensors, settings


def read_peft_settings(file: Path, source: str | Path, subfolder: str | None = None, **hub: Any) -> dict[str, Any]:
    """The settings in PEFT's `adapter_config.json` next to an adapter's file.

    Raises:
        ValueError: If there are none, or they are damaged.
        OSError: If they cannot be downloaded.
    """
    config = file.parent / ADAPTER_CONFIG
    if not Path(source).exists():
        config = _on_hub(str(source), ADAPTER_CONFIG, subfolder, hub)
    if not config.is_file():
        raise ValueError(f"{str(file)!r} has PEFT's name; {ADAPTER_CONFIG} with its settings must be next to it.")
    try:
        return LoraConfig.from_pretrained(str(config.parent)).to_dict()
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(config)!r} cannot be read: {error}") from error


def write_file(
    folder: str | Path, weight_name: str | None, tensors: dict[str, torch.Tensor], settings: dict[str, Any] | None
):
    """Write an adapter.

    Args:
        folder: Folder, which is created.
        weight_name: Name of the file; default: `pytorch_lora_weights.safetensors`.
        tensors: Tensors by name.
        settings: Settings for the file's metadata, as diffusers reads them, or None.

    Raises:
        ValueError: If the name does not end in .safetensors.
        OSError: If the file cannot be written.
    """
    weight_name = weight_name or LORA_WEIGHT_NAME_SAFE
    if not weight_name.endswith(SUFFIX) or Path(weight_name).name != weight_name:
        raise ValueError(f"`weight_name` is {weight_name!r}; it must be a file's name that ends in {SUFFIX}.")
    metadata = {"format": "pt"}
    if settings:
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(settings, indent=2, sort_keys=True, default=sorted)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / weight_name, metadata=metadata)
