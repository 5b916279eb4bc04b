"""Measure a published model as its authors did, and print the published number, the measured one and their difference.

Usage: python training/published.py MODEL --reference_statistics VIRTUAL_imagenet256_labeled.npz [--key value …]
       accelerate launch training/published.py MODEL …

MODEL is a name in `training/publications/models.yaml`, such as DiT-XL/2-256, whose weights are downloaded. It can also
be a checkpoint in the published layout, the folder or Hub id of a model of diffusers, or a pipeline of this library;
then `--compare_with` names the entry to compare with.

The weights are converted, images are sampled with the published sampler and guidance, and scored as by the ADM suite.
The same command resumes where it was stopped.
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs

import evaluate
from improved_ldm.bounds import LocalPath, Place, Text
from improved_ldm.evaluation.request import EvaluateConfig, ScoringConfig, complete
from improved_ldm.exits import exit_on_error
from improved_ldm.open_pipeline import open_pipeline
from improved_ldm.provenance import write_json
from improved_ldm.settings import parse_config_or_exit
from improved_ldm.trainer.launcher import open_accelerator
from improved_ldm.trainer.processes import on_main_process
from improved_ldm.trainer.run import EVALUATION_TIME
from publications.comparison import comparison, cost_line, table
from publications.entries import Published, load_entries
from publications.weights import convert, download, is_pipeline

STATISTICS = (
    "VIRTUAL_imagenet256_labeled.npz of the ADM suite "
    "(https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz)"
)


class PublishedConfig(ScoringConfig):
    """Configuration of the measurement of a published model."""

    model: Place
    """Name in `publications/models.yaml`, or a checkpoint, a folder or a Hub id."""
    compare_with: Text | None = None
    """Name in `publications/models.yaml` to compare with; needed if `model` is not one."""
    published_config: LocalPath | None = None
    """JSON with the constructor's arguments of a checkpoint; default: `config.json` next to it, or the entry's."""
    autoencoder: Place | None = None
    """Autoencoder to decode with; default: that of the entry."""

    def evaluation(self, entry: Published, pipeline: str, folder: Path) -> EvaluateConfig:
        """The configuration of the evaluation of a pipeline: the entry's guidance and steps, and the ADM suite."""
        own = PublishedConfig.model_fields.keys() - ScoringConfig.model_fields.keys()
        sampling = entry.run_config(None).sampling.model_dump(include={"guidance_scale", "num_inference_steps"})
        values = {"like": "adm", **sampling, **self.model_dump(exclude=own, exclude_unset=True)}
        return complete(EvaluateConfig.model_validate({**values, "pipeline": pipeline, "output_dir": folder}))


def find_entry(config: PublishedConfig) -> tuple[str, Published, str]:
    """The name of the entry to compare with, the entry, and where the weights are.

    Raises:
        ValueError: If no entry is named, or an entry without weights is to be measured.
    """
    entries = load_entries()
    name = config.compare_with or config.model
    if name not in entries:
        key = "model" if config.compare_with is None else "compare_with"
        hint = " A model of your own needs `--compare_with` with one of them." if key == "model" else ""
        raise ValueError(f"`{key}` is {name!r}; published models are {', '.join(entries)}.{hint}")
    place = entries[name].weights if config.model == name else config.model
    if place is None:
        raise ValueError(
            f"`model` is {name!r}, whose weights are not published; give a checkpoint or a pipeline, and "
            f"`--compare_with {name}`."
        )
    return name, entries[name], place


def check_statistics(file: Path | None):
    """Raise an error if there are no reference statistics; the message says where to get them."""
    where = f"it must be {STATISTICS}, or statistics that `training/evaluate.py --write_statistics` wrote."
    if file is None:
        raise ValueError(f"`reference_statistics` is not given; {where}")
    if not file.is_file():
        raise FileNotFoundError(f"`reference_statistics` is {file}, which does not exist; {where}")


def main(config: PublishedConfig):
    open_accelerator(trains=False, kwargs_handlers=[InitProcessGroupKwargs(timeout=EVALUATION_TIME)])
    name, entry, place = find_entry(config)
    check_statistics(config.reference_statistics)
    folder = config.output_dir or Path("runs/published") / name.replace("/", "-")
    source = place
    if not is_pipeline(place):
        source = str(folder / "pipeline")
        checkpoint = on_main_process(lambda: download(place, config.model))
        options = (config.autoencoder, config.published_config)
        on_main_process(lambda: convert(entry, checkpoint, place, folder / "pipeline", *options))
    evaluation, pipeline = config.evaluation(entry, source, folder / "evaluation"), open_pipeline(source)
    on_main_process(lambda: print(cost_line(pipeline, evaluation)))
    evaluate.main(evaluation)
    if PartialState().is_main_process:  # the evaluation has ended the group of processes
        record = json.loads((folder / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
        found = comparison(name, entry, pipeline, place, record)
        write_json(folder / "comparison.json", found)
        print(table(found))
        print(f"{folder}/comparison.json holds the comparison")


if __name__ == "__main__":
    with exit_on_error("not measured", "batch_size"):
        named = [f"--model={sys.argv[1]}"] if sys.argv[1:] and not sys.argv[1].startswith("-") else []
        main(parse_config_or_exit(PublishedConfig, [*named, *sys.argv[1 + len(named) :]]))
