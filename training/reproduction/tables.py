"""What each table compares: its settings, its measures and the claim, from `tables.yaml`."""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, model_validator

from improved_ldm.trainer.config import RunConfig, Section, parse_config
from reproduction.measures import MEASURES

HERE = Path(__file__).parent
CALL = "call."  # begins the keys that are arguments of the pipeline
Scale = Literal["cpu", "gpu"]
SCALES: tuple[Scale, ...] = get_args(Scale)


class Expectation(Section):
    """A claim as numbers: in a measure, one setting is better than another."""

    measure: str
    better: str
    worse: str

    @property
    def sides(self) -> tuple[str, str]:
        """The two settings."""
        return self.better, self.worse


class Table(Section):
    """One table or figure of the paper.

    Args:
        title: what is compared.
        claim: what is expected, in words.
        source: whether the paper says so, or we expect it.
        trainer: script that trains its models.
        base: overrides that all settings share.
        settings: the rows, each with its overrides.
        cpu: settings that the small scale measures; none leaves the table to the large one.
        measures: the columns, names of `MEASURES`.
        expect: the claim as numbers.
    """

    title: str
    claim: str
    source: Literal["paper", "ours"]
    trainer: Literal["train_t2i", "train_class_conditional"] = "train_t2i"
    base: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, dict[str, Any]]
    cpu: tuple[str, ...] = ()
    measures: tuple[str, ...] = Field(min_length=1)
    expect: tuple[Expectation, ...] = Field(min_length=1)

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
    entries = yaml.safe_load((HERE / "tables.yaml").read_text())
    return {name: Table.model_validate(entry) for name, entry in entries.items()}
