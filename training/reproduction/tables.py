"""What each table compares: its settings, its measures and the claim, from `tables.yaml`."""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, model_validator

from improved_ldm.settings import Section, parse_config
from improved_ldm.trainer.config import RunConfig
from reproduction.measures import MEASURES

HERE = Path(__file__).parent
CALL = "call."  # begins the keys that are arguments of the pipeline
Scale = Literal["cpu", "gpu"]
SCALES: tuple[Scale, ...] = get_args(Scale)


class Expectation(Section):
    """A claim as numbers: in a measure, one setting is better than another."""

    measure: str
    """One of the measures of the table."""
    better: str
    """Setting that is better in it."""
    worse: str
    """Setting that is worse in it."""

    @property
    def sides(self) -> tuple[str, str]:
        """The two settings."""
        return self.better, self.worse


class Table(Section):
    """One table or figure of the paper."""

    title: str
    """What is compared."""
    claim: str
    """What is expected, in words."""
    source: Literal["paper", "ours", "recipe"]
    """Whether the paper says so, we expect it, or the authors of a published recipe say so."""
    trainer: Literal["train_t2i", "train_class_conditional"] = "train_t2i"
    """Script that trains its models."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Overrides that all settings share."""
    settings: dict[str, dict[str, Any]]
    """The rows, each with its overrides."""
    cpu: tuple[str, ...] = ()
    """Settings that the small scale measures; none leaves the table to the large one."""
    measures: tuple[str, ...] = Field(min_length=1)
    """The columns, names of `MEASURES`."""
    expect: tuple[Expectation, ...] = Field(min_length=1)
    """The claim as numbers."""

    @model_validator(mode="after")
    def _names_exist(self):
        named = {*self.cpu, *(name for claim in self.expect for name in claim.sides)}
        if named - self.settings.keys():
            raise ValueError(f"settings {sorted(named - self.settings.keys())} are not among {list(self.settings)}.")
        if set(self.measures) - MEASURES.keys():
            raise ValueError(f"`measures` is {self.measures}; they must be of {list(MEASURES)}.")
        if {claim.measure for claim in self.expect} - set(self.measures):
            raise ValueError(f"`expect` speaks of measures that are not among {self.measures}.")
        return self

    def settings_at(self, scale: Scale) -> list[str]:
        """The settings that a scale measures.

        Raises:
            ValueError: if it measures none of them.
        """
        names = list(self.cpu) if scale == "cpu" else list(self.settings)
        if not names:
            raise ValueError(f"`{self.title}` has no settings at scale {scale!r}; `--scale gpu` measures all of them.")
        return names

    def run_config(self, setting: str, scale: Scale, further: list[str]) -> RunConfig:
        """The training run behind a setting.

        Args:
            setting: one of `settings`.
            scale: whose configuration file it starts from.
            further: `--section.key value` arguments that win.
        """
        overrides = {**self.base, **self.settings[setting]}
        arguments = [f"--{key}={json.dumps(value)}" for key, value in overrides.items() if not key.startswith(CALL)]
        return parse_config(RunConfig, [*arguments, *further], HERE / f"{scale}.yaml")

    def call(self, setting: str) -> dict[str, Any]:
        """Arguments of the pipeline under a setting."""
        values = self.settings[setting].items()
        return {key.removeprefix(CALL): value for key, value in values if key.startswith(CALL)}


def load_tables() -> dict[str, Table]:
    """All tables by name."""
    entries = yaml.safe_load((HERE / "tables.yaml").read_text(encoding="utf-8"))
    return {name: Table.model_validate(entry) for name, entry in entries.items()}
