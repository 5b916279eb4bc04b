"""Look at the data of a run before training: counts, and a picture of what the model will see. No model is loaded.

Usage: python training/look_at_data.py [--config FILE] [--section.key value …]

It takes the configuration and the keys of `train_t2i.py` and `train_class_conditional.py`, and those of `look`.
Without arguments it looks at the data of the quickstart.
"""

import contextlib
import sys
from pathlib import Path

from tqdm import tqdm

from improved_ldm.bounds import Count, CountOrZero, LocalPath
from improved_ldm.data.contact_sheet import ContactSheet
from improved_ldm.data.look import Look
from improved_ldm.data.mixture import Mixture
from improved_ldm.data.report import report_lines
from improved_ldm.data.rows import Rows
from improved_ldm.data.spread import count_rows, spread_rows
from improved_ldm.exits import exit_on_error
from improved_ldm.naming import naming_part
from improved_ldm.provenance import write_text
from improved_ldm.settings import Section, parse_config_or_exit
from improved_ldm.trainer.batches import image_transform
from improved_ldm.trainer.components import load_tokenizer
from improved_ldm.trainer.config import Condition, DataConfig, RunConfig
from improved_ldm.trainer.data import open_data, run_buckets

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


class LookConfig(Section):
    """What is looked at, and where the report and the picture go."""

    rows: CountOrZero = 512
    """Number of rows, spread over the set; 0 reads the whole set."""
    condition: Condition | None = None
    """Condition of the run or of its first stage: its captions or its classes; default: captions if there are any."""
    tiles: Count = 24
    """Number of rows on the contact sheet."""
    output: LocalPath = Path("runs/look")
    """Folder for `report.txt` and `contact_sheet.png`; with several stages or sets it has a folder for each."""


class Config(RunConfig):
    """The configuration of a run, and what is looked at."""

    look: LookConfig = LookConfig()


def main(config: Config):
    run = RunConfig.model_validate(config.model_dump(exclude={"look"}))
    if not run.stages:
        _, mixture = open_first(run.data, config.look.condition)
        look_at(run, mixture, config.look, config.look.output)
        return
    condition, mixture = open_first(run.of_stage(0).data, run.stages[0].condition or config.look.condition)
    for number, (name, kind) in enumerate(zip(run.stage_names(), run.stage_conditions(condition), strict=True)):
        stage = run.of_stage(number)
        print(f"{name}:")
        with naming_part(name):
            mixture = open_data(stage.data, kind == "text") if number else mixture
            look_at(stage, mixture, config.look, config.look.output / f"stage-{number + 1}")


def open_first(data: DataConfig, condition: Condition | None) -> tuple[Condition, Mixture]:
    """The sets of the first stage, and what is read of them: by default captions if they have any, else classes.

    Raises:
        FileNotFoundError, ValueError: if the sets do not open; if they have neither, it is the error of the captions.
    """
    if condition is not None:
        return condition, open_data(data, condition == "text")
    try:
        return "text", open_data(data, takes_text=True)
    except ValueError:
        with contextlib.suppress(ValueError):
            return "class", open_data(data, takes_text=False)
        raise


def look_at(run: RunConfig, mixture: Mixture, options: LookConfig, folder: Path):
    """Look at the sets of a run or of a stage, one after the other.

    Raises:
        ValueError: if no row of a set can be used.
    """
    for number, source in enumerate(mixture.sources, 1):
        print(f"{source.name}:" if source.name else "")
        with naming_part(source.name):
            look_at_set(run, source.rows, options, folder / f"source-{number}" if source.name else folder)


def look_at_set(run: RunConfig, rows: Rows, options: LookConfig, folder: Path):
    """Print and write the report on a set, and draw its contact sheet.

    Raises:
        ValueError: if no row can be used.
    """
    expected = min(filter(None, (options.rows, count_rows(rows))), default=None)
    rows = spread_rows(rows, options.rows) if options.rows else rows
    tokenizer = None if rows.caption_column is None else load_tokenizer(run.text)
    transform, buckets = image_transform(run, run.denoiser.control_parts), run_buckets(run.transform)
    look, sheet = Look(rows, transform, buckets, run.seed, tokenizer), ContactSheet(options.tiles, rows.class_names)
    for seen in tqdm(look, total=expected, unit="img", desc="looking"):
        if seen is not None:
            sheet.add(seen)
    lines = report_lines(look, run.text.pretrained, run.text.max_tokens)
    print("\n".join(lines))
    if not look.usable:
        raise ValueError("the set holds no row that can be used.")
    sheet.save(folder / "contact_sheet.png")
    write_text(folder / "report.txt", "\n".join([*lines, ""]))
    print(f"\nwritten to {folder}/: report.txt and contact_sheet.png")


if __name__ == "__main__":
    with exit_on_error("not looked at"):
        main(parse_config_or_exit(Config, sys.argv[1:], QUICKSTART))
