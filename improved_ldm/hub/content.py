"""Which files of a trained folder are published on the Hub, and which must never leave the machine."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import ModelCard

from improved_ldm.hub.adapter_card import name_base_on_hub
from improved_ldm.hub.eval_results import EVAL_RESULTS
from improved_ldm.lineage import INDEX
from improved_ldm.loading import is_pickle
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.places import is_hub_id, shareable_place

Content = dict[str, Path | bytes]  # path in the repository → file, or its content
Variant = Literal["ema", "fp16"]

COMPLETE = ("README.md", "metrics.json", "config.yaml", "samples.png")
# Files and folders that are local to the machine.
NOT_PUBLISHED = ("checkpoints", "cache", "logs", "validation-samples", "data.json", "switch.json", "run.lock")
VARIANT_DTYPES = {"ema": torch.float32, "fp16": torch.float16}  # a trained folder contains the averaged weights
TEXT_SAMPLE = 8000  # bytes; a file with a NUL in them is binary, as in git
TOKENS = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bapi_org_[A-Za-z0-9]{30,}"  # Hugging Face
    rb"|\bgh[oprsu]_[A-Za-z0-9]{36}|\bgithub_pat_\w{40,}"  # GitHub
    rb"|\bAKIA[0-9A-Z]{16}\b"  # Amazon
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def folder_content(folder: Path) -> Content:
    """The files of a trained folder that are published: all except `NOT_PUBLISHED`, hidden files and stages.

    Args:
        folder: The trained folder.

    Returns:
        The files by their path in the repository.
    """
    left_out = {folder / name for name in NOT_PUBLISHED} | {index.parent for index in folder.glob(f"*/{INDEX}")}
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not left_out & {path, *path.parents}
        and not any(_is_private(part) for part in path.relative_to(folder).parts)
    }


def _is_private(part: str) -> bool:
    """Whether the name of a file or folder means that it is not published."""
    return part == "__pycache__" or (part.startswith(".") and part != EVAL_RESULTS)


def check_complete(folder: Path):
    """Raise a FileNotFoundError that names the missing files if a folder is not that of a finished run."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`pipeline` is {str(folder)!r}; there is no such folder.")
    trained = () if is_adapter(folder) else (INDEX,)
    missing = [name for name in (*trained, *COMPLETE) if not (folder / name).is_file()]
    missing += _missing_components(folder)
    if missing:
        raise FileNotFoundError(
            f"`pipeline` is {str(folder)!r}; it must be the folder of a finished run, but has no {', '.join(missing)}."
        )


def check_options(folder: Path, variant: Variant | None, base: str | None):
    """Raise a ValueError for options that do not apply to a folder, or for an adapter whose base is not on the Hub.

    Args:
        folder: A complete folder.
        variant: Variant of the weights to publish in addition to the plain ones.
        base: `user/name` of an adapter's base.
    """
    config = run_config(folder)
    if not is_adapter(folder):
        if base is not None:
            raise ValueError(f"`base` is {base!r}; only an adapter has one, and {folder} contains a pipeline.")
        return
    if variant is not None:
        raise ValueError(f"`variant` is {variant!r}; an adapter has no variants.")
    if base is None and not is_hub_id(ModelCard.load(folder / "README.md").data.base_model):
        raise ValueError(
            f"the base of the adapter, {config['base']!r}, is only on this machine; publish it first, then pass its "
            "repository as `--base user/name`."
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder contains an adapter instead of a pipeline."""
    return (folder / LORA_WEIGHT_NAME_SAFE).is_file()


def _missing_components(folder: Path) -> list[str]:
    """The folders and weights that a pipeline's index lists but that do not exist."""
    index = _index(folder)
    names = [name for name in ImprovedLDMPipeline._get_signature_keys(ImprovedLDMPipeline)[0] if name in index]
    folders = [folder / name for name in names if index[name][0] is not None]
    missing = [f"{part.name}/" for part in folders if not part.is_dir()]
    models = [part for part in folders if (part / "config.json").is_file()]
    return missing + [f"{part.name}/*.safetensors" for part in models if not list(part.glob("*.safetensors"))]


def _index(folder: Path) -> dict[str, Any]:
    """The index of a pipeline's components and settings; empty for an adapter."""
    file = folder / INDEX
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def check_shareable(content: Content, token: str):
    """Raise a ValueError that names a file if it may contain code or a secret.

    Args:
        content: Files to publish.
        token: The access token in use.
    """
    for path, source in content.items():
        if is_pickle(path):
            raise ValueError(
                f"{path} is a pickle, which can run code when it is loaded; only safetensors are published."
            )
        line = _line_of_secret(source, token.encode())
        if line:
            raise ValueError(
                f"{path}, line {line}, seems to contain an access token or a key; remove it and revoke it."
            )


def _line_of_secret(source: Path | bytes, token: bytes) -> int | None:
    """Number of the line that contains a secret, counted from 1; None if there is no secret."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            if b"\0" in file.read(TEXT_SAMPLE):
                return None
        source = source.read_bytes()
    found = TOKENS.search(source) or re.search(re.escape(token), source)
    return source.count(b"\n", 0, found.start()) + 1 if found else None


def variant_content(folder: Path, variant: Variant, staging: Path) -> Content:
    """Write the weights of a trained folder as a variant, for `from_pretrained(variant=)`.

    Args:
        folder: The trained folder.
        variant: `fp16`, or `ema` for the averaged weights under an explicit name.
        staging: Folder to write them to.

    Returns:
        The variant's files by their path in the repository.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=VARIANT_DTYPES[variant])
    pipeline.save_pretrained(staging, variant=variant)
    return {path: file for path, file in folder_content(staging).items() if f".{variant}." in Path(path).name}


def name_places_on_hub(
    folder: Path, content: Content, repo: str, version: str, earlier: dict[str, str], base: str | None = None
) -> Content:
    """Replace local folders in the card and the lineage by their places on the Hub.

    Args:
        folder: The trained folder.
        content: Its files.
        repo: `user/name` of the repository.
        version: Version that the usage example in the card loads.
        earlier: Places `user/name@version` of earlier stages, by the folders that they were trained in.
        base: `user/name` of an adapter's base; None if the card names it already.

    Returns:
        The files with the new texts.
    """
    card = (folder / "README.md").read_text(encoding="utf-8")
    load = "load_lora_weights" if is_adapter(folder) else "from_pretrained"
    for place in {trained_as(folder), shareable_place(trained_as(folder))}:
        card = card.replace(f'{load}("{place}"', f'{load}("{repo}", revision="{version}"')
    for stage, place in earlier.items():  # the last occurrence of a name belongs to this run
        card = f"`{place}`".join(card.rsplit(f"`{stage}`", 1))
    if base is not None:
        config = run_config(folder)
        card = name_base_on_hub(card, config["base"], base)
        config = yaml.safe_dump(_on_base(config, base), sort_keys=False, allow_unicode=True)
        content = content | {"config.yaml": config.encode()}
    content = content | {"README.md": card.encode()}
    index, own = _index(folder), dict(earlier)
    for record in reversed(index.get("lineage") or ()):
        record["source"] = own.pop(record["source"], record["source"])
    if index:
        content[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    return content


def _on_base(config: dict[str, Any], base: str) -> dict[str, Any]:
    """The configuration of an adapter with the published base, which provides autoencoder and text encoder."""
    parts = {section: dict(config.get(section) or {}) for section in ("autoencoder", "text")}
    parts["autoencoder"] |= {"pretrained": base, "subfolder": "vae"}
    if Path(parts["text"].get("pretrained", "")).name == "text_encoder":
        parts["text"]["pretrained"] = base
    return {**config, **parts, "base": base}


def trained_as(folder: Path) -> str:
    """The folder that a run was trained in, as named in its own files."""
    return Path(run_config(folder)["output_dir"]).as_posix()


def run_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run saved in its folder.

    Raises:
        ValueError: If the file is not the configuration of a run.
    """
    file = folder / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    keys = ("output_dir", "base") if is_adapter(folder) else ("output_dir",)
    missing = [key for key in keys if not isinstance(config, dict) or not isinstance(config.get(key), str)]
    if missing:
        raise ValueError(f"{file} has no `{'`, no `'.join(missing)}`; it must be the configuration of the run.")
    return config
