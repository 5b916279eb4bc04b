"""Versions of libraries that do not work together in this package; importing the package refuses them.

An installer respects the lower bounds of the package, but a later `pip install` of one library can break them with
only a warning, and the consequences may be silent.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Need:
    """The versions of a library that work with another library.

    Args:
        library: Name of the library on PyPI.
        versions: Versions that work.
        partner: Library that it has to work with.
        otherwise: Consequence of any other version.
    """

    library: str
    versions: SpecifierSet
    partner: str
    otherwise: str


# Each bound was found by running the tests with both versions; pyproject.toml has the same bounds.
NEEDS = (
    Need("peft", SpecifierSet(">=0.20"), "transformers", "adapters on a CLIP text encoder lose their weights"),
    Need("transformers", SpecifierSet(">=5.6"), "diffusers", "a saved text encoder does not load again"),
)


def check_libraries():
    """Refuse libraries that are known not to work together.

    Raises:
        ImportError: If two versions do not work together; the message names both and the version to install.
    """
    for need in NEEDS:
        if not need.versions.contains(found := version(need.library), prereleases=True):
            raise ImportError(
                f"{need.library} {found} with {need.partner} {version(need.partner)}: {need.otherwise}; "
                f'pip install -U "{need.library}{need.versions}"'
            )


PRIVATE_PARTS = {"diffusers": "~=0.42.0"}  # versions whose private parts are used here


def private_parts(library: str, module: str, *names: str) -> tuple[Any, ...]:
    """Private parts of a library, which any release may move.

    Args:
        library: Name of the library on PyPI and of its package.
        module: Path of the module in the library.
        names: Names of the parts.

    Raises:
        ImportError: If a part is missing; the message names the part, the version and the version to install.
    """
    parts = []
    for name in names:
        try:
            parts.append(getattr(import_module(f"{library}.{module}"), name))
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"{library} {version(library)} has no {library}.{module}.{name}, which improved_ldm needs; "
                f'pip install "{library}{PRIVATE_PARTS[library]}"'
            ) from error
    return tuple(parts)
