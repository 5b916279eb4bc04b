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
RECIPES = HERE.parent / "configs" / "published"
CALL = "call."  # begins the keys that are arguments of the pipeline
RECIPE, TRAINER = "recipe", "trainer"  # keys of a setting: its file in `configs/published`, and another script
Scale = Literal["cpu", "gpu"]
Trainer = Literal["train_t2i", "train_class_conditional"]
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
    source: Literal["paper", "ours", "recipe", "own"]
    """Whether the paper says so, we expect it of a table of the paper, the authors of a published recipe say so, or we
    expect it of a comparison that the paper does not have."""
    trainer: Trainer = "train_t2i"
    """Script that trains its models."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Overrides that all settings share."""
    settings: dict[str, dict[str, Any]]
    """The rows, each with its overrides."""
    columns: tuple[str, ...] = ()
    """Columns of a grid that the settings fill, each named by its row, a comma and its column."""
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
        if self.columns and {name.rpartition(", ")[2] for name in self.settings} != set(self.columns):
            raise ValueError(f"`columns` is {self.columns}; they must be what the names of the settings end with.")
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
            scale: whose configuration file it starts from, or which changes its recipe.
            further: `--section.key value` arguments that win.
        """
        overrides, file = {**self.base, **self.settings[setting]}, HERE / f"{scale}.yaml"
        if RECIPE in overrides:
            overrides, file = {**_at_size(scale), **overrides}, RECIPES / f"{overrides[RECIPE]}.yaml"
        given = [key for key in overrides if key not in (RECIPE, TRAINER) and not key.startswith(CALL)]
        arguments = [f"--{key}={json.dumps(overrides[key])}" for key in given]
        return parse_config(RunConfig, [*arguments, *further], file)

    def trainer_of(self, setting: str) -> Trainer:
        """Script that trains the model of a setting."""
        return self.settings[setting].get(TRAINER, self.trainer)

    def call(self, setting: str, config: RunConfig) -> dict[str, Any]:
        """Arguments of the pipeline under a setting; a recipe has its own guidance and number of steps.

        Args:
            setting: one of `settings`.
            config: its training run.
        """
        of_recipe = {"guidance_scale", "num_inference_steps"} if RECIPE in self.settings[setting] else set()
        values = self.settings[setting].items()
        given = {key.removeprefix(CALL): value for key, value in values if key.startswith(CALL)}
        return config.sampling.model_dump(include=of_recipe) | given


def _at_size(scale: Scale) -> dict[str, Any]:
    """The keys of a recipe that a scale changes, with their values."""
    sections = yaml.safe_load((HERE / f"recipes_{scale}.yaml").read_text(encoding="utf-8"))
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def load_tables() -> dict[str, Table]:
    """All tables by name."""
    entries = yaml.safe_load((HERE / "tables.yaml").read_text(encoding="utf-8"))
    return {name: Table.model_validate(entry) for name, entry in entries.items()}
