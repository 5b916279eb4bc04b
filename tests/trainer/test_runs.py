"""Complete small runs of the training scripts on real images."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file

import improved_ldm  # noqa: F401  registers the pipeline
from improved_ldm.convert import disentangle
from improved_ldm.models.family import DENOISERS
from improved_ldm.picture_text import read_png_text
from improved_ldm.trainer.meter import MEASURED
from improved_ldm.trainer.nonfinite import NonFiniteLossError
from improved_ldm.trainer.reports import read_history
from tests.scripts import launch, wait_for
from tests.trainer.conftest import ROOT, load_script

SHARED = ROOT.parent / "shared" / "data"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    component = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    name = "unet" if component["unet"][0] else "transformer"
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def assert_same_weights(one: Path, other: Path):
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


def test_a_run_leaves_a_complete_folder(arguments, tmp_path):
    load_script("train_t2i").main(arguments())
    folder = tmp_path / "run"
    for name in ("model_index.json", "samples.png", "metrics.json", "loss.png", "README.md", "config.yaml"):
        assert (folder / name).stat().st_size > 0, name
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["images_seen"] == 6 * 8
    for name in ("samples.png", "control.png"):
        made = read_png_text(folder / name)
        assert "a photo of a" in made["prompt"] and json.loads(made["seed"])[0] == 0
        assert "original_size" in made["control"] and made["model"].startswith("DiTDenoiser, ")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    image = pipeline("a photo of a sneaker", flip=True, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32)
    assert pipeline.config.default_original_size == 28
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Not measured." in card
    assert "DiffusionPipeline.from_pretrained" in card


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_what_is_read_and_what_is_skipped_is_said(arguments, images, tmp_path, capsys, passes):
    table = pq.read_table(images / "train.parquet")
    captions = [caption if row % 40 else None for row, caption in enumerate(table["text"].to_pylist())]
    stored = [image if row != 7 else {"bytes": b"no image"} for row, image in enumerate(table["image"].to_pylist())]
    (tmp_path / "[a] set").mkdir()
    pq.write_table(pa.table({"image": stored, "text": captions}), tmp_path / "[a] set" / "0.parquet")
    (tmp_path / "[a] set" / "notes.txt").write_text("of this set", encoding="utf-8")
    options = {"data.source": tmp_path / "[a] set", "cache.passes": passes, "training.steps": 16}
    load_script("train_t2i").main(arguments(**options))
    said = capsys.readouterr().out
    assert said.count(f"reading 1 file, {len(captions)} rows; left out: 1 of another kind (.txt)") == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["skipped_rows"] == {"image cannot be decoded": 1}
    assert "| rows of the data skipped | 1 (image cannot be decoded) |" in (tmp_path / "run" / "README.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"cache.passes": 1},
        {"cache.passes": 0},
        {"denoiser.name": "mdt"},  # mDT also uses random masks
        {"optimizer.name": "adan", "optimizer.ema_every": 2, "optimizer.ema_warmup": True},
    ],
    ids=["cached", "streamed", "mdt", "adan"],
)
def test_a_run_in_two_parts_is_the_same_run(arguments, tmp_path, options):
    script = load_script("train_t2i")
    script.main(arguments("whole", **options))
    script.main(arguments("parts", **options, **{"training.steps": 3}))
    script.main(arguments("parts", **options))
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    histories = [read_history(tmp_path / name / "history.jsonl", print) for name in ("whole", "parts")]
    for record in (*histories[0], *histories[1]):
        for name in MEASURED:
            record.pop(name, None)
    assert histories[0] == histories[1]
    assert [record["step"] for record in histories[0]] == [2, 4, 6]


def test_a_killed_run_resumes_to_the_same_weights(arguments, tmp_path):
    process = launch(arguments("killed", **{"training.steps": 100_000}))
    wait_for(tmp_path / "killed" / "checkpoints" / "step-00000004", process)
    process.kill()
    process.wait()
    reached = max(int(path.name[5:]) for path in (tmp_path / "killed" / "checkpoints").glob("step-*"))
    for name in ("killed", "whole"):
        load_script("train_t2i").main(arguments(name, **{"training.steps": reached + 3}))
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_interrupt_stops_with_a_checkpoint(arguments, tmp_path):
    process = launch(arguments(**{"training.steps": 100_000, "training.checkpoint_every": 100_000}))
    wait_for(tmp_path / "run" / "history.jsonl", process)  # the loop has started
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    checkpoints = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(checkpoints) == 1, output
    assert checkpoints[0].startswith("step-"), output
    assert "the same command resumes from there" in output


@pytest.mark.slow
def test_two_processes_train_one_model_and_resume(arguments, tmp_path):
    for steps in (2, 4):
        process = launch(arguments("two", **{"training.steps": steps}), processes=2)
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    process = launch(arguments("two_whole", **{"training.steps": 4}), processes=2)
    assert process.wait(timeout=240) == 0
    assert_same_weights(tmp_path / "two", tmp_path / "two_whole")
    assert json.loads((tmp_path / "two" / "metrics.json").read_text(encoding="utf-8"))["images_seen"] == 4 * 8 * 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"cache.passes": 2}, {"cache.passes": 0}], ids=["cached", "streamed"])
def test_the_same_images_train_the_same_model_however_they_are_split(arguments, tmp_path, options):
    """One process, one with accumulation and data workers, and two: the same losses up to rounding."""
    options = options | {"denoiser.name": "mdt", "training.steps": 8, "training.log_every": 1, "hub.push_every": 0}
    splits = {
        "whole": {"training.batch_size": 16},
        "parts": {"training.batch_size": 4, "training.gradient_accumulation_steps": 4, "data.num_workers": 2},
        "processes": {"training.batch_size": 4, "training.gradient_accumulation_steps": 2, "data.num_workers": 1},
    }
    histories = {}
    for name, split in splits.items():
        process = launch(arguments(name, **options, **split), processes=1 + (name == "processes"))
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
        histories[name] = read_history(tmp_path / name / "history.jsonl", print)
    for key in ("images", "loss", "gradient_norm"):
        expected = torch.tensor([record[key] for record in histories["whole"]])
        for name in ("parts", "processes"):
            got = torch.tensor([record[key] for record in histories[name]])
            torch.testing.assert_close({name: got}, {name: expected}, rtol=1e-4, atol=0)


@pytest.mark.parametrize("passes", [0, 1], ids=["streamed", "cached"])
def test_a_run_learns_a_variable_that_is_off_by_default(arguments, tmp_path, passes):
    options = {"denoiser.control_parts": "[size, colour]", "cache.passes": passes, "optimizer.learning_rate": 1e-2}
    load_script("train_t2i").main(arguments(**options, **{"training.steps": 40}))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["skipped_steps"] == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    dark, bright = (
        pipeline("a photo of a sneaker", colour=colour, generator=torch.Generator().manual_seed(0), output_type="pt")
        for colour in ((0.1, 0.1, 0, 0), (0.9, 0.1, 0, 0))
    )
    assert (bright.images - dark.images).abs().max() > 0


@pytest.mark.parametrize("name", DENOISERS)
def test_class_conditional_run(arguments, tmp_path, name):
    load_script("train_class_conditional").main(arguments(**{"denoiser.name": name}))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.config.class_names[7] == "Sneaker"
    assert pipeline(class_labels=7).images[0].size == (32, 32)


@pytest.mark.parametrize("conditioning", ["disentangled", "published"])
@pytest.mark.parametrize("name", DENOISERS)
def test_every_backbone_trains_samples_and_loads(arguments, tmp_path, name, conditioning):
    load_script("train_t2i").main(
        arguments(
            **{
                "denoiser.name": name,
                "denoiser.conditioning": conditioning,
                "optimizer.learning_rate": 5e-3,
                "optimizer.warmup_steps": 5,
                "training.steps": 90,
                "training.batch_size": 16,
                "training.log_every": 5,
                "training.checkpoint_every": 90,
            }
        )
    )
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "run" / "history.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline.denoiser) is DENOISERS[name]
    image = pipeline("a photo of a sneaker", generator=torch.Generator().manual_seed(0), output_type="np").images[0]
    assert image.shape == (32, 32, 3) and np.isfinite(image).all()


@pytest.mark.parametrize("name", DENOISERS)
def test_bfloat16_training(arguments, tmp_path, name):
    load_script("train_t2i").main(arguments(**{"training.mixed_precision": "bf16", "denoiser.name": name}))
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())


def test_a_spoilt_run_stops_and_leaves_only_whole_checkpoints(arguments, tmp_path):
    spoilt = {"optimizer.learning_rate": "1.0e9", "training.checkpoint_every": 1, "training.keep_checkpoints": 10}
    with pytest.raises(NonFiniteLossError):
        load_script("train_t2i").main(arguments(**spoilt))
    for checkpoint in (tmp_path / "run").glob("checkpoints/step-*"):
        tensors = load_file(checkpoint / "model.safetensors").values()
        assert all(tensor.isfinite().all() for tensor in tensors), checkpoint


def test_accumulated_micro_batches_train_the_same_model(arguments, tmp_path):
    # Adam's first steps divide gradients by their own size, so weights without a gradient would differ in rounding
    steady = {"training.steps": 3, "training.checkpoint_every": 3, "optimizer.learning_rate": 1e-4}
    script = load_script("train_t2i")
    script.main(arguments("whole", **steady, **{"training.batch_size": 32}))
    parts = {"training.batch_size": 16, "training.gradient_accumulation_steps": 2}
    script.main(arguments("parts", **steady, **parts))
    histories = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "history.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("whole", "parts")
    ]
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)
    torch.testing.assert_close(weights(tmp_path / "whole"), weights(tmp_path / "parts"), rtol=0, atol=3e-4)


def test_a_wrong_option_stops_before_any_work_and_can_be_corrected(arguments, tmp_path):
    script = load_script("train_t2i")
    with pytest.raises(SystemExit, match=r"`denoiser.options` is .* it has 'depth'; it may have"):
        script.main(arguments(**{"denoiser.options": "{depth: 3}"}))
    assert not (tmp_path / "run").exists()
    script.main(arguments(**{"training.steps": 2}))
    assert (tmp_path / "run" / "model_index.json").exists()


def test_a_set_with_an_unknown_column_is_refused_before_any_work(arguments, tmp_path):
    with pytest.raises(ValueError, match="the set has the columns image, label, text"):
        load_script("train_t2i").main(arguments(**{"data.caption_column": "caption"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger sets are not here")
@pytest.mark.parametrize("name", ["emoji-512", "stamps"])
def test_other_real_images_train_with_the_same_command(arguments, tmp_path, name):
    source = {"data.source": SHARED / name, "cache.passes": 0, "training.steps": 24}
    load_script("train_t2i").main(arguments(**source))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["images_seen"] == 24 * 8
    image = DiffusionPipeline.from_pretrained(tmp_path / "run")("a face", output_type="pt").images
    assert image.shape == (1, 3, 32, 32)


LEARNED = {
    "objective.prediction": "epsilon",
    "objective.beta_schedule": "linear",
    "objective.learned_variance": True,
}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_learned_variance_is_trained_and_saved_with_the_scheduler_that_reads_it(arguments, tmp_path, name):
    options = {"denoiser.name": name, "sampling.guidance_options": "{channels: 3}", "sampling.num_inference_steps": 4}
    load_script("train_class_conditional").main(arguments(**LEARNED, **options))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert isinstance(pipeline.scheduler, DDPMScheduler) and pipeline.scheduler.config.beta_schedule == "linear"
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline.denoiser.config.out_channels == 2 * pipeline.denoiser.config.in_channels
    assert pipeline.config.guidance_options == {"channels": 3}
    output = next(value for key, value in pipeline.denoiser.named_parameters() if value.shape[0] in (8, 32))
    assert output[len(output) // 2 :].abs().max() > 0  # the variance's part starts at zero
    image = pipeline(class_labels=7, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def test_a_pretrained_denoiser_without_a_variance_does_not_learn_one(arguments, tmp_path, tiny_denoiser):
    tiny_denoiser("pixart", text_dim=96, sample_size=8).save_pretrained(tmp_path / "denoiser")
    with pytest.raises(ValueError, match=r"`objective\.learned_variance` is true, .* 4 output channels; .* needs 8"):
        load_script("train_t2i").main(arguments(**LEARNED, **{"denoiser.pretrained": tmp_path / "denoiser"}))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampling.sampler": "ddim"}, r"`sampling\.sampler` is 'ddim'; for a flow"),
        (
            {"objective.prediction": "epsilon", "sampling.sampler": "euler"},
            r"`sampling\.sampler` is 'euler'; for the prediction 'epsilon'",
        ),
        (LEARNED | {"sampling.sampler": "ddpm", "sampling.timestep_spacing": "trailing"}, r"must be 'linspace'"),
        (LEARNED | {"objective.prediction": "flow"}, r"`learned_variance` is true"),
        ({"sampling.guidance_options": "{channel: 3}"}, r"`guidance_options` is"),
        ({"objective.beta_start": 0.5}, r"`objective\.beta_start` is given, but `objective\.prediction` is 'flow'"),
        ({"objective.prediction": "epsilon", "objective.shift": 3}, r"`objective\.shift` is given"),
        (LEARNED | {"sampling.num_inference_steps": 1}, r"`sampling\.num_inference_steps` is 1; .*Take more steps"),
        (
            {"objective.prediction": "epsilon", "sampling.timestep_spacing": "leading"}
            | {"sampling.num_inference_steps": 1000},
            r"`sampling\.num_inference_steps` is 1000; .*starts at timestep 1000",
        ),
    ],
)
def test_an_objective_and_its_sampler_are_checked_before_any_work(arguments, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        load_script("train_t2i").main(arguments(**options))
    assert not (tmp_path / "run").exists()


def test_more_guided_channels_than_latents_have_are_refused_before_any_work(arguments, tmp_path):
    with pytest.raises(ValueError, match=r"`guidance_options\.channels` is 9; it must be at most 4"):
        load_script("train_t2i").main(arguments(**{"sampling.guidance_options": "{channels: 9}"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variance", [False, True], ids=["mean", "variance"])
def test_a_converted_denoiser_is_trained_on(arguments, tmp_path, tiny_denoiser, variance):
    published = tiny_denoiser(
        "pixart",
        text_dim=96,
        conditioning="published",
        sample_size=8,
        hidden_size=48,
        out_channels=8 if variance else 4,
    )
    disentangled, _ = disentangle(published)
    disentangled.save_pretrained(tmp_path / "denoiser")
    load_script("train_t2i").main(arguments(**{"denoiser.pretrained": tmp_path / "denoiser"}))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline.denoiser) is type(disentangled)
    assert pipeline.config.lineage == [{"source": ".../denoiser"}]
    change = (pipeline.denoiser.modulation.linear.weight - disentangled.modulation.linear.weight).abs().max()
    assert 0 < change < 0.1


def test_a_pretrained_denoiser_of_another_kind_is_an_error(arguments, tmp_path, tiny_denoiser):
    tiny_denoiser("pixart", text_dim=96, sample_size=4).save_pretrained(tmp_path / "denoiser")
    with pytest.raises(ValueError, match=r"`sample_size` of the denoiser in .* is 4; the run needs 8"):
        load_script("train_t2i").main(arguments(**{"denoiser.pretrained": tmp_path / "denoiser"}))
