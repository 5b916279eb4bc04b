"""The whole suite in one table: what the paper claims, and what is measured here."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from reproduction.intervals import compare, mean_and_interval
from reproduction.measures import MEASURES
from reproduction.report import interval_text
from reproduction.tables import SCALES, Expectation, Table

HEADER = """# The paper's tables in miniature

What the paper claims, or what we expect where it has such a table and we do not have its numbers, re-run at a size
that a reader can afford. `agrees` and `disagrees` mean that the 95% interval of the paired difference over the seeds
leaves out zero, `unclear` that it does not; the comparisons are not corrected for their number. A claim that fails at
this size says something of this size. `python training/reproduce.py TABLE` measures a table,
`python training/reproduce.py summary` writes this page.

| table | claim | by | measure | better | against | scale | verdict |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def write_summary(tables: dict[str, Table], results: Path):
    """Write `README.md` of the results from the records that are there."""
    rows = [row for name, table in tables.items() for row in _rows(name, table, results / name)]
    (results / "README.md").write_text(HEADER + "\n".join([*rows, _switch_row(results / "transfer")]) + "\n")


def _rows(name: str, table: Table, folder: Path) -> list[str]:
    """A row for every comparison of a table at every scale that has it, or one that says that none has."""
    records = {scale: json.loads(file.read_text()) for scale in SCALES if (file := folder / f"{scale}.json").exists()}
    rows = []
    for expectation in table.expect:
        measure = MEASURES[expectation.measure].title
        claim = (table.claim, table.source, measure)
        found = [
            _row(f"[{name}]({name}/{scale}.md)", *claim, *_measured(record, expectation))
            for scale, record in records.items()
            if set(expectation.sides) <= record["settings"].keys()
        ]
        rows += found or [_row(name, *claim, *expectation.sides, "", "not measured")]
    return rows


def _measured(record: dict[str, Any], expectation: Expectation) -> list[str]:
    """The two sides of a comparison, the scale and the verdict."""
    values = [record["settings"][setting][expectation.measure] for setting in expectation.sides]
    sides = [f"{name}: {interval_text(value)}" for name, value in zip(expectation.sides, values, strict=True)]
    if None in values:
        return [*sides, record["scale"], "not read"]
    better, worse = (np.array(value["seeds"]) for value in values)
    found = compare(better, worse, MEASURES[expectation.measure].lower_is_better)
    return [*sides, record["scale"], verdict_text(found)]


def _switch_row(folder: Path) -> str:
    claim = "Resampled positions and rescaled noise give a lower FID after a switch of resolution."
    file = folder / "transfer.json"
    if not file.exists():
        return _row("transfer", claim, "paper", "FID", "both", "default", "", "not measured")
    arms = json.loads(file.read_text())["arms"]
    last = {name: np.array([fids[-1] for fids in arms[name]["fid_of_seeds"].values()]) for name in ("both", "default")}
    found = compare(last["both"], last["default"], lower_is_better=True)
    sides = [f"{name}: {interval_text(mean_and_interval(values))}" for name, values in last.items()]
    apart = "" if found["intervals_apart"] else ", intervals overlap"
    return _row(
        "[transfer](transfer/transfer.png)", claim, "paper", "FID", *sides, "cpu", f"{found['verdict']}{apart}"
    )


def verdict_text(found: dict[str, Any]) -> str:
    """What `compare` found, in words."""
    return found["verdict"] + ("" if found["intervals_apart"] else ", intervals overlap")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
