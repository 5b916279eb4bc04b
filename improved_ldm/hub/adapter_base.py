"""Check that the published base of an adapter exists and that the adapter fits it."""

import json
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import tqdm
from transformers import AutoConfig

from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.sampling.components import DEFAULTS

LIBRARIES = ("improved_ldm", "diffusers", "transformers")  # libraries that may define a component
SETTINGS = ("*.json", "tokenizer/*")  # files of a repository without weights and pictures


class _NoBar(tqdm):
    """A progress bar that shows nothing, because the settings are small files."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "disable": True})


def published_base(folder: Path, base: str | None) -> str:
    """The Hub id of an adapter's base: `base` if given, or else the one that the adapter's card names."""
    return base or ModelCard.load(folder / "README.md").data.base_model


def check_base(folder: Path, base: str | None):
    """Check that the published base of an adapter exists and has the adapter's layers, without loading its weights.

    Args:
        folder: Folder of the adapter.
        base: `user/name` of the base; None if the adapter's card names it.

    Raises:
        ValueError: If the base is not on the Hub, cannot be read or does not fit.
    """
    place = published_base(folder, base)
    with TemporaryDirectory() as settings:
        try:
            snapshot_download(place, allow_patterns=SETTINGS, local_dir=settings, tqdm_class=_NoBar)
        except (RepositoryNotFoundError, GatedRepoError) as error:
            raise ValueError(
                f"`base` is {place!r}, which does not exist on the Hub or is not visible to this token; publish the "
                "base first, then pass its repository as `--base user/name`."
            ) from error
        except (HTTPError, OSError) as error:
            raise ValueError(f"`base` is {place!r}, which cannot be read: {error}") from error
        try:
            pipeline = _without_weights(Path(settings))
            pipeline.check_lora_weights(folder)
        except ValueError as error:
            raise ValueError(f"`base` is {place!r}: {error}") from error


def _without_weights(folder: Path) -> ImprovedLDMPipeline:
    """The pipeline that a folder's settings describe, on the meta device.

    Raises:
        ValueError: If the settings describe another pipeline.
    """
    file = folder / DiffusionPipeline.config_name
    index = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kind = index.get("_class_name")
    if kind != ImprovedLDMPipeline.__name__:
        raise ValueError(
            f"it contains {f'a {kind}' if kind else 'no pipeline'}; it must contain an ImprovedLDMPipeline."
        )
    names = ImprovedLDMPipeline._get_signature_keys(ImprovedLDMPipeline)[0]
    components = {
        name: _component(folder / name, *index[name]) for name in names if index.get(name, [None])[0] in LIBRARIES
    }
    return ImprovedLDMPipeline(**components, **{name: index[name] for name in DEFAULTS if name in index})


def _component(folder: Path, library: str, class_name: str):
    kind = getattr(import_module(library), class_name)
    with torch.device("meta"):
        if issubclass(kind, torch.nn.Module):
            if library == "transformers":
                return kind(AutoConfig.from_pretrained(folder))
            return kind.from_config(kind.load_config(folder))
    return kind.from_pretrained(folder)
