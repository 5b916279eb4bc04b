"""The sources that users name: a file, a folder, a Hub id or an `embedded:` name of this package.

Shared files name them without the local folders of this machine.
"""

import itertools
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id
from PIL import Image

ASSETS = Path(__file__).parent / "assets"
MAX_NAME = 255  # bytes per part of a path
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jxl")
EXTENSIONS = {
    "parquet": (".parquet",),
    "webdataset": (".tar",),
    "imagefolder": tuple(suffix for suffix in IMAGES if suffix in Image.registered_extensions()),
}
STATISTICS = ".npz"  # of the features of a reference set
METADATA = ("metadata.jsonl", "metadata.csv")  # the files that caption an image folder


def resolve(source: str) -> str:
    """The folder of an `embedded:` name; any other source is returned unchanged.

    Raises:
        ValueError: If an embedded name does not exist.
    """
    if not source.startswith("embedded:"):
        return source
    folder = ASSETS / source.removeprefix("embedded:")
    if not folder.is_dir():
        names = ", ".join(f"embedded:{path.name}" for path in sorted(ASSETS.iterdir()) if path.is_dir())
        raise ValueError(f"{source!r} does not exist; the package has {names}.")
    return str(folder)


def is_hub_id(source: str | Path | list | None) -> bool:
    """Whether a source has the form of a Hub id and is not a local file or folder."""
    return (
        isinstance(source, str)
        and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) is not None
        and not Path(source).exists()
        and kind_of(source) is None
        and Path(source).suffix != STATISTICS
    )


def kind_of(file: str | Path) -> str | None:
    """The kind of a file by its name: one of `EXTENSIONS`, or None."""
    if os.path.basename(file) in METADATA:
        return "imagefolder"
    suffix = os.path.splitext(file)[1].lower()
    return next((kind for kind, extensions in EXTENSIONS.items() if suffix in extensions), None)


def check_repository_name(name: str, argument: str = "repo"):
    """Raise a ValueError that names the argument if its value is not a repository name with an owner."""
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"`{argument}` is {name!r}; it must be `user/name`: {error}") from error
    if "/" not in name:
        raise ValueError(f"`{argument}` is {name!r}; it must be `user/name`.")


def check_path(path: str | Path) -> str | Path:
    """Return a path unchanged; raise a ValueError if no file system accepts it."""
    if "\0" in str(path):
        raise ValueError("a path has no NUL character")
    if any(len(os.fsencode(part)) > MAX_NAME for part in str(path).split("/")):
        raise ValueError(f"a name in a path has at most {MAX_NAME} bytes")
    return path


def shareable_place(place: str) -> str:
    """A source without its local folders: relative if it is below the working directory, else `.../` and its name.

    Args:
        place: A path, a `file:` URL, a Hub id, an `embedded:` name or a kind with a path, such as `inception:FILE`;
            a relative path is returned unchanged, unless it goes above the home directory.
    """
    path = Path(place)
    if path.is_absolute():
        here = Path.cwd()
        if here in path.parents:
            return path.relative_to(here).as_posix()
        return "..." if path in local_folders() and path.parent == Path(path.anchor) else f".../{path.name}"
    if _climbs_above_home(path):
        return f".../{path.name}"
    kind, colon, file = place.rpartition(":")
    if kind.endswith("file") and file.startswith("///"):
        return shareable_place(file.removeprefix("//"))
    is_url = file.startswith("//")
    return f"{kind}:{shareable_place(file)}" if colon and Path(file).is_absolute() and not is_url else place


def name_of(place: str) -> str:
    """The name of a pipeline's place without any folder: a Hub id or an `embedded:` name, else the path's last part.

    Args:
        place: A path, a `file:` URL, a Hub id or an `embedded:` name.
    """
    is_named = place.startswith("embedded:") or is_hub_id(place)
    return place if is_named else os.path.basename(os.path.abspath(place))


def _climbs_above_home(path: Path) -> bool:
    """Whether a relative path goes up so far that it contains names of the folders above the home directory."""
    up = sum(1 for _ in itertools.takewhile(lambda part: part == "..", path.parts))
    return bool(up) and Path(*path.parts[:up]).resolve() in Path.home().parents


def local_folders() -> list[Path]:
    """The local folders that shared files must not name: home, working and temporary folder."""
    folders = {Path.home(), Path.cwd(), Path(tempfile.gettempdir())}
    folders |= {folder.resolve() for folder in folders}
    return sorted((folder for folder in folders if folder != Path(folder.anchor)), reverse=True)


def local_paths(text: str) -> list[str]:
    """The paths in a text that lead through one of `local_folders`, in order."""
    return _local_path().findall(text)


def shareable_text(text: str) -> str:
    """The text with each path of `local_paths` replaced by its `shareable_place`."""
    return _local_path().sub(lambda found: shareable_place(found[0]), text)


def _local_path() -> re.Pattern[str]:
    folders = "|".join(re.escape(str(folder)) for folder in local_folders()) or "(?!)"
    return re.compile(rf"(?<![\w.~-])(?:{folders})(?![\w.-])[^\s\\\"'`<>|,;:()\[\]{{}}]*")


def shareable_record(value: Any) -> Any:
    """A record for JSON or YAML with local folders removed from its texts."""
    if isinstance(value, dict):
        return {key: shareable_record(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shareable_record(item) for item in value]
    if not isinstance(value, str):
        return value
    return shareable_place(value) if Path(value).is_absolute() else shareable_text(value)
