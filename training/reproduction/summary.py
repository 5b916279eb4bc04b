"""The whole suite in one table: what the paper claims, and what is measured here."""

import json
from pathlib import Path
from typing import Any

from reproduction.measures import MEASURES
from reproduction.report import interval_text
from reproduction.tables import SCALES, Expectation, Table

HEADER = """# The paper's tables in miniature

Each claim of the paper, re-run at a size that its reader can afford. `agrees` and `disagrees` mean that the interval
of the difference over the seeds leaves out zero; `unclear` that it does not. A claim that fails at this size says
something of this size. `python training/reproduce.py TABLE` measures a table, `python training/reproduce.py summary`
writes this page.

| table | claim | measure | better | against | scale | verdict |
| --- | --- | --- | --- | --- | --- | --- |
"""


def write_summary(tables: dict[str, Table], results: Path):
    """Write `README.md` of the results from the records that are there."""
    rows = [row for name, table in tables.items() for row in _rows(name, table, results / name)]
    (results / "README.md").write_text(HEADER + "\n".join([*rows, _switch_row(results / "transfer")]) + "\n")


def _rows(name: str, table: Table, folder: Path) -> list[str]:
    records = {scale: folder / f"{scale}.json" for scale in SCALES if (folder / f"{scale}.json").exists()}
    if not records:
        return [_not_measured(name, table, expectation) for expectation in table.expect]
    rows = []
    for scale, file in records.items():
        record = json.loads(file.read_text())
        rows += [_measured(name, table, scale, record, expectation) for expectation in record["expectations"]]
    return rows


def _not_measured(name: str, table: Table, expectation: Expectation) -> str:
    title = MEASURES[expectation.measure].title
    return _row(name, table.claim, title, expectation.better, expectation.worse, "", "not measured")


def _measured(name: str, table: Table, scale: str, record: dict[str, Any], expectation: dict[str, Any]) -> str:
    measure = expectation["measure"]
    sides = [
        f"{setting}: {interval_text(record['settings'][setting][measure])}"
        for setting in (expectation["better"], expectation["worse"])
    ]
    apart = "" if expectation["intervals_apart"] else ", intervals overlap"
    link = f"[{name}]({name}/{scale}.md)"
    return _row(link, table.claim, MEASURES[measure].title, *sides, scale, f"{expectation['verdict']}{apart}")


def _switch_row(folder: Path) -> str:
    claim = "Resampled positions and rescaled noise reach the default's FID after a switch with fewer images."
    file = folder / "transfer.json"
    if not file.exists():
        return _row("transfer", claim, "FID", "both", "default", "", "not measured")
    arms = json.loads(file.read_text())["arms"]
    gain = arms["both"]["last_fid_minus_default"]
    share = arms["both"]["as_share_of_budget"]["mean"]
    sides = [f"{name}: {arms[name]['fid']['mean'][-1]:.1f} at the end" for name in ("both", "default")]
    verdict = "agrees" if gain["high"] < 0 else "disagrees" if gain["low"] > 0 else "unclear"
    return _row(
        "[transfer](transfer/transfer.png)", claim, "FID", *sides, "cpu", f"{verdict}, {share:.0%} of the images"
    )


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
