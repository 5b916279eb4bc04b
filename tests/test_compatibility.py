"""Compatible versions of other libraries: which are refused, and what the documentation states."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from improved_ldm.compatibility import NEEDS, PRIVATE_PARTS, check_libraries, private_parts

ROOT = Path(__file__).parents[1]
WRONG = {"peft": "0.19.1", "transformers": "5.5.4"}


@pytest.fixture
def install(tmp_path):
    """Writes the metadata of another version of a library to a folder for `sys.path`, and returns the folder."""

    def make(library, version):
        record = tmp_path / f"{library}-{version}.dist-info"
        record.mkdir()
        text = f"Metadata-Version: 2.1\nName: {library}\nVersion: {version}\n"
        (record / "METADATA").write_text(text, encoding="utf-8")
        return tmp_path

    return make


@pytest.fixture(scope="module")
def requirements():
    """The requirements in pyproject.toml, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(line) for group in groups for line in group]
    return {requirement.name: requirement for requirement in found if requirement.name != project["name"]}


@pytest.mark.parametrize("need", NEEDS, ids=[need.library for need in NEEDS])
def test_versions_that_do_not_go_together_are_named_with_what_to_do(install, monkeypatch, need):
    monkeypatch.syspath_prepend(install(need.library, WRONG[need.library]))
    message = rf'^{need.library} {WRONG[need.library]} with {need.partner} \d.*; pip install -U "{need.library}>='
    with pytest.raises(ImportError, match=message):
        check_libraries()


@pytest.mark.parametrize(("module", "name"), [("hooks._helpers", "Gone"), ("hooks._gone", "TransformerBlockRegistry")])
def test_private_parts_that_are_gone_are_named_with_what_to_install(module, name):
    message = rf'^diffusers \d\S+ has no diffusers\.{module}\.{name}, .*; pip install "diffusers~=\d'
    with pytest.raises(ImportError, match=message):
        private_parts("diffusers", module, name)


def test_the_installed_version_has_its_private_parts(requirements):
    for library, versions in PRIVATE_PARTS.items():
        assert version(library) in SpecifierSet(versions)
        assert requirements[library].specifier.contains(version(library))


def test_denoisers_import_private_parts_in_one_place():
    for file in (ROOT / "improved_ldm" / "models").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if name.startswith("_") and name != "__version__"], file


def test_the_package_is_not_imported_with_them(install):
    path = os.pathsep.join([str(install("peft", "0.19.1")), str(ROOT)])
    command = [sys.executable, "-c", "import improved_ldm"]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("ImportError: peft 0.19.1 with transformers ")


def test_the_bounds_of_the_package_keep_them_out(requirements):
    for need in NEEDS:
        assert str(need.versions) in str(requirements[need.library].specifier)


def test_the_listed_environments_are_the_lowest_versions_and_newer_ones(requirements):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w[\w-]*) \| (\S+ \| \S+) \|$", text, re.MULTILINE))
    assert rows.keys() == requirements.keys()
    for name, requirement in requirements.items():
        floor, newest = map(Version, rows[name].split(" | "))
        bounds = {bound.operator: Version(bound.version) for bound in requirement.specifier}
        assert bounds[">="] == floor <= newest, name
        assert requirement.specifier.contains(newest), name
