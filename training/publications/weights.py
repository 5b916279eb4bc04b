"""Published weights: where they come from, and the pipeline that they become."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.convert import from_published
from improved_ldm.convert.files import CHECKPOINTS, read_checkpoint, read_config
from improved_ldm.convert.mapping import StateDict
from improved_ldm.exits import one_line
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.places import shareable_place
from improved_ldm.provenance import write_json
from improved_ldm.trainer.components import build_objective, load_autoencoder
from publications.entries import Published

ORIGIN = "origin.json"  # next to a converted pipeline: what it was made from


def is_pipeline(place: str) -> bool:
    """Whether a folder or Hub id is a pipeline of this library."""
    try:
        return ImprovedLDMPipeline.load_config(place).get("_class_name") == ImprovedLDMPipeline.__name__
    except (OSError, ValueError):
        return False


def download(place: str, model: str) -> Path:
    """The local file or folder of a URL, a file on the Hub, or a model on the Hub.

    Args:
        place: Where the weights are.
        model: What the user asked for, for the message.

    Raises:
        ValueError: If it cannot be downloaded; the message says how to go on.
    """
    if Path(place).exists():
        return Path(place)
    if not place.startswith("https://") and (place.startswith((".", "/")) or (place == model and _is_file(place))):
        raise FileNotFoundError(f"`model` is {place!r}; there is no such file.")
    try:
        if place.startswith("https://"):
            return _downloaded(place)
        if place.count("/") > 1:
            repo, _, file = place.rpartition("/")
            return Path(hf_hub_download(repo, file))
        return Path(snapshot_download(place, allow_patterns=["transformer/*", "unet/*"]))
    except (OSError, ValueError) as error:  # Hub errors are of these types, too
        weights = "" if place == model else f"; its weights are {place}"
        raise ValueError(
            f"`model` is {model!r}{weights}, which cannot be downloaded ({one_line(str(error))}). Give the path "
            "of a downloaded file or folder, with `--compare_with NAME`."
        ) from error


def _is_file(place: str) -> bool:
    return Path(place).suffix in (".safetensors", *CHECKPOINTS)


def _downloaded(url: str) -> Path:
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.exists():
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file))
    return file


def convert(
    entry: Published, checkpoint: Path, place: str, folder: Path, autoencoder: str | None, config: Path | None
):
    """Write the pipeline of published weights to a folder, unless it is there already.

    Args:
        entry: The published model, whose sampler and guidance the pipeline gets.
        checkpoint: File or folder of the weights.
        place: Where the weights come from, for the record.
        folder: Folder to write to.
        autoencoder: Autoencoder in place of the entry's, or None.
        config: JSON with the constructor's arguments, or None.

    Raises:
        ValueError: If the weights do not fit, or the folder holds a pipeline of other weights.
    """
    part = next((checkpoint / name for name in ("transformer", "unet") if (checkpoint / name).is_dir()), checkpoint)
    run = entry.run_config(autoencoder)
    state_dict, found = read_checkpoint(part)
    arguments = entry.config | found if config is None else read_config(config)
    origin = {
        "weights": shareable_place(place),
        "sha256": digest(state_dict),
        "config": arguments,
        "autoencoder": shareable_place(run.autoencoder.pretrained),
        "source": "diffusers" if "_class_name" in found else entry.source,
        "objective": run.objective.model_dump(mode="json"),
        "sampling": run.sampling.model_dump(mode="json"),
    }
    record = folder / ORIGIN
    if record.exists():
        if json.loads(record.read_text(encoding="utf-8")) != origin:
            raise ValueError(
                f"`output_dir` is {folder.parent}, which holds other weights or another recipe; choose another folder."
            )
        return
    vae, denoiser = load_autoencoder(run.autoencoder), read_denoiser(origin["source"], state_dict, arguments, place)
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


def read_denoiser(source: str, state_dict: StateDict, arguments: dict[str, Any], place: str) -> Denoiser:
    """The denoiser of a checkpoint.

    Raises:
        ValueError: If its tensors do not fit the constructor's arguments.
    """
    try:
        return from_published(source, state_dict, arguments)
    except ValueError as error:
        given = f"the constructor's arguments {arguments}" if arguments else "the size of the published XL/2"
        raise ValueError(
            f"`model` is {place!r}, which does not fit {given}: {error} Arguments of another size are read from a "
            "`config.json` next to the weights, or from `--published_config`."
        ) from error


def digest(state_dict: StateDict) -> str:
    """A hash of the names and the values of weights."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        sha256.update(name.encode())
        sha256.update(tensor.contiguous().view(torch.uint8).numpy())
    return sha256.hexdigest()
