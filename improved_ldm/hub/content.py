"""What of a trained folder a version on the Hub holds, and what must never leave the machine."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import ModelCard

from improved_ldm.data.sources import is_hub_id
from improved_ldm.hub.adapter_card import place_base
from improved_ldm.hub.eval_results import EVAL_RESULTS
from improved_ldm.loading import is_pickle
from improved_ldm.pipeline import ImprovedLDMPipeline

Content = dict[str, Path | bytes]  # path in the repository → file, or what is in it
Variant = Literal["ema", "fp16"]

INDEX = DiffusionPipeline.config_name  # model_index.json
COMPLETE = ("README.md", "metrics.json", "config.yaml", "samples.png")
NOT_PUBLISHED = ("checkpoints", "cache", "logs")
VARIANT_DTYPES = {"ema": torch.float32, "fp16": torch.float16}  # a trained folder holds the averaged weights
TEXT_SAMPLE = 8000  # bytes in which a binary file has a NUL, as git judges
TOKENS = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bapi_org_[A-Za-z0-9]{30,}"  # Hugging Face
    rb"|\bgh[oprsu]_[A-Za-z0-9]{36}|\bgithub_pat_\w{40,}"  # GitHub
    rb"|\bAKIA[0-9A-Z]{16}\b"  # Amazon
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def folder_content(folder: Path) -> Content:
    """The files of a trained folder that are published: all but checkpoints, caches, logs, hidden files and stages.

    Args:
        folder: the trained folder.

    Returns:
        The files by their path in the repository.
    """
    left_out = {folder / name for name in NOT_PUBLISHED} | {index.parent for index in folder.glob(f"*/{INDEX}")}
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not left_out & set(path.parents)
        and not any(_is_private(part) for part in path.relative_to(folder).parts)
    }


def _is_private(part: str) -> bool:
    """Whether what a file or folder is called says that it stays here."""
    return part == "__pycache__" or (part.startswith(".") and part != EVAL_RESULTS)


def check_complete(folder: Path):
    """Raise a FileNotFoundError that names what the folder of a finished run lacks."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`pipeline` is {str(folder)!r}; there is no such folder.")
    trained = () if _is_adapter(folder) else (INDEX,)
    missing = [name for name in (*trained, *COMPLETE) if not (folder / name).is_file()]
    missing += _missing_components(folder)
    if missing:
        raise FileNotFoundError(
            f"`pipeline` is {str(folder)!r}; it has no {', '.join(missing)} and must be the folder of a finished run."
        )


def check_options(folder: Path, variant: Variant | None, base: str | None):
    """Raise a ValueError for what a folder has no use for, or an adapter whose base nobody else can load.

    Args:
        folder: complete.
        variant: weights to publish beside the plain ones.
        base: `user/name` of an adapter's base.
    """
    config = run_config(folder)
    if not _is_adapter(folder):
        if base is not None:
            raise ValueError(f"`base` is {base!r}; only an adapter has one, and {folder} holds a pipeline.")
        return
    if variant is not None:
        raise ValueError(f"`variant` is {variant!r}; an adapter has none.")
    if base is None and not is_hub_id(ModelCard.load(folder / "README.md").data.base_model):
        raise ValueError(
            f"the base of the adapter, {config['base']!r}, is on this machine only; publish it first, then give "
            "`--base user/name`, the repository that it went to."
        )


def _is_adapter(folder: Path) -> bool:
    """Whether a run left an adapter alone, not a pipeline."""
    return (folder / LORA_WEIGHT_NAME_SAFE).is_file()


def _missing_components(folder: Path) -> list[str]:
    """The folders and the weights that a pipeline's index speaks of and that are not there."""
    index = _index(folder)
    names = [name for name in ImprovedLDMPipeline._get_signature_keys(ImprovedLDMPipeline)[0] if name in index]
    folders = [folder / name for name in names if index[name][0] is not None]
    missing = [f"{part.name}/" for part in folders if not part.is_dir()]
    models = [part for part in folders if (part / "config.json").is_file()]
    return missing + [f"{part.name}/*.safetensors" for part in models if not list(part.glob("*.safetensors"))]


def _index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of its components and settings; nothing for an adapter's."""
    file = folder / INDEX
    return json.loads(file.read_text()) if file.is_file() else {}


def check_shareable(content: Content, token: str):
    """Raise a ValueError that names a file which may hold code or a secret.

    Args:
        content: what would be published.
        token: the access token in use.
    """
    for path, source in content.items():
        if is_pickle(path):
            raise ValueError(f"{path} is a pickle, which runs code when it is read; only safetensors are published.")
        line = _line_of_secret(source, token.encode())
        if line:
            raise ValueError(
                f"{path} holds what looks like an access token or a key, in line {line}; take it out, and revoke it."
            )


def _line_of_secret(source: Path | bytes, token: bytes) -> int | None:
    """The line of a text in which a secret stands, counted from 1."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            if b"\0" in file.read(TEXT_SAMPLE):
                return None
        source = source.read_bytes()
    found = TOKENS.search(source) or re.search(re.escape(token), source)
    return source.count(b"\n", 0, found.start()) + 1 if found else None


def variant_content(folder: Path, variant: Variant, staging: Path) -> Content:
    """The weights of a trained folder as a variant, which `from_pretrained(variant=)` finds beside the plain ones.

    Args:
        folder: the trained folder.
        variant: `fp16`, or `ema` for the averaged weights under the name that says so.
        staging: folder to write them to.

    Returns:
        The variant's files by their path in the repository.

    """
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=VARIANT_DTYPES[variant])
    pipeline.save_pretrained(staging, variant=variant)
    return {path: file for path, file in folder_content(staging).items() if f".{variant}." in Path(path).name}


def addressed(
    folder: Path, content: Content, repo: str, version: str, earlier: dict[str, str], base: str | None = None
) -> Content:
    """A version whose card and lineage name places on the Hub where they named local folders.

    Args:
        folder: the trained folder.
        content: its files.
        repo: `user/name`.
        version: that the card's lines of use load.
        earlier: the places of stages, `user/name@version`, by the folders that they were trained in.
        base: `user/name` of an adapter's base; None where the card names it already.
    """
    card = (folder / "README.md").read_text().replace(f'("{trained_as(folder)}"', f'("{repo}", revision="{version}"')
    for stage, place in earlier.items():
        card = card.replace(f"`{stage}`", f"`{place}`")
    if base is not None:
        card = place_base(card, run_config(folder)["base"], base)
    content = content | {"README.md": card.encode()}
    index = _index(folder)
    for record in index.get("lineage") or ():
        record["source"] = earlier.get(record["source"], record["source"])
    if index:
        content[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    return content


def trained_as(folder: Path) -> str:
    """The folder that a run was trained in, as its own files call it."""
    return Path(run_config(folder)["output_dir"]).as_posix()


def run_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run left in its folder.

    Raises:
        ValueError: if it is none.
    """
    file = folder / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    keys = ("output_dir", "base") if _is_adapter(folder) else ("output_dir",)
    missing = [key for key in keys if not isinstance(config, dict) or not isinstance(config.get(key), str)]
    if missing:
        raise ValueError(f"{file} has no `{'`, no `'.join(missing)}`; it must be the configuration of the run.")
    return config


def stage_folders(folder: Path) -> list[Path]:
    """The stages before the last one of a staged run, in order, as its lineage tells."""
    stages = [folder / Path(record["source"] or "").name for record in _index(folder).get("lineage") or ()]
    return [stage for stage in stages if stage != folder and (stage / INDEX).is_file()]
