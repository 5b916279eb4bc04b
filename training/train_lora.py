"""Train an adapter (LoRA or DoRA) for a text-to-image or a class-conditional pipeline.

Usage: accelerate launch training/train_lora.py --base FOLDER_OR_ID --data FOLDER [--section.key value …]

Autoencoder, text encoder, text padding and noise schedule are those of the base. Without arguments the base is the
model of the quickstart, and the images are those that ship with the package.
"""

import sys
import time
from pathlib import Path

from improved_ldm.data.latents import SampleEncoder
from improved_ldm.exits import exit_on_error
from improved_ldm.settings import parse_config_or_exit
from improved_ldm.trainer.adapters import (
    add_adapter,
    base_objective,
    check_adapter_run,
    fill_from_base,
    load_base,
    set_trained,
)
from improved_ldm.trainer.batches import image_transform, open_batches
from improved_ldm.trainer.config import AdapterRunConfig
from improved_ldm.trainer.data import check_buckets, open_data, survey
from improved_ldm.trainer.denoiser_task import DenoiserTask
from improved_ldm.trainer.finish import finish
from improved_ldm.trainer.grids import grid_sampler
from improved_ldm.trainer.held_out_data import open_held_out
from improved_ldm.trainer.hub_push import pipeline_pusher
from improved_ldm.trainer.lock import released_locks
from improved_ldm.trainer.loop import Hook, train
from improved_ldm.trainer.run import start_run
from improved_ldm.trainer.semantic import class_rows, prompt_rows
from improved_ldm.trainer.suitability import check_networks, show_reconstructions
from improved_ldm.trainer.validation import open_validation

DEFAULT = Path(__file__).parent / "configs" / "lora_fashion.yaml"


def train_adapter(config: AdapterRunConfig):
    """Train an adapter; its files, samples, metrics and card go to the run's folder."""
    started = time.perf_counter()

    # The base and the data: opened and checked before anything else.
    pipeline = load_base(config.base)
    check_adapter_run(config, pipeline)
    config = fill_from_base(config, pipeline)
    image_transform(config)
    check_buckets(config.transform, pipeline.vae_scale_factor * pipeline.denoiser.patch_size)
    class_names = pipeline.config.class_names
    mixture = open_data(config.data, pipeline.takes_text)
    look = survey(mixture)
    if mixture.class_names and class_names and mixture.class_names != class_names:
        raise ValueError(
            f"the set's classes are {mixture.class_names}, the base's {class_names}; a label must mean the same in "
            "both."
        )
    held_out = open_held_out(config, mixture)

    # The adapter: all other weights of the base stay frozen.
    run = start_run(config)
    push = pipeline_pusher(run, pipeline)
    pipeline.to(run.accelerator.device)
    adapted = add_adapter(pipeline, config.lora)
    encoder = SampleEncoder(pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, config.text.max_tokens)
    if pipeline.takes_text:
        grid_rows = prompt_rows(config.sampling.prompts, encoder, look)
    else:
        grid_rows = class_rows(pipeline.denoiser.config.num_classes)
    show_reconstructions(run, *check_networks(run, [config], [mixture], [encoder]))

    # The training, in the loop that all scripts share.
    start = DenoiserTask(adapted, base_objective(config, pipeline))
    validation = open_validation(run, held_out, start, encoder, pipeline)
    batches = open_batches(run, mixture, encoder, pipeline.denoiser.control_inputs)
    sample = grid_sampler(run, pipeline, grid_rows)
    hooks = [Hook(config.sampling.every, sample), Hook(config.hub.push_every, push)]
    set_trained(pipeline, train(run, start, batches, hooks, validation))
    finish(run, pipeline, grid_rows, started)
    run.accelerator.end_training()


def main(argv: list[str]):
    with released_locks():
        train_adapter(parse_config_or_exit(AdapterRunConfig, argv, DEFAULT))


if __name__ == "__main__":
    with exit_on_error("not trained", "training.batch_size"):
        main(sys.argv[1:])
