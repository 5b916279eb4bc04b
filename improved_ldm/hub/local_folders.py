"""Keep paths of the local machine out of published files."""

import json
from pathlib import Path

import yaml
from PIL import Image

from improved_ldm.hub.content import TEXT_SAMPLE, Content
from improved_ldm.loading import without_origins
from improved_ldm.places import local_paths, shareable_record, shareable_text

# The records of a run. Other files belong to the user or to components and are not rewritten.
TEXTS = ("README.md",)
RECORDS = ("config.yaml", "stages.yaml", "metrics.json", "evaluation.json", "model_index.json", "scores.yaml")


def rewrite_records(content: Content) -> Content:
    """Replace local folders in the records of a run by their `shareable_place`.

    Args:
        content: Files by their path in the repository.

    Returns:
        The records that change.
    """
    return {path: text.encode() for path, source in content.items() if (text := _rewrite(path, source))}


def _rewrite(path: str, source: Path | bytes) -> str | None:
    """The text of a file without local folders; None if it does not change."""
    name = Path(path).name
    is_config = name.endswith("config.json")
    if name not in (*TEXTS, *RECORDS) and not is_config:
        return None
    text = (source if isinstance(source, bytes) else source.read_bytes()).decode("utf-8")
    if name in TEXTS:
        shared = shareable_text(text)
        return shared if shared != text else None
    is_yaml = name.endswith(".yaml")
    record = yaml.safe_load(text) if is_yaml else json.loads(text)
    shared = without_origins(record) if is_config else shareable_record(record)
    if shared == record:
        return None
    return (
        yaml.safe_dump(shared, sort_keys=False, allow_unicode=True) if is_yaml else json.dumps(shared, indent=2) + "\n"
    )


def check_names_no_folders(content: Content):
    """Raise a ValueError if a file names a folder of this machine. The message states the file and the folder.

    Args:
        content: Files to publish.
    """
    for path, source in content.items():
        named = [Path(place) for text in _texts(path, source) for place in local_paths(text)]
        found = next((str(place) for place in named if place.parent != Path(place.anchor)), None)
        if found is not None:  # a top-level folder such as `/tmp` reveals nothing and is a token of many tokenizers
            raise ValueError(f"{path} names a path on this machine, {found!r}; remove it, or name it without folders.")


def _texts(path: str, source: Path | bytes) -> list[str]:
    """The readable texts of a file: its content, the header of weights, or the metadata of a picture."""
    if isinstance(source, bytes):
        return [source.decode("utf-8", "replace")]
    if path.endswith(".safetensors"):
        with source.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return [file.read(min(length, source.stat().st_size)).decode("utf-8", "replace")]
    try:
        with Image.open(source) as image:
            return [str(value) for value in image.info.values()]
    except OSError:  # not a picture
        content = source.read_bytes()
    return [] if b"\0" in content[:TEXT_SAMPLE] else [content.decode("utf-8", "replace")]
