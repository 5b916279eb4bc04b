"""The whole suite in one table: what the paper claims, and what is measured here."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from reproduction.intervals import compare
from reproduction.measures import MEASURES
from reproduction.report import interval_text
from reproduction.tables import SCALES, Expectation, Table

HEADER = """# The paper's tables at a small scale

What the paper claims, re-run at a scale that every reader can afford. Where the paper has a table whose numbers are
not available to us, the claim is our expectation (`ours`); comparisons by `own` are not in the paper. `agrees` and
`disagrees` mean that the 95% interval of the paired difference over the seeds excludes zero, `unclear` that it
includes zero. The comparisons are not corrected for their number. A result at this scale does not settle the claim at
full scale.
`python training/reproduce.py TABLE` measures a table, `python training/reproduce.py summary` writes this page.

"""
ABOUT = "about.md"  # of a folder of results: a paragraph on how they were made
TABLE_HEAD = """| table | claim | by | measure | better | against | scale | verdict |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def write_summary(tables: dict[str, Table], results: Path):
    """Write `README.md` of the results from the records that are there."""
    records = {name: _records(results / name) for name in tables}
    rows = [row for name, table in tables.items() for row in _rows(name, table, records[name])]
    lines = "\n".join(rows)
    file = results / ABOUT
    about = f"{file.read_text(encoding='utf-8')}\n" if file.exists() else ""
    (results / "README.md").write_text(f"{HEADER}{about}{TABLE_HEAD}{lines}\n{_mixed(records)}", encoding="utf-8")


def _records(folder: Path) -> dict[str, Any]:
    """The records of a table by scale."""
    files = {scale: folder / f"{scale}.json" for scale in SCALES}
    return {scale: json.loads(file.read_text(encoding="utf-8")) for scale, file in files.items() if file.exists()}


def _mixed(records: dict[str, dict[str, Any]]) -> str:
    """A paragraph on the tables that were measured differently; "" if all were measured alike."""
    groups = {}
    for name, scales in records.items():
        for scale, record in scales.items():
            measured = record["measured_with"]
            if "features" not in measured:
                continue
            what = f"{measured['samples']} samples; reference {measured['reference']}; {measured['features']['name']}"
            groups.setdefault(what, []).append(f"{name} ({scale})")
    if len(groups) < 2:
        return ""
    lines = [f"- {what}: {', '.join(names)}." for what, names in groups.items()]
    return "\n".join(["\nFIDs of these groups of tables do not compare with each other:\n", *lines, ""])


def _rows(name: str, table: Table, records: dict[str, Any]) -> list[str]:
    """A row for every comparison of a table at every scale that has it, or one that says that none has."""
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


def verdict_text(found: dict[str, Any]) -> str:
    """What `compare` found, in words."""
    return found["verdict"] + ("" if found["intervals_apart"] else ", intervals overlap")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
