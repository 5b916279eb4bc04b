"""The subpackages of the library and their allowed imports and names, checked in the source."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import improved_ldm
from improved_ldm.conditioning.control import CONTROL_INPUTS

PACKAGE = "improved_ldm"
LIBRARY = Path(improved_ldm.__file__).parent
SCRIPTS = LIBRARY.parent / "training"
MAX_LINES = 350

# Modules that every subpackage may import; they import only one another.
HELPERS = {
    *("autoencoder", "bounds", "compatibility", "exits", "lineage", "loading", "manifest", "naming", "output"),
    *("picture_text", "places", "plain_yaml", "provenance", "resolution", "seeds", "settings", "settings_help"),
    "version",
}
# The other subpackages, and what each may import besides these modules.
ARROWS = {
    "conditioning": set(),
    "diffusion": set(),
    "models": {"conditioning", "diffusion"},
    "convert": {"models"},
    "adapters": {"convert", "models"},
    "lora": {"adapters", "models"},
    "sampling": {"conditioning", "diffusion", "models"},
    "pipeline": {"conditioning", "sampling", "lora", "models"},
    "open_pipeline": {"pipeline"},
    "__init__": {"models", "pipeline"},
    "__main__": set(),
    "transfer": {"conditioning", "diffusion", "models", "pipeline"},
    "data": {"conditioning"},
    "evaluation": {"conditioning", "data", "open_pipeline", "sampling", "pipeline"},
    "hub": {"conditioning", "data", "sampling", "evaluation", "pipeline"},
    "trainer": {
        *("conditioning", "data", "diffusion", "evaluation", "hub", "models", "open_pipeline", "pipeline", "sampling"),
        "transfer",
    },
    "demo": {"conditioning", "open_pipeline", "pipeline"},
}
# The only files that name control variables; all others read them from the table.
NAMES_CONTROL = {
    "conditioning/control.py",  # the table
    "conditioning/control_embedding.py",  # the sizes of published models
    "data/cuts.py",  # the geometry of a record
    "data/transforms.py",  # the measuring
    "evaluation/obedience.py",  # the tests
    "pipeline.py",  # the signature
    "trainer/clip_model.py",  # an argument of an image processor
}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(LIBRARY.parent).with_suffix("").parts)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


MODULES = {module_of(file): file for file in files(LIBRARY)}


def imported(file: Path) -> Iterator[str]:
    """Names of all modules that a file imports anywhere."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: a relative import"
            inner = {name for alias in node.names if (name := f"{node.module}.{alias.name}") in MODULES}
            yield from inner or [node.module]


def room_of(module: str) -> str:
    """The subpackage of a module: `models` for `improved_ldm.models.dit`, `__init__` for the package itself."""
    return [*module.split("."), "__init__"][1]


def own(names: Iterator[str]) -> list[str]:
    return [name for name in names if name.partition(".")[0] == PACKAGE]


@pytest.mark.parametrize("room", sorted({room_of(module) for module in MODULES}))
def test_a_room_imports_what_is_below_it(room):
    assert room in HELPERS or room in ARROWS, f"{room} is new: say in `ARROWS` what it may import"
    allowed = HELPERS | ARROWS.get(room, set()) | {room}
    for module, file in MODULES.items():
        if room_of(module) == room:
            wrong = {name for name in own(imported(file)) if room_of(name) not in allowed}
            assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_the_arrows_of_the_rooms_make_no_circle():
    tuple(TopologicalSorter(ARROWS).static_order())


def test_no_modules_import_each_other_in_a_circle():
    packages = {module.removesuffix(".__init__"): module for module in MODULES}
    graph = {
        module: {packages.get(name, name) for name in own(imported(file))} - {module}
        for module, file in MODULES.items()
    }
    tuple(TopologicalSorter(graph).static_order())


def test_the_library_never_imports_its_scripts():
    scripts = {SCRIPTS.name, *(file.stem for file in files(SCRIPTS)), f"{PACKAGE}.{SCRIPTS.name}"} - {"__init__"}
    for module, file in MODULES.items():
        wrong = {name for name in imported(file) if name.partition(".")[0] in scripts or name in scripts}
        assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_nothing_below_the_trainer_knows_accelerate():
    for module, file in MODULES.items():
        knows = "accelerate" in {name.partition(".")[0] for name in imported(file)}
        assert not knows or room_of(module) == "trainer", module


@pytest.mark.parametrize("folder", [LIBRARY, SCRIPTS], ids=lambda folder: folder.name)
def test_files_are_short(folder):
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files(folder)}
    assert not {file: length for file, length in lengths.items() if length > MAX_LINES}


def names_in(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names, attributes, arguments, keywords and strings of a file with their lines, without called methods."""
    methods = {
        id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)
    }  # because tensors have a method `flip`
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)) | ast.Constant(value=str(name)):
                yield name, node.lineno
            case ast.Attribute(attr=name) if id(node) not in methods:
                yield name, node.lineno


@pytest.mark.parametrize("folder", [LIBRARY, SCRIPTS], ids=lambda folder: folder.name)
def test_control_variables_are_named_in_the_table_only(folder):
    for file in files(folder):
        if file.relative_to(folder).as_posix() not in NAMES_CONTROL:
            found = [f"line {line}: {name}" for name, line in names_in(tree_of(file)) if name in CONTROL_INPUTS]
            assert not found, f"{file}: {found}"


@pytest.mark.parametrize("template", ["card_template.md", "adapter_card_template.md"])
def test_templates_of_cards_name_no_control_variable(template):
    text = (LIBRARY / "hub" / template).read_text(encoding="utf-8")
    assert not {name for name in CONTROL_INPUTS if f"`{name}`" in text or f'"{name}"' in text}
