"""Measure a published model as its authors did, and print the published number, the measured one and their difference.

Usage: python training/published.py MODEL --reference_statistics VIRTUAL_imagenet256_labeled.npz [--key value …]
       accelerate launch training/published.py MODEL …

MODEL is a name in `training/published.yaml`, such as DiT-XL/2-256, whose weights are downloaded. It can also be a
checkpoint in the published layout, the folder or Hub id of a model of diffusers, or a pipeline of this library; then
`--compare_with` names the entry to compare with. The other keys are those of `training/evaluate.py`.

The weights are converted, images are sampled with the published sampler and guidance, and scored as by the ADM suite.
The same command resumes where it was stopped.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from huggingface_hub import hf_hub_download, snapshot_download
from pydantic import Field, field_validator

import evaluate
from improved_ldm import ImprovedLDMPipeline
from improved_ldm.bounds import LocalPath, Place, Text
from improved_ldm.convert import from_published
from improved_ldm.convert.files import read_checkpoint
from improved_ldm.convert.sources import SOURCES
from improved_ldm.evaluation.request import EvaluateConfig, complete
from improved_ldm.exits import exit_on_error
from improved_ldm.models.cost import multiply_adds
from improved_ldm.naming import loading
from improved_ldm.open_pipeline import open_pipeline
from improved_ldm.places import shareable_place
from improved_ldm.provenance import write_json
from improved_ldm.settings import Section, parse_config, parse_config_or_exit
from improved_ldm.trainer.components import build_objective, load_autoencoder
from improved_ldm.trainer.config import RunConfig
from improved_ldm.trainer.processes import on_main_process

HERE = Path(__file__).parent
ASSUMED_FLOPS = 200e12  # floating-point operations a second of one GPU, for the estimate of its hours


class Published(Section):
    """A published model, an entry of `published.yaml`."""

    recipe: str
    """File in configs/published/, without its ending."""
    source: str
    """Implementation whose layout the weights have, a key of `SOURCES`."""
    weights: str | None = None
    """URL, or a Hub id and a file; none if the weights are not published."""
    config: dict[str, Any] = Field({})
    """Constructor arguments of the implementation."""
    autoencoder: str | None = None
    """Autoencoder to decode with; default: that of the recipe."""
    sampling: dict[str, Any] = Field({})
    """Keys of `sampling` that differ from the recipe."""
    numbers: dict[str, float]
    """Published scores, by the names of `training/evaluate.py`."""
    origin: str
    """Where the numbers are published."""

    @field_validator("source")
    @classmethod
    def _is_a_source(cls, source: str):
        if source not in SOURCES:
            raise ValueError(f"it must be one of {', '.join(SOURCES)}")
        return source

    def run_config(self, autoencoder: str | None) -> RunConfig:
        """The recipe with the changes of this entry."""
        changes = {f"sampling.{key}": value for key, value in self.sampling.items()}
        if autoencoder or self.autoencoder:
            changes["autoencoder.pretrained"] = autoencoder or self.autoencoder
        arguments = [f"--{key}={json.dumps(value)}" for key, value in changes.items()]
        return parse_config(RunConfig, arguments, HERE / "configs" / "published" / f"{self.recipe}.yaml")


class PublishedConfig(EvaluateConfig):
    """Configuration of the measurement of a published model."""

    model: Place
    """Name in `published.yaml`, or a checkpoint, a folder or a Hub id."""
    compare_with: Text | None = None
    """Name in `published.yaml` to compare with; needed if `model` is not one."""
    published_config: LocalPath | None = None
    """JSON with the constructor arguments of the published implementation; default: those of the entry."""
    autoencoder: Place | None = None
    """Autoencoder to decode with; default: that of the entry."""

    OWN: ClassVar[set[str]] = {"model", "compare_with", "published_config", "autoencoder"}

    def evaluation(self, pipeline: str, folder: Path) -> EvaluateConfig:
        """The configuration of the evaluation of a pipeline, with the settings of the ADM suite."""
        values = self.model_dump(exclude=self.OWN, exclude_unset=True)
        return EvaluateConfig.model_validate({"like": "adm", **values, "pipeline": pipeline, "output_dir": folder})


def load_entries() -> dict[str, Published]:
    """The published models by name."""
    entries = yaml.safe_load((HERE / "published.yaml").read_text(encoding="utf-8"))
    return {name: Published.model_validate(entry) for name, entry in entries.items()}


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


def download(place: str) -> Path:
    """The local file or folder of a URL, a file on the Hub, or a model on the Hub."""
    if Path(place).exists():
        return Path(place)
    with loading("model", place):
        if place.startswith("https://"):
            file = Path(torch.hub.get_dir()) / "checkpoints" / place.rpartition("/")[2]
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(place, str(file))
            return file
        if place.count("/") > 1:
            repo, _, file = place.rpartition("/")
            return Path(hf_hub_download(repo, file))
        return Path(snapshot_download(place, allow_patterns=["transformer/*", "unet/*"]))


def is_pipeline(place: str) -> bool:
    """Whether a folder or Hub id is a pipeline of this library."""
    try:
        return ImprovedLDMPipeline.load_config(place).get("_class_name") == ImprovedLDMPipeline.__name__
    except (OSError, ValueError):
        return False


def convert(config: PublishedConfig, entry: Published, place: str, folder: Path):
    """Write the pipeline of published weights to a folder, unless it is there already.

    Raises:
        ValueError: If the folder holds a pipeline of other weights.
    """
    checkpoint = download(place)
    part = next((checkpoint / name for name in ("transformer", "unet") if (checkpoint / name).is_dir()), checkpoint)
    run = entry.run_config(config.autoencoder)
    state_dict, found = read_checkpoint(part)
    arguments = entry.config | found
    if config.published_config is not None:
        arguments = json.loads(config.published_config.read_text(encoding="utf-8"))
    origin = {
        "weights": shareable_place(place),
        "sha256": digest(state_dict),
        "autoencoder": shareable_place(run.autoencoder.pretrained),
        "source": "diffusers" if "_class_name" in found else entry.source,
    }
    record = folder / "origin.json"
    if record.exists():
        if json.loads(record.read_text(encoding="utf-8")) != origin:
            raise ValueError(f"`output_dir` is {folder.parent}, which has other weights; choose another folder.")
        return
    vae = load_autoencoder(run.autoencoder)
    denoiser = from_published(origin["source"], state_dict, arguments)
    if run.objective.learned_variance and not denoiser.predicts_variance:
        raise ValueError(
            f"`model` is {place!r}, which has {denoiser.config.out_channels} output channels; the recipe "
            f"{entry.recipe} learns a variance, which needs {2 * denoiser.config.in_channels}."
        )
    sampling = run.sampling
    pipeline = ImprovedLDMPipeline(
        vae,
        build_objective(run).sampling_scheduler(sampling.sampler, sampling.timestep_spacing),
        **{denoiser.component: denoiser},
        default_guidance_scale=sampling.guidance_scale,
        default_num_inference_steps=sampling.num_inference_steps,
        guidance_options=sampling.guidance_options or None,
        lineage=[{"source": origin["weights"]}],
    )
    pipeline.save_pretrained(folder)
    write_json(record, origin)


def digest(state_dict: dict[str, torch.Tensor]) -> str:
    """A hash of the names and the values of weights."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        sha256.update(name.encode())
        sha256.update(tensor.contiguous().view(torch.uint8).numpy())
    return sha256.hexdigest()


def cost_line(pipeline: ImprovedLDMPipeline, config: EvaluateConfig) -> str:
    """The floating-point operations of the samples, and about how long they take."""
    settings = pipeline.config
    scale = settings.default_guidance_scale if config.guidance_scale is None else config.guidance_scale
    steps = config.num_inference_steps or settings.default_num_inference_steps
    evaluations = steps * (1 if scale == 1 else 2)
    one = 2 * multiply_adds(pipeline.denoiser)
    total = one * evaluations * config.num_samples
    return (
        f"{one / 1e9:,.3g} GFLOP per evaluation, {evaluations} evaluations per image, {config.num_samples:,} images: "
        f"{total / 1e15:,.3g} PFLOP, about {total / ASSUMED_FLOPS / 3600:,.2g} GPU hours at an assumed "
        f"{ASSUMED_FLOPS / 1e12:.0f} TFLOP/s"
    )


def table(name: str, entry: Published, record: dict[str, Any]) -> str:
    """Published, measured and difference, one score per line, and with what the numbers compare."""
    rows = [("", "published", "measured", "difference")]
    for score, published in entry.numbers.items():
        measured = record["scores"].get(score)
        found = ("not measured", "") if measured is None else (f"{measured:.2f}", f"{measured - published:+.2f}")
        rows.append((score.replace("_", " "), f"{published:.2f}", *found))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"{name} ({entry.origin})", *lines, record["comparison"]])


def main(config: PublishedConfig):
    name, entry, place = find_entry(config)
    folder = config.output_dir or Path("runs/published") / name.replace("/", "-")
    if config.reference_statistics is None:
        raise ValueError(
            "`reference_statistics` is not given; it must be VIRTUAL_imagenet256_labeled.npz of the ADM suite "
            "(openai/guided-diffusion, evaluations), or statistics that `training/evaluate.py` wrote."
        )
    if not config.reference_statistics.is_file():
        raise FileNotFoundError(f"`reference_statistics` is {config.reference_statistics}, which does not exist.")
    pipeline = place
    if not is_pipeline(place):
        pipeline = str(folder / "pipeline")
        on_main_process(lambda: convert(config, entry, place, folder / "pipeline"))
    evaluation = complete(config.evaluation(pipeline, folder / "evaluation"))
    print(cost_line(open_pipeline(pipeline), evaluation))
    evaluate.main(evaluation)
    record = folder / "evaluation" / "metrics.json"
    on_main_process(lambda: print(table(name, entry, json.loads(record.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    with exit_on_error("not measured", "batch_size"):
        named = [f"--model={sys.argv[1]}"] if sys.argv[1:] and not sys.argv[1].startswith("-") else []
        main(parse_config_or_exit(PublishedConfig, [*named, *sys.argv[1 + len(named) :]]))
