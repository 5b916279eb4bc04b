"""Downloaded checkpoints: a file, or a folder of diffusers."""

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from improved_ldm.convert.mapping import StateDict
from improved_ldm.exits import one_line

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")  # files of torch, from which only tensors are read
WRAPPERS = ("ema", "state_dict_ema", "state_dict", "model")  # keys of the weights in training scripts, best first
MODEL_PREFIX = "model.diffusion_model."  # prefix of the denoiser in files that also have the autoencoder


def read_checkpoint(place: Path) -> tuple[StateDict, dict[str, Any]]:
    """The weights of a checkpoint, and its configuration if a `config.json` is next to them.

    Args:
        place: A `.safetensors`, `.pt`, `.pth`, `.ckpt` or `.bin` file, or a folder with one such file or the shards of
            one.

    Returns:
        The state dict on the CPU, and the configuration or an empty dict.

    Raises:
        ValueError: If there are no weights, or a file has more than weights.
    """
    folder = place if place.is_dir() else place.parent
    files = _weight_files(place)
    state_dict = {name: tensor for file in files for name, tensor in _read_file(file).items()}
    if any(name.startswith(MODEL_PREFIX) for name in state_dict):
        state_dict = {
            name.removeprefix(MODEL_PREFIX): tensor
            for name, tensor in state_dict.items()
            if name.startswith(MODEL_PREFIX)
        }
    config = folder / "config.json"
    return state_dict, read_config(config) if config.is_file() else {}


def read_config(file: Path) -> dict[str, Any]:
    """The constructor's arguments in a JSON file.

    Raises:
        ValueError: If the file is not JSON or holds something else; the message names it.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}; it must hold names and their values.")
    return config


def _weight_files(place: Path) -> list[Path]:
    """The one file of weights, or the shards that a folder's index names."""
    if place.is_file():
        return [place]
    suffixes = (".safetensors", *CHECKPOINTS)
    files = [file for suffix in suffixes for file in place.glob(f"diffusion_pytorch_model{suffix}")]
    if files:
        return files[:1]  # safetensors if there are both
    if indices := sorted(place.glob("diffusion_pytorch_model.*.index.json"), reverse=True):
        shards = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()
        return [place / shard for shard in sorted(set(shards))]
    files = sorted(file for file in place.glob("*") if file.suffix.lower() in suffixes)
    if len(files) != 1:
        raise ValueError(f"{str(place)!r} has {len(files)} files of weights ({', '.join(suffixes)}); name the file.")
    return files


def _read_file(file: Path) -> StateDict:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} cannot be read: {error}.") from error
    if file.suffix.lower() not in CHECKPOINTS:
        raise ValueError(f"{str(file)!r} must end in .safetensors, {', '.join(CHECKPOINTS)}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's own checkpoints contain their arguments
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(file)!r} is no file of weights, or holds more than weights, which may be harmful; it is not read."
        ) from error
    except Exception as error:  # errors of damaged files have no common type
        raise ValueError(f"{str(file)!r} cannot be read: {one_line(str(error))}.") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{str(file)!r} holds no state dict.")
    return content
