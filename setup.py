"""Puts the scripts of `training/` into the package as `improved_ldm.training`; all else stands in pyproject.toml."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

SCRIPTS = "improved_ldm.training"
OF_THE_REPOSITORY = ("benchmark", "measure_emoji", "published", "render_cards", "reproduce")  # need its folders


class BuildWithScripts(build_py):
    """Leaves out the scripts that only a clone can run."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if package != SCRIPTS or module[1] not in OF_THE_REPOSITORY]


setup(
    packages=[*find_packages(include=["improved_ldm*"]), SCRIPTS],
    package_dir={SCRIPTS: "training"},
    cmdclass={"build_py": BuildWithScripts},
)
