"""Train an adapter (LoRA or DoRA) for a text-to-image or a class-conditional pipeline.

Usage: accelerate launch training/train_lora.py --base FOLDER_OR_ID --data FOLDER [--section.key value …]

Autoencoder, text encoder, text padding and noise schedule are the base's. Without arguments the base is the
quickstart's model, and the images are those that ship with the package.
"""

import sys
import time
from pathlib import Path

from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.sources import CorruptImagesError, open_rows
from improved_ldm.hub.repository import HubError
from improved_ldm.trainer.adapters import (
    add_adapter,
    base_objective,
    check_adapter_run,
    load_base,
    put_into,
    with_base,
)
from improved_ldm.trainer.batches import image_transform, open_batches, survey
from improved_ldm.trainer.config import AdapterRunConfig, exit_on_error, parse_config_or_exit
from improved_ldm.trainer.finish import finish
from improved_ldm.trainer.grids import diverse_prompts, grid_drawer
from improved_ldm.trainer.loop import train
from improved_ldm.trainer.pushes import pipeline_pusher
from improved_ldm.trainer.run import start_run

DEFAULT = Path(__file__).parent / "configs" / "lora_fashion.yaml"
GRID_ROWS = 8


def main(argv: list[str]):
    started = time.perf_counter()
    config = parse_config_or_exit(AdapterRunConfig, argv, DEFAULT)

    # The base and the data: opened and looked at before anything else is done.
    pipeline = load_base(config.base)
    check_adapter_run(config, pipeline)
    config = with_base(config, pipeline)
    image_transform(config)
    data, class_names = config.data, pipeline.config.class_names
    columns = {"caption_column": data.caption_column, "label_column": None}
    if not pipeline.takes_text:
        columns = {"caption_column": None, "label_column": data.label_column, "num_classes": data.num_classes}
    rows = open_rows(data.source, data.split, data.name, data.image_column, **columns)
    captions = survey(rows).captions
    if rows.class_names and class_names and rows.class_names != class_names:
        raise ValueError(
            f"the set's classes are {rows.class_names}, the base's {class_names}; a label must mean the same in both."
        )

    # The adapter: everything else of the base stays as it is.
    run = start_run(config)
    push = pipeline_pusher(run, pipeline)
    pipeline.to(run.accelerator.device)
    adapted = add_adapter(pipeline, config.lora)
    encoder = SampleEncoder(pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, config.text.max_tokens)
    if not pipeline.takes_text:
        grid_rows = list(range(min(GRID_ROWS, pipeline.denoiser.config.num_classes)))
    else:
        grid_rows = list(config.sampling.prompts or ()) or diverse_prompts(
            captions, encoder.text(captions).pooled, GRID_ROWS
        )

    # The training, in the loop that all scripts share.
    batches = open_batches(run, rows, encoder)
    draw_samples = grid_drawer(pipeline, grid_rows, config.seed, run.folder / "samples")
    objective = base_objective(config, pipeline)
    put_into(pipeline, train(run, adapted, objective, batches, draw_samples, on_push=push))
    finish(run, pipeline, grid_rows, started)
    run.accelerator.end_training()


if __name__ == "__main__":
    with exit_on_error("not trained", HubError, CorruptImagesError):
        main(sys.argv[1:])
