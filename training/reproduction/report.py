"""A measured table as JSON, Markdown and a plot."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from improved_ldm.provenance import write_json
from reproduction.curves import curve_lines, plot_curves
from reproduction.intervals import DESCRIPTION, compare, mean_and_interval
from reproduction.measures import MEASURES
from reproduction.tables import CALL, RECIPE, Table

matplotlib.use("Agg")
from matplotlib import pyplot

SOURCES = {
    "paper": "the paper's claim",
    "ours": "our expectation; the paper has such a table",
    "own": "our expectation; the paper has no such table",
    "recipe": "the claim of a published recipe",
}
Values = dict[str, dict[str, list[float | None]]]  # setting → measure → a value a seed


def build_record(table: Table, values: Values, about: dict[str, Any]) -> dict[str, Any]:
    """The record of a measured table.

    Args:
        table: what is compared.
        values: setting → measure → a value a seed, None where the model does not read what it is about.
        about: scale, seeds, command, device, time, and what the measures depend on.
    """
    return {
        "title": table.title,
        "claim": table.claim,
        "source": table.source,
        **({"columns": list(table.columns)} if table.columns else {}),
        **about,
        "interval": DESCRIPTION,
        "settings": {
            name: {
                "overrides": table.settings[name],
                **{measure: _of_seeds(seeds) for measure, seeds in measures.items()},
            }
            for name, measures in values.items()
        },
        "expectations": [
            {**expectation.model_dump(), **_checked(values, **expectation.model_dump())}
            for expectation in table.expect
            if all(None not in values.get(name, {}).get(expectation.measure, [None]) for name in expectation.sides)
        ],
    }


def _of_seeds(seeds: list[float | None]) -> dict[str, Any] | None:
    return None if None in seeds else {"seeds": seeds, **mean_and_interval(np.array(seeds))}


def _parameters(record: dict[str, Any]) -> list[str]:
    """A line on the sizes of the models, where they differ."""
    sizes = record["parameters"]
    if len(set(sizes.values())) == 1:
        return []
    return ["Parameters: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()) + ".", ""]


def _checked(values: Values, measure: str, better: str, worse: str) -> dict[str, Any]:
    arrays = (np.array(values[setting][measure]) for setting in (better, worse))
    return compare(*arrays, MEASURES[measure].lower_is_better)


def write_report(record: dict[str, Any], folder: Path, scale: str):
    """Write `SCALE.json`, `SCALE.md` and `SCALE.png` of a table into its folder."""
    write_json(folder / f"{scale}.json", record)
    (folder / f"{scale}.md").write_text(markdown(record, f"{scale}.png"), encoding="utf-8")
    draw = plot_curves if has_curve(record) else plot
    draw(record, folder / f"{scale}.png")


def markdown(record: dict[str, Any], picture: str) -> str:
    """The table, what it says of the claim, and how it was made."""
    measures = measures_of(record)
    titles = [f"{MEASURES[name].title} {'↓' if MEASURES[name].lower_is_better else '↑'}" for name in measures]
    rows = {
        setting: [interval_text(values[name]) for name in measures] for setting, values in record["settings"].items()
    }
    table = _grids(record["columns"], titles, rows) if "columns" in record else _markdown_table(titles, rows)
    lines = [
        f"# {record['title']}",
        "",
        f"{record['claim']} ({SOURCES[record['source']]})",
        "",
        *table,
        *(f"- {expectation_text(expectation)}" for expectation in record["expectations"]),
        *(curve_lines(record) if has_curve(record) else []),
        "",
        f"![{record['title']}]({picture})",
        "",
        *([f"![Samples of the same prompts and seeds]({record['picture']})", ""] if "picture" in record else []),
        *_real(record),
        *_parameters(record),
        f"Mean over {len(record['seeds'])} seeds and {record['interval']}. {_features(record)}reference: "
        f"{record['measured_with']['reference']}; {_sampled(record)}{record['device']}; "
        f"{record['seconds_a_run']:.0f} seconds per run.",
        "",
        *([record["note"], ""] if "note" in record else []),
        f"    {record['command']}",
        "",
    ]
    return "\n".join(lines)


def _markdown_table(titles: list[str], rows: dict[str, list[str]]) -> list[str]:
    """The lines of a table whose rows have names."""
    body = ("| " + " | ".join([name, *cells]) + " |" for name, cells in rows.items())
    return ["| | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles), *body, ""]


def _grids(columns: list[str], titles: list[str], cells: dict[str, list[str]]) -> list[str]:
    """The lines of a grid for every measure; its cells are settings, which are named by row and column."""
    names, lines = dict.fromkeys(setting.rpartition(", ")[0] for setting in cells), []
    empty = ["–"] * len(titles)
    for number, title in enumerate(titles):
        rows = {name: [cells.get(f"{name}, {column}", empty)[number] for column in columns] for name in names}
        lines += [f"{title}:", "", *_markdown_table(columns, rows)]
    return lines


def _features(record: dict[str, Any]) -> str:
    features = record["measured_with"].get("features")
    return "Measured without features; " if features is None else f"Features: `{features['name']}`; "


def _real(record: dict[str, Any]) -> list[str]:
    """A line on what is measured of real images, where samples are compared with that."""
    values = record["measured_with"].get("real", {}).items()
    said = "; ".join(f"{MEASURES[name].title}: {value:.3g}" for name, value in values)
    return [f"The same of whole training images: {said}.", ""] if said else []


def _sampled(record: dict[str, Any]) -> str:
    """How many samples there are, and how they are made; empty if there are none."""
    if "samples" not in record["measured_with"]:
        return ""
    return f"{record['measured_with']['samples']} samples per run, {_sampler(record)}. "


def _sampler(record: dict[str, Any]) -> str:
    """Guidance, steps and sampler of the samples."""
    overrides = [values["overrides"] for values in record["settings"].values()]
    if any(RECIPE in values for values in overrides):
        return "guidance, steps and sampler of each recipe"
    guidance, steps = record["measured_with"]["guidance_scale"], record["measured_with"]["num_inference_steps"]
    if any(f"{CALL}guidance_scale" in values for values in overrides):
        guidance = "as in the rows"
    if any(f"{CALL}num_inference_steps" in values for values in overrides):
        return f"guidance {guidance}, steps and sampler as in the rows"
    return f"guidance {guidance}, {steps} steps of {record['sampler']}"


def measures_of(record: dict[str, Any]) -> list[str]:
    """Names of the measures of a record that are columns, in their order."""
    first = next(iter(record["settings"].values()))
    return [name for name in first if name in MEASURES and not MEASURES[name].is_curve]


def has_curve(record: dict[str, Any]) -> bool:
    """Whether a record has curves; they are drawn in place of its columns."""
    return "curve" in next(iter(record["settings"].values()))


def interval_text(value: dict[str, Any] | None) -> str:
    """A mean with its interval, to the digits that the interval bears."""
    if value is None:
        return "–"
    if value["low"] is None:
        return f"{value['mean']:.3g}"
    width = value["high"] - value["mean"]
    digits = max(0, 1 - int(np.floor(np.log10(width)))) if width > 0 else 3
    return f"{value['mean']:.{digits}f} ± {width:.{digits}f}"


def expectation_text(expectation: dict[str, Any]) -> str:
    """What a comparison says of its claim, in words."""
    measure = MEASURES[expectation["measure"]]
    better = "lower" if measure.lower_is_better else "higher"
    said = f"{measure.title} of {expectation['better']} {better} than of {expectation['worse']}"
    apart = "intervals apart" if expectation["intervals_apart"] else "intervals overlap"
    difference = interval_text(expectation["difference"])
    return f"{said}: **{expectation['verdict']}** (paired difference {difference}; {apart})"


def plot(record: dict[str, Any], file: Path):
    """Draw mean, interval and seeds of every setting, a panel a measure."""
    measures, settings = measures_of(record), record["settings"]
    figure, axes = pyplot.subplots(
        1,
        len(measures),
        figsize=(2.6 * len(measures) + 1.5, 0.4 * len(settings) + 1.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], measures, strict=True):
        for y, values in enumerate(settings.values()):
            value = values[name]
            if value is None:
                axis.annotate("no value", (0.5, y), xycoords=("axes fraction", "data"), ha="center", va="center")
                continue
            if value["low"] is not None:
                axis.hlines(y, value["low"], value["high"], color="C0", linewidth=2)
            axis.plot(value["seeds"], [y] * len(value["seeds"]), "o", color="C0", alpha=0.35, markersize=4)
            axis.plot(value["mean"], y, "D", color="C0", markersize=6)
        axis.set_title(
            f"{MEASURES[name].title} ({'low' if MEASURES[name].lower_is_better else 'high'} is good)", size=9
        )
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set(yticks=range(len(settings)), yticklabels=list(settings), ylim=(len(settings) - 0.5, -0.5))
    figure.suptitle(f"{record['title']}: mean, seeds and {record['interval']}", size=9)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
