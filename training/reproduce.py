"""Reproduce the paper's tables at a size that two CPU cores, or one GPU, can afford.

Usage: python training/reproduce.py TABLE [--scale cpu|gpu] [--seeds 0 1 2] [--settings NAME …]
                                    [--section.key value]
       python training/reproduce.py transfer [--seeds 0 1 2] [--arms default both …] [--section.key value]
       python training/reproduce.py summary

TABLE is one of `training/reproduction/tables.yaml`. Runs and what is measured of them are kept as they end, so the
same command goes on after a stop, and no run that several tables share is made twice. Several processes can share an
`--output` when each has its own seeds; then one more call draws the table of all of them.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import train_class_conditional
import train_t2i
from reproduction.measures import Evaluator
from reproduction.report import summarize, write_report
from reproduction.runs import measured, trained
from reproduction.summary import write_summary
from reproduction.switch import ARMS, reproduce_switch
from reproduction.tables import SCALES, Table, load_tables

from improved_ldm.provenance import launch_command

RESULTS_HELP = "folder of the tables that are written; those of this repository are in training/results"
TRAINERS = {
    "train_t2i": train_t2i.train_stages,
    "train_class_conditional": train_class_conditional.train_stages,
}


def reproduce_table(name: str, table: Table, options: argparse.Namespace, further: list[str]):
    """Train and measure what is not there, then write the table."""
    settings = options.settings or table.settings_at(options.scale)
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"--seeds {options.seeds}: a seed that is there twice tells nothing new.")
    if set(settings) - table.settings.keys():
        raise ValueError(f"--settings {settings}: {name} has {', '.join(map(repr, table.settings))}.")
    configs = {setting: table.run_config(setting, options.scale, further) for setting in settings}
    evaluator = Evaluator(configs[settings[0]], "cuda" if torch.cuda.is_available() else "cpu")
    output, values = options.output / options.scale, {setting: defaultdict(list) for setting in settings}
    runs, parameters = [], {}
    for seed in options.seeds:
        for setting, config in configs.items():
            seeded = config.model_copy(update={"seed": seed})
            folder = trained(output, table.trainer, seeded, TRAINERS[table.trainer])
            found = measured(folder, table.measures, table.call(setting), seed, evaluator)
            print(f"{name}, seed {seed}, {setting}: {found}", flush=True)
            runs.append(json.loads((folder / "metrics.json").read_text()))
            parameters[setting] = runs[-1]["parameters"]
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
        "measured_with": evaluator.settings,
    }
    write_report(summarize(table, values, about), options.results / name, options.scale)


def main(argv: list[str] | None = None):
    tables = load_tables()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="TABLE")
    for name, table in tables.items():
        command = commands.add_parser(name, help=table.title)
        command.set_defaults(run=partial(reproduce_table, name, table))
        command.add_argument("--scale", choices=SCALES, default="cpu")
        command.add_argument("--settings", nargs="+", help="rows of the table; default: those of the scale")
        command.add_argument("--output", type=Path, default=Path("runs/reproduce"))
        command.add_argument("--results", type=Path, default=Path("runs/reproduce/results"), help=RESULTS_HELP)
    command = commands.add_parser("transfer", help="FID after a switch of resolution, against images seen")
    command.set_defaults(run=reproduce_switch)
    command.add_argument("--output", type=Path, default=Path("runs/transfer"))
    command.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    command.add_argument("--from-resolution", type=int, default=16)
    command.add_argument("--from-steps", type=int, default=1500)
    for command in commands.choices.values():
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command = commands.add_parser("summary", help="all tables in one, from what is measured")
    command.set_defaults(run=lambda options, further: write_summary(tables, options.results))
    command.add_argument("--results", type=Path, default=Path("runs/reproduce/results"), help=RESULTS_HELP)
    options, further = parser.parse_known_args(argv)
    try:
        options.run(options, further)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
