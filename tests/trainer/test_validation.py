"""Held-out images in complete small runs: what is measured, and that it changes nothing."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.loader import make_pass
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.diffusion.objectives import Objective, make_objective
from improved_ldm.evaluation.request import EvaluateConfig
from improved_ldm.trainer.config import RunConfig, TextConfig
from improved_ldm.trainer.held_out import LEVELS, level_losses
from improved_ldm.trainer.run import start_run
from improved_ldm.trainer.validation import steps_between
from tests.data.sets import write_shard
from tests.data.test_indexed import write_folder
from tests.scripts import launch
from tests.trainer.conftest import NUM_HELD_OUT, load_script
from tests.trainer.test_kills import base, history  # noqa: F401  a fixture

VALIDATION = "validation.jsonl"
DROPPING = {"training.semantic_dropout": 0.5, "training.control_dropout": 0.5}
BUCKETS = {"transform.buckets": "true", "transform.bucket_step": 8}


@pytest.fixture
def held_out(arguments, split_images):
    """Arguments of a run on a set with held-out images, measured every two steps."""

    def make(output: str = "run", **overrides) -> list[str]:
        values = {"data.source": split_images, "cache.passes": 0, "validation.every": 2, "validation.num_images": 12}
        return arguments(output, **values | overrides)

    return make


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / VALIDATION).read_text(encoding="utf-8").splitlines()]


def left_of(folder: Path) -> tuple[dict, list]:
    """Everything that a run leaves of its training: weights, averages, moments, records."""
    tensors = {}
    (checkpoint,) = folder.glob("checkpoints/step-00000006")
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= {f"{file.name}/{name}": value for name, value in load_file(file).items()}
    moments = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    for number, state in moments.items():
        tensors |= {f"{number}/{name}": torch.as_tensor(value) for name, value in state.items()}
    return tensors, history(folder)


def random_states() -> list:
    kind, keys, *rest = np.random.get_state()
    return [random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()]


def mean_losses(pipeline: ImprovedLDMPipeline, source: Path, objective: Objective) -> torch.Tensor:
    """The mean loss of all test images at each level, with the encoders of a pipeline."""
    encoder = SampleEncoder(pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, 16)
    batches, text = make_pass(open_rows(source, "test"), ImageTransform(32), 7), TextConfig(max_tokens=16)
    losses = (level_losses(pipeline.denoiser, objective, encoder(batch), batch["seed"], text) for batch in batches)
    return torch.cat(list(losses)).double().mean(0)


RUNS = {
    "cached": {"cache.passes": 1},
    "streamed": {},
    "in time": {"training.prefetch": 0, "data.num_workers": 1},
    "mdt": {"denoiser.name": "mdt", **DROPPING},
    "unet": {"denoiser.name": "unet"},
    "bf16": {"training.mixed_precision": "bf16"},
    "recomputed": {"training.gradient_checkpointing": "true", "denoiser.name": "mmdit"},
    "accumulated": {"training.batch_size": 4, "training.gradient_accumulation_steps": 2, **DROPPING},
    "samples": {"validation.samples_every": 3, "validation.num_samples": 8, "validation.features": "embedded:judge"},
    "average at times": {"optimizer.ema_every": 2, "optimizer.ema_warmup": "true", "objective.prediction": "epsilon"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_with_and_without_it(held_out, tmp_path, name):
    script, states = load_script("train_t2i"), []
    for output, off in (("with", {}), ("without", {"validation.every": 0, "validation.samples_every": 0})):
        script.main(held_out(output, **RUNS[name] | off))
        states.append(random_states())
    (one, records), (other, other_records) = (left_of(tmp_path / output) for output in ("with", "without"))
    assert one.keys() == other.keys() and all(value.equal(other[name]) for name, value in one.items())
    assert records == other_records
    assert states[0] == states[1]
    assert (tmp_path / "with" / "samples.png").read_bytes() == (tmp_path / "without" / "samples.png").read_bytes()
    assert not (tmp_path / "without" / VALIDATION).exists()
    assert [line["step"] for line in lines(tmp_path / "with") if "loss" in line] == [2, 4, 6]


@pytest.mark.slow
def test_a_compiled_run_is_the_same_with_and_without_it(held_out, tmp_path):
    compiled = {"training.compile": "true", "validation.num_images": 9}  # other shapes than in training
    script = load_script("train_t2i")
    for output, every in (("with", 2), ("without", 0)):
        script.main(held_out(output, **compiled, **{"validation.every": every}))
    one, other = (left_of(tmp_path / output)[0] for output in ("with", "without"))
    assert all(value.equal(other[name]) for name, value in one.items())


def test_the_numbers_are_those_of_the_weights(held_out, split_images, tmp_path):
    """The last loss of the averaged weights is that of the saved pipeline, image by image."""
    settings = {"validation.num_images": 100, "objective.prediction": "epsilon", "optimizer.ema_decay": 0.5}
    load_script("train_t2i").main(held_out(**settings))
    (*_, last) = lines(tmp_path / "run")
    pipeline = ImprovedLDMPipeline.from_pretrained(tmp_path / "run")
    mean = mean_losses(pipeline, split_images, make_objective("epsilon"))
    assert last["held_out_images"] == NUM_HELD_OUT
    assert last["averaged_loss_by_level"] == pytest.approx(mean.tolist(), rel=1e-5)
    assert last["averaged_loss"] == pytest.approx(mean.mean().item(), rel=1e-5)
    assert last["loss"] != last["averaged_loss"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["held_out"] == last
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"| held-out loss | {last['averaged_loss']:.4f}, {NUM_HELD_OUT} images of `.../set`, split `test` |" in card


@pytest.mark.parametrize("stops", [(3,), (1, 4, 5)], ids=["once", "often"])
def test_a_resumed_run_writes_the_same_lines(held_out, tmp_path, stops):
    script = load_script("train_t2i")
    more = {"validation.samples_every": 3, "validation.num_samples": 6, "validation.features": "embedded:judge"}
    script.main(held_out("whole", **more))
    for steps in stops:
        script.main(held_out("parts", **more, **{"training.steps": steps}))
        with (tmp_path / "parts" / VALIDATION).open("a", encoding="utf-8") as file:  # as if it had been killed later
            file.write('{"step": 6, "loss": 0}\n{"step": 7, "lo')
    script.main(held_out("parts", **more))
    assert (tmp_path / "parts" / VALIDATION).read_bytes() == (tmp_path / "whole" / VALIDATION).read_bytes()
    again = (tmp_path / "parts" / VALIDATION).read_bytes()
    script.main(held_out("parts", **more))  # nothing is left to do
    assert (tmp_path / "parts" / VALIDATION).read_bytes() == again
    for record in lines(tmp_path / "whole"):
        assert ("loss" in record) != ("samples" in record)
    assert [line["step"] for line in lines(tmp_path / "whole")] == [2, 3, 4, 6, 6]


def test_it_may_be_turned_on_and_off_between_the_parts_of_a_run(held_out, tmp_path):
    script = load_script("train_t2i")
    script.main(held_out(**{"training.steps": 3}))
    script.main(held_out(**{"training.steps": 4, "validation.every": 0}))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["held_out"] is None
    script.main(held_out(**{"training.steps": 8, "validation.every": 4}))
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 3, 8]


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(held_out, tmp_path):
    steady = {"training.steps": 2, "validation.every": 1, "validation.num_images": 13, "optimizer.warmup_steps": 100}
    more = {"validation.samples_every": 2, "validation.num_samples": 9, "validation.features": "embedded:judge"}
    for output, processes in (("one", 1), ("two", 2)):
        words = held_out(output, **steady, **more, **{"training.batch_size": 8 // processes})
        process = launch(words, processes=processes)
        said = process.communicate(timeout=280)[0]
        assert process.returncode == 0, said
    one, two = (lines(tmp_path / output) for output in ("one", "two"))
    assert len(one) == len(two) == 3
    for mine, other in zip(one, two, strict=True):
        for key, value in mine.items():
            is_number = key not in ("source", "split", "features", "notes")
            assert other[key] == (pytest.approx(value, rel=1e-3 if "fid" in mine else 1e-4) if is_number else value)


STAGES = "[{resolution: 16, steps: 2}, {resolution: 32, steps: 2, batch_size: 4, validation_split: test}]"


def test_each_stage_has_its_own(held_out, tmp_path):
    load_script("train_t2i").main(held_out(stages=STAGES))
    low, high = lines(tmp_path / "run" / "stage-1-16"), lines(tmp_path / "run")
    assert [line["step"] for line in (*low, *high)] == [2, 2]
    assert [line["images"] for line in (*low, *high)] == [16, 8]
    assert low[0]["timesteps"] != high[0]["timesteps"], "the noise schedule is rescaled"
    (low_card, high_card) = (
        (tmp_path / folder / "README.md").read_text(encoding="utf-8") for folder in ("run/stage-1-16", "run")
    )
    assert f"| held-out loss | {low[0]['averaged_loss']:.4f}" in low_card
    assert f"| held-out loss | {high[0]['averaged_loss']:.4f}" in high_card


@pytest.mark.parametrize("layout", ["classes", "folder in buckets", "shards", "several sets", "filtered"])
def test_every_kind_of_set(held_out, split_images, tmp_path, layout):
    script, options, expected = "train_t2i", {}, 12
    if layout == "classes":
        script = "train_class_conditional"
    elif layout == "folder in buckets":
        (tmp_path / "set").mkdir()
        write_folder(tmp_path / "set" / "train", 24)
        write_folder(tmp_path / "set" / "test", 9)
        options, expected = {"data.source": tmp_path / "set", **BUCKETS}, 9
    elif layout == "shards":
        for split, count in (("train", 24), ("test", 20)):
            (tmp_path / "set" / split).mkdir(parents=True)
            for shard in range(2):
                file, numbers = tmp_path / "set" / split / f"{shard}.tar", range(shard * count, (shard + 1) * count)
                write_shard(file, numbers, lambda i: {"txt": f"row {i}".encode()})
        options = {"data.source": tmp_path / "set"}
    elif layout == "several sets":
        options = {"data.sources": f"[{{source: {split_images}, weight: 3}}, {{source: {split_images}}}]"}
    else:
        options, expected = {"data.caption_pattern": "sneaker", "validation.num_images": 3}, 3
    words = held_out(**options)
    if layout == "several sets":
        words = [word for word in words if not word.startswith("--data.source=")]
    load_script(script).main(words)
    records = lines(tmp_path / "run")
    assert [record["step"] for record in records] == [2, 4, 6]
    assert {record["held_out_images"] for record in records} == {expected}
    assert len(records[-1]["loss_by_level"]) == len(records[-1]["timesteps"]) == LEVELS


@pytest.mark.parametrize("text_encoder", [False, True], ids=["denoiser", "and text encoder"])
def test_an_adapter_is_measured(held_out, base, split_images, tmp_path, text_encoder):  # noqa: F811
    words = [word for word in held_out() if not word.startswith(("--denoiser", "--sampling"))]
    words += [f"--base={base}", "--lora.rank=2", f"--lora.text_encoder={str(text_encoder).lower()}"]
    words += ["--optimizer.learning_rate=0.05", "--validation.num_images=40"]
    load_script("train_lora").main(words)
    records = lines(tmp_path / "run")
    assert len({record["averaged_loss"] for record in records}) == len({record["loss"] for record in records}) == 3
    pipeline = ImprovedLDMPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path / "run")
    mean = mean_losses(pipeline, split_images, make_objective("flow"))
    assert records[-1]["averaged_loss_by_level"] == pytest.approx(mean.tolist(), rel=1e-5)


def test_few_images_and_none_are_said(held_out, images, tmp_path, capsys):
    script = load_script("train_t2i")
    script.main(held_out("few", **{"validation.num_images": 50, "training.steps": 1}))
    said = capsys.readouterr().out
    assert f"held-out loss every 2 steps and at the end, on {NUM_HELD_OUT} images, all that there are of 50: " in said
    words = held_out("none", **{"data.source": images / "train.parquet", "training.steps": 1})
    script.main([word for word in words if "validation" not in word])
    assert "no held-out loss: `data` has no local split validation or test;" in capsys.readouterr().out
    assert not (tmp_path / "none" / VALIDATION).exists()


@pytest.mark.parametrize("batch_size", [1, 32, 128, 4096])
@pytest.mark.parametrize("num_images", [1, 64, 1000])
def test_the_default_costs_at_most_two_percent(tmp_path, batch_size, num_images):
    training, validation = {"trackers": [], "batch_size": batch_size}, {"num_images": num_images}
    values = {"output_dir": str(tmp_path), "training": training, "validation": validation}
    run = start_run(RunConfig.model_validate(values))
    every = steps_between(run)
    passes = 2 * LEVELS * num_images  # of images through a model; a training step costs three of its images
    assert passes <= 0.02 * every * 3 * batch_size and every % 100 == 0
    assert every == 100 or passes > 0.02 * (every - 100) * 3 * batch_size


def test_distances_are_those_of_the_evaluation(held_out, split_images, tmp_path):
    features = {"validation.samples_every": 6, "validation.num_samples": NUM_HELD_OUT}
    load_script("train_t2i").main(held_out(**features, **{"validation.features": "embedded:judge"}))
    (record,) = [line for line in lines(tmp_path / "run") if "samples" in line]
    assert (record["samples"], record["reference_images"], record["features"]) == (40, 40, "embedded:judge")
    assert record["notes"]["fid"] == "measured on 40 images, needs at least 500"
    assert not (tmp_path / "run" / "validation-samples").exists()
    config = EvaluateConfig(
        pipeline=str(tmp_path / "run"),
        data=str(split_images),
        num_samples=NUM_HELD_OUT,
        features="embedded:judge",
        output_dir=tmp_path / "evaluated",
        obedience={"judge": None},
        batch_size=8,
        cpu_threads=1,
    )
    load_script("evaluate").main(config)
    scores = json.loads((tmp_path / "evaluated" / "metrics.json").read_text(encoding="utf-8"))["scores"]
    for name in ("fid", "kid"):
        assert record[name] == pytest.approx(scores[name], rel=1e-4)


def test_trackers_get_the_numbers_and_the_grids(held_out, tmp_path):
    more = {"validation.samples_every": 4, "validation.num_samples": 6, "validation.features": "embedded:judge"}
    load_script("train_t2i").main(held_out(**more, **{"sampling.every": 3, "training.trackers": "[tensorboard]"}))
    (folder,) = (tmp_path / "run" / "logs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    records = [line for line in lines(tmp_path / "run") if "loss" in line]
    for name in ("loss", "averaged_loss"):
        logged = [(event.step, event.value) for event in events.Scalars(f"validation/{name}")]
        assert logged == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in records]
    level = [event.value for event in events.Scalars(f"validation/loss_by_level/{LEVELS}")]
    assert level == pytest.approx([line["loss_by_level"][-1] for line in records], rel=1e-6)
    assert "validation/fid_6_samples_embedded_judge" in events.Tags()["scalars"]
    pictures = events.Images("samples")
    assert [event.step for event in pictures] == [3, 6]
    with Image.open(tmp_path / "run" / "samples" / "step-0000006.png") as grid:
        assert (pictures[-1].width, pictures[-1].height) == grid.size


@pytest.mark.slow
def test_the_picture_of_a_run_that_memorises_shows_it(held_out, split_images, tmp_path):
    (tmp_path / "few").mkdir()
    pq.write_table(pq.read_table(split_images / "train.parquet").slice(0, 20), tmp_path / "few" / "train.parquet")
    shutil.copy(split_images / "test.parquet", tmp_path / "few")
    plain = {"transform.flip_probability": 0, "transform.crop_policy": "resize_then_crop", "transform.min_crop": 1}
    plain |= {"transform.reduce_probability": 0, "transform.crop_position": "centre"}
    long = {"training.steps": 500, "training.checkpoint_every": 500, "validation.every": 50, "cache.passes": 1}
    long |= {"denoiser.options": "{hidden_size: 128, num_layers: 4, num_attention_heads: 4, patch_size: 4}"}
    recipe = {"optimizer.learning_rate": 2e-3, "optimizer.ema_decay": 0.97, "training.batch_size": 20}
    recipe |= {"data.source": tmp_path / "few", "validation.num_images": 40}
    words = held_out(**plain, **long, **recipe, **{"training.log_every": 50})
    load_script("train_t2i").main(words)
    trained = [record["loss"] for record in history(tmp_path / "run")]
    for name in ("loss", "averaged_loss"):
        losses = [line[name] for line in lines(tmp_path / "run")]
        assert losses[-1] > 1.2 * min(losses)
    assert trained[-1] < 0.5 * trained[0] and trained[-1] < 0.5 * losses[-1]
    with Image.open(tmp_path / "run" / "loss.png") as picture:
        assert picture.width > 2 * picture.height, "two panels"
