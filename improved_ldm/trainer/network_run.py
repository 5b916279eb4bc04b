"""The run of a network around a denoiser: from its data to the trained network with its numbers."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from improved_ldm.data.latents import EncodingLoader
from improved_ldm.data.loader import first_batches
from improved_ldm.data.mixture import Mixture
from improved_ldm.data.spread import spread_if_possible
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.naming import DATA_KEYS
from improved_ldm.output import writing
from improved_ldm.places import shareable_place
from improved_ldm.provenance import write_json, write_whole
from improved_ldm.resolution import sides_of
from improved_ldm.trainer.batches import announce, image_transform, prefetched, sample_loader
from improved_ldm.trainer.checkpoints import HISTORY
from improved_ldm.trainer.data import survey
from improved_ldm.trainer.data_sections import ImageDataConfig
from improved_ldm.trainer.held_out_data import NO_SPLIT, HeldOut, open_apart
from improved_ldm.trainer.loop import Hook, train
from improved_ldm.trainer.loss_plot import PICTURE, plot_loss
from improved_ldm.trainer.network_config import NetworkConfig
from improved_ldm.trainer.network_task import Measured, NetworkTask
from improved_ldm.trainer.pictures import track_picture
from improved_ldm.trainer.reports import read_history
from improved_ldm.trainer.run import Run, start_run
from improved_ldm.trainer.run_record import run_record, say_what_was_skipped, time_and_memory
from improved_ldm.trainer.summary import measured_rows, summary_lines

BATCH_PIXELS = 2**18  # pixels that are measured at once, so that the memory for them has a bound
STATISTICS_IMAGES = 2000  # images of the training that a network is finished with
PICTURE_NAME = "reconstructions"

OpenMixture = Callable[[ImageDataConfig, Mapping[str, str]], Mixture]


def train_network(config: NetworkConfig, open_mixture: OpenMixture, make_task: Callable[[Run, Mixture], NetworkTask]):
    """Train a network; it goes to the run's folder, with its numbers.

    Args:
        config: configuration of the run.
        open_mixture: function that opens sets with what the network reads of them.
        make_task: function of the run and its data that makes the network with its new weights.

    Raises:
        ValueError, OSError: if the configuration, the data or the folder cannot be used.
    """
    started = time.perf_counter()

    # The data: opened and checked before anything else.
    transform = image_transform(config)
    mixture = open_mixture(config.data, DATA_KEYS)
    survey(mixture)
    held_out = open_apart(config, mixture, open_mixture)

    # The network: new, or as the newest checkpoint has it.
    run = start_run(config)
    announce(run, mixture)
    task = make_task(run, mixture)
    measured_on = _say_measured_on(run, held_out)

    # The training, in the loop that all scripts share.
    batches = prefetched(run, EncodingLoader(sample_loader(run, mixture, transform), task.samples))
    measured_mixture, count = held_out.mixture if held_out else mixture, config.validation.num_images
    images = partial(whole_images, measured_mixture, count, task.image_size)

    def look(model: nn.Module, step: int):
        _show(run, task.measure(model, images), step)

    model = train(run, task, batches, [Hook(config.training.checkpoint_every, look)])
    if run.accelerator.is_main_process:
        task.finish(model, partial(whole_images, mixture, STATISTICS_IMAGES, task.image_size))
        _finish(run, task, model, task.measure(model, images), measured_on, started)
    run.accelerator.end_training()


def whole_images(mixture: Mixture, count: int, size: int | tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Whole images from all over the sets in batches of `collate`, of each set by its share.

    Args:
        mixture: the opened sets.
        count: number of images.
        size: side length, or (height, width), of the images, pixels.
    """
    transform, batch_size = ImageTransform(size), max(1, BATCH_PIXELS // math.prod(sides_of(size)))
    for rows, part in mixture.parts(count):
        yield from first_batches(spread_if_possible(rows, part), transform, part, batch_size)


def _say_measured_on(run: Run, held_out: HeldOut | None) -> str:
    """Say which images the network is measured on, and return it."""
    count, config = run.config.validation.num_images, run.config
    if held_out is not None:
        run.say(f"measured on up to {count} held-out images: {held_out.described}")
        return held_out.described
    places = ", ".join(map(shareable_place, config.data.places))
    run.say(
        f"measured on up to {count} images of the training, because {NO_SPLIT}; `validation.split` or "
        "`validation.source` names held-out images"
    )
    return f"images of the training: {places}"


def _show(run: Run, measured: Measured, step: int):
    """Print and track what the averaged network reaches after a step, counted from 1."""
    run.say(f"step {step}: {measured.summary}")
    values = {f"validation/{name}": value for name, value in measured.values.items() if value is not None}
    run.accelerator.log(values, step=step)
    if measured.picture is not None:
        track_picture(run, PICTURE_NAME, _save_picture(run, measured), step)


def _save_picture(run: Run, measured: Measured) -> Path:
    file = run.folder / f"{PICTURE_NAME}.png"
    write_whole(file, lambda unfinished: measured.picture.save(unfinished, format="png"))
    return file


def _finish(run: Run, task: NetworkTask, model: nn.Module, measured: Measured, measured_on: str, started: float):
    """Save a trained network with its numbers and pictures, and say how to use it."""
    with writing(run.folder):
        task.save(model, run.folder)
    history = read_history(run.folder / HISTORY, run.say)
    if history:
        plot_loss(history, [], run.folder / PICTURE)
    if measured.picture is not None:
        _save_picture(run, measured)
    record = run_record(run, history)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    metrics = {"measured_on": measured_on, **measured.values, "parameters": parameters, **record}
    metrics |= time_and_memory(run, started)
    write_json(run.folder / "metrics.json", metrics)  # last, because it marks the run as finished
    say_what_was_skipped(run, record)
    run.say("\n".join(["", *summary_lines(metrics, history, measured_rows(measured_on, measured.values))]))
    run.say(
        f"\n{run.folder}/ holds the network, metrics.json and {PICTURE}. To train with it: {task.usage(run.folder)}"
    )
