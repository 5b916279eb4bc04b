"""The published models and their numbers, from `models.yaml`."""

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from improved_ldm.convert.sources import SOURCES
from improved_ldm.settings import Section, parse_config
from improved_ldm.trainer.config import RunConfig

HERE = Path(__file__).parent


class Published(Section):
    """A published model, an entry of `models.yaml`."""

    recipe: str
    """File in configs/published/, without its ending."""
    source: str
    """Implementation whose layout the weights have, a key of `SOURCES`."""
    weights: str | None = None
    """URL, or a Hub id and a file; none if the weights are not published."""
    config: dict[str, Any] = Field({})
    """Constructor arguments of the implementation."""
    autoencoder: str | None = None
    """Autoencoder to decode with; default: that of the recipe."""
    sampling: dict[str, Any] = Field({})
    """Keys of `sampling` that differ from the recipe."""
    numbers: dict[str, float]
    """Published scores, by the names of `training/evaluate.py`."""
    origin: str
    """Where the numbers are published."""

    @field_validator("source")
    @classmethod
    def _is_a_source(cls, source: str):
        if source not in SOURCES:
            raise ValueError(f"it must be one of {', '.join(SOURCES)}")
        return source

    def run_config(self, autoencoder: str | None) -> RunConfig:
        """The recipe with the changes of this entry."""
        changes = {f"sampling.{key}": value for key, value in self.sampling.items()}
        if autoencoder or self.autoencoder:
            changes["autoencoder.pretrained"] = autoencoder or self.autoencoder
        arguments = [f"--{key}={json.dumps(value)}" for key, value in changes.items()]
        return parse_config(RunConfig, arguments, HERE.parent / "configs" / "published" / f"{self.recipe}.yaml")


def load_entries() -> dict[str, Published]:
    """The published models by name."""
    entries = yaml.safe_load((HERE / "models.yaml").read_text(encoding="utf-8"))
    return {name: Published.model_validate(entry) for name, entry in entries.items()}
