"""Export the code that a folder needs to load without the package: its pipeline and its denoiser, each in one file.

diffusers can run code saved with a model if the user trusts it, but it copies only single files. Each exported file
therefore contains the package's own modules in the order of their imports, with all other imports at the top.
"""

import ast
import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from improved_ldm.version import __version__

PACKAGE = "improved_ldm"
LICENCE = "Apache-2.0"
LINE_LENGTH = 119
OPTIONAL_LIBRARIES = ("peft",)  # optional in diffusers, which reports if they are needed


def export_code(folder: Path) -> list[Path]:
    """Write the code of a saved pipeline into its folder, so that it loads without this package.

    `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)` then runs it. If
    the package is imported, the folder still loads with the classes of the package.

    Args:
        folder: Folder written by `ImprovedLDMPipeline.save_pretrained`.

    Returns:
        The files: `pipeline.py`, and `improved_ldm.py` in the denoiser's folder.

    Raises:
        ValueError: If the folder is not such a folder.
    """
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8")) if index_file.is_file() else {}
    if index.get("_class_name") != "ImprovedLDMPipeline":
        raise ValueError(f"`folder` is {folder}; it must contain the model_index.json of an ImprovedLDMPipeline.")
    classes = {folder / "pipeline.py": index["_class_name"]}
    for component, entry in index.items():
        if isinstance(entry, list) and entry[0] == PACKAGE:
            classes[folder / component / f"{PACKAGE}.py"] = entry[1]
    for file, class_name in classes.items():
        file.write_text(bundle(getattr(import_module(PACKAGE), class_name)), encoding="utf-8")
    return list(classes)


def bundle(root: type) -> str:
    """The source of a class and of everything that it needs from the package, as one module.

    Raises:
        ValueError: If the modules cannot be merged because a name has different meanings in them.
    """
    modules = list(_in_import_order(root.__module__, set()))
    _check_names(modules)
    head = (
        f"# SPDX-License-Identifier: {LICENCE}\n"
        f'"""{root.__name__} of {PACKAGE} {__version__} in one file, for use without the package.\n\n'
        'Made from the modules of the package that are named below; edit those.\n"""'
    )
    imports = _merged(node for module in modules for node in module.imports)
    return "\n\n".join([head, imports, *(f"\n{module.section()}" for module in modules)]) + "\n"


@dataclass(frozen=True)
class _Module:
    name: str
    docstring: str
    requires: list[str]  # modules of the package
    imports: list[ast.Import | ast.ImportFrom]  # of other libraries
    names: set[str]  # that it defines
    body: str

    def section(self) -> str:
        """The module's code under its name."""
        title = f"{self.name.replace('.', '/')}.py\n{self.docstring}"
        comment = "\n".join(f"# {line}".rstrip() for line in title.splitlines())
        return f"{comment}\n\n\n{self.body}"


def _in_import_order(name: str, seen: set[str]) -> Iterator[_Module]:
    """A module and all modules that it imports, imported ones first, each once."""
    seen.add(name)
    module = _read(name)
    for required in module.requires:
        if required not in seen:
            yield from _in_import_order(required, seen)
    yield module


def _read(name: str) -> _Module:
    source = Path(find_spec(name).origin).read_text(encoding="utf-8")
    tree = ast.parse(source)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    own = [node for node in ast.walk(tree) if _is_own(node)]
    for node in own:
        aliased = any(alias.asname for alias in node.names)
        if node not in imports or isinstance(node, ast.Import) or aliased or node.module == PACKAGE:
            raise ValueError(
                f"{name}, line {node.lineno}: `{ast.unparse(node)}`; a module that is exported must import from the "
                "package at the top, from the package's modules, and without renaming."
            )
    lines = source.splitlines()
    for node in [tree.body[0], *imports]:  # the docstring comes first
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return _Module(
        name=name,
        docstring=ast.get_docstring(tree),
        requires=[node.module for node in own],
        imports=[node for node in imports if node not in own],
        names={defined for node in tree.body for defined in _defined(node)},
        body="\n".join(lines).strip(),
    )


def _is_own(node: ast.AST) -> bool:
    """Whether a node is an import from the package."""
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or node.module.partition(".")[0] == PACKAGE
    return isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == PACKAGE for alias in node.names)


def _defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif not isinstance(node, ast.Import | ast.ImportFrom):
        yield from (
            part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
        )


def _check_names(modules: list[_Module]):
    """Raise a ValueError if a name has different meanings in the modules."""
    meanings = {}
    for module in modules:
        found = {name: f"{module.name}.{name}" for name in module.names}
        for node in module.imports:
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found |= {alias.asname or alias.name: origin + alias.name for alias in node.names}
        for name, meaning in found.items():
            if meanings.setdefault(name, meaning) != meaning:
                raise ValueError(
                    f"`{name}` is both {meanings[name]} and {meaning}; in one file, it can only have one meaning."
                )


def _merged(nodes: Iterable[ast.Import | ast.ImportFrom]) -> str:
    """Merged imports: the standard library, other libraries, and optional libraries."""
    plain, named = set(), defaultdict(set)
    for node in nodes:
        aliases = {ast.unparse(alias) for alias in node.names}
        if isinstance(node, ast.Import):
            plain |= aliases
        else:
            named[node.module] |= aliases
    statements = [(name, f"import {name}") for name in sorted(plain)]
    statements += [(module, _import_statement(module, sorted(names))) for module, names in sorted(named.items())]
    groups = defaultdict(list)
    for module, statement in statements:
        library = module.partition(".")[0]
        group = "optional" if library in OPTIONAL_LIBRARIES else library in sys.stdlib_module_names
        groups[group].append(statement)
    if "optional" in groups:
        groups["optional"] = ["try:", *textwrap.indent("\n".join(groups["optional"]), "    ").splitlines()]
        groups["optional"] += ["except ImportError:", "    pass"]
    return "\n\n".join("\n".join(groups[group]) for group in (True, False, "optional") if group in groups)


def _import_statement(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    return line if len(line) <= LINE_LENGTH else f"from {module} import (\n    " + ",\n    ".join(names) + ",\n)"
