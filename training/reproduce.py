"""Reproduce the paper's tables at a size that two CPU cores, or one GPU, can afford.

Usage: python training/reproduce.py TABLE [--scale cpu|gpu] [--seeds 0 1 2] [--settings NAME …]
                                    [--section.key value]
       python training/reproduce.py summary

TABLE is one of `training/reproduction/tables.yaml`. Runs and their measurements are saved as they finish, so the same
command resumes after a stop, and a run that several tables share is trained once. Several processes can share an
`--output` if each has its own seeds; one more call with all seeds then writes the table.
"""

import argparse
import json
import statistics
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

from improved_ldm.exits import ArgumentParser, exit_on_error
from improved_ldm.provenance import launch_command
from improved_ldm.trainer.train_stages import train_stages
from reproduction.curves import images_after_the_switch
from reproduction.measures import SHAPE_MEASURES, Scorer
from reproduction.report import build_record, write_report
from reproduction.runs import measure_if_missing, train_if_missing
from reproduction.shapes import draw_shapes
from reproduction.summary import write_summary
from reproduction.tables import SCALES, Table, load_tables

RESULTS_HELP = "folder for the tables; those of this repository are in training/results"
TRAINERS = {
    "train_t2i": partial(train_stages, condition="text"),
    "train_class_conditional": partial(train_stages, condition="class"),
}


def reproduce_table(name: str, table: Table, options: argparse.Namespace, further: list[str]):
    """Train and measure what is missing, then write the table."""
    settings = options.settings or table.settings_at(options.scale)
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"--seeds {options.seeds}: each seed must be listed only once.")
    if set(settings) - table.settings.keys():
        raise ValueError(f"--settings {settings}: {name} has {', '.join(map(repr, table.settings))}.")
    configs = {setting: table.run_config(setting, options.scale, further) for setting in settings}
    scorer = Scorer(configs[settings[0]], "cuda" if torch.cuda.is_available() else "cpu")
    output, values = options.output / options.scale, {setting: defaultdict(list) for setting in settings}
    runs, parameters, folders = [], {}, {}
    calls = {setting: table.call(setting, config) for setting, config in configs.items()}
    for seed in options.seeds:
        for setting, config in configs.items():
            seeded = config.model_copy(update={"seed": seed})
            trainer = table.trainer_of(setting)
            folder = train_if_missing(output, trainer, seeded, TRAINERS[trainer])
            found = measure_if_missing(folder, table.measures, calls[setting], seed, scorer, config)
            print(f"{name}, seed {seed}, {setting}: {found}", flush=True)
            runs.append(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
            parameters[setting] = runs[-1]["parameters"]
            folders.setdefault(setting, folder)  # of the first seed
            for measure, value in found.items():
                values[setting][measure].append(value)
    about = {
        "scale": options.scale,
        "seeds": options.seeds,
        "command": launch_command(),
        "device": ", ".join(sorted({run["device"] for run in runs})),
        "libraries": runs[0]["libraries"],
        "parameters": parameters,
        "seconds_a_run": statistics.median(run["seconds"] for run in runs),
        "sampler": runs[0]["scheduler"],
        "measured_with": scorer.settings(set(table.measures)),
        "calls": calls,
        **({"images": images_after_the_switch(folder)} if "curve" in table.measures else {}),
    }
    results = options.results / name
    if SHAPE_MEASURES & set(table.measures):
        about["picture"] = f"{options.scale}_shapes.png"
        draw_shapes(folders, scorer.config, options.seeds[0], results / about["picture"], **scorer.sampling)
    write_report(build_record(table, values, about), results, options.scale)


def main(argv: list[str] | None = None):
    tables = load_tables()
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="TABLE")
    for name, table in tables.items():
        command = commands.add_parser(name, help=table.title)
        command.set_defaults(run=partial(reproduce_table, name, table))
        command.add_argument("--scale", choices=SCALES, default="cpu")
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        command.add_argument("--settings", nargs="+", help="rows of the table; default: those of the scale")
        command.add_argument("--output", type=Path, default=Path("runs/reproduce"))
        command.add_argument("--results", type=Path, default=Path("runs/reproduce/results"), help=RESULTS_HELP)
    command = commands.add_parser("summary", help="all tables in one, from what is measured")
    command.set_defaults(run=lambda options, further: write_summary(tables, options.results))
    command.add_argument("--results", type=Path, default=Path("runs/reproduce/results"), help=RESULTS_HELP)
    options, further = parser.parse_known_args(argv)
    options.run(options, further)


if __name__ == "__main__":
    with exit_on_error("not reproduced", "training.batch_size"):
        main()
