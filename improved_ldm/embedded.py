"""The models and images that ship with the package, by name."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def resolve(place: str) -> str:
    """The folder of an `embedded:` name; any other place as it is.

    Raises:
        ValueError: for an embedded name that does not exist.
    """
    if not place.startswith("embedded:"):
        return place
    folder = ASSETS / place.removeprefix("embedded:")
    if not folder.is_dir():
        names = ", ".join(f"embedded:{path.name}" for path in sorted(ASSETS.iterdir()) if path.is_dir())
        raise ValueError(f"{place!r} is not there; the package has {names}.")
    return str(folder)
