"""Runs in stages of increasing resolution."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

from improved_ldm.diffusion.objectives import make_objective
from improved_ldm.manifest import write_manifest
from improved_ldm.models.family import DENOISERS
from improved_ldm.settings import parse_config
from improved_ldm.trainer.config import RunConfig
from improved_ldm.trainer.stages import begin_stage, list_stages
from improved_ldm.transfer import transfer
from tests.scripts import launch, wait_for
from tests.trainer.conftest import ROOT, load_script
from tests.trainer.test_runs import assert_same_weights

STAGES = "[{resolution: 16, steps: 4}, {resolution: 32, steps: 4, batch_size: 4, learning_rate: 5.0e-4}]"


BUCKETS = {"transform.buckets": True, "transform.bucket_step": 8, "transform.max_aspect": 4}


def denoiser_weights(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    return pipeline.denoiser.state_dict()


def staged(arguments, output="run", **overrides):
    return arguments(output, **{"stages": STAGES, "transform.flip_probability": 0.5, **overrides})


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_a_run_in_two_stages_leaves_a_pipeline_of_each(arguments, tmp_path, name, prediction):
    load_script("train_t2i").main(staged(arguments, **{"denoiser.name": name, "objective.prediction": prediction}))
    low, high = (
        DiffusionPipeline.from_pretrained(folder) for folder in (tmp_path / "run" / "stage-1-16", tmp_path / "run")
    )
    assert (low.default_size, high.default_size) == ((16, 16), (32, 32))
    assert low.config.lineage is None
    (step,) = high.config.lineage
    assert step["resolution"] == [16, 32] and step["steps"] == 4 and step["source"].endswith("stage-1-16")
    if prediction == "flow":
        assert high.scheduler.config.shift == 2 * low.scheduler.config.shift
    else:
        ratios = [s.alphas_cumprod.double() / (1 - s.alphas_cumprod.double()) for s in (high.scheduler, low.scheduler)]
        torch.testing.assert_close(4 * ratios[0], ratios[1], rtol=1e-4, atol=0)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "stage-1-16`, pixels 16 to 32, steps 4, positions resample, noise rescale" in card
    image = high("a photo of a sneaker", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (32, 32, 3)
    for folder in (tmp_path / "run", tmp_path / "run" / "stage-1-16"):
        assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["images_seen"] > 0
    assert len(yaml.safe_load((tmp_path / "run" / "stages.yaml").read_text(encoding="utf-8"))["stages"]) == 2


@pytest.mark.parametrize("name", ["dit", "mdt"])
def test_a_stage_may_have_a_height_and_a_width(arguments, tmp_path, name):
    stages = STAGES.replace("32,", "[16, 64],")  # an area of 32 x 32 pixels
    load_script("train_t2i").main(staged(arguments, stages=stages, **{"denoiser.name": name}))
    low, wide = (
        DiffusionPipeline.from_pretrained(folder) for folder in (tmp_path / "run" / "stage-1-16", tmp_path / "run")
    )
    assert (low.default_size, wide.default_size) == ((16, 16), (16, 64))
    assert wide.denoiser.config.sample_size == 2 * low.denoiser.config.sample_size
    assert wide.config.lineage[0]["resolution"] == [16, [16, 64]]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert [stage["resolution"] for stage in metrics["stages"]] == [16, [16, 64]]
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "| images | 16x64 pixels" in card and "at 16 pixels, " in card and "at 16x64 pixels" in card
    image = wide("a photo of a sneaker", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (16, 64, 3)
    load_script("train_t2i").main(staged(arguments, stages=stages, **{"denoiser.name": name}))  # it is the same run


def test_a_run_whose_files_have_an_empty_after_resumes(arguments, tmp_path):
    """Earlier versions wrote `after: null` into every configuration that is not of a later stage."""
    script, output = load_script("train_t2i"), tmp_path / "run"
    script.main(staged(arguments))
    checkpoint = output / "stage-1-16" / "checkpoints" / "step-00000004"
    for file in (checkpoint / "config.yaml", output / "stage-1-16" / "config.yaml", output / "stages.yaml"):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert "after" not in values
        file.write_text(yaml.safe_dump(values | {"after": None}, sort_keys=False), encoding="utf-8")
    write_manifest(checkpoint)
    longer = STAGES.replace("{resolution: 32, steps: 4", "{resolution: 32, steps: 6")
    script.main(staged(arguments, stages=longer))
    assert json.loads((output / "metrics.json").read_text(encoding="utf-8"))["stages"][-1]["steps"] == 6
    kept = yaml.safe_load((output / "checkpoints" / "step-00000006" / "config.yaml").read_text(encoding="utf-8"))
    assert kept["after"] == {
        "source": str(output / "stage-1-16"),
        "steps": 4,
        "resolution": [16, 32],
        "condition": None,
        "positions": "resample",
        "noise": "rescale",
        "optimizer": "carry",
        "average": "carry",
    }
    assert parse_config(RunConfig, ["--config", str(output / "stage-1-16" / "config.yaml")]).training.steps == 4


@pytest.mark.parametrize("stop_at", ["stage-1-16", ""], ids=["first", "second"])
def test_a_run_that_is_stopped_inside_a_stage_goes_on_to_the_same_weights(arguments, tmp_path, monkeypatch, stop_at):
    script = load_script("train_t2i")
    script.main(staged(arguments, "whole"))

    from improved_ldm.trainer import denoiser_task

    plain = denoiser_task.batch_loss
    folder, calls = tmp_path / "broken" / stop_at, []

    def interrupted(accelerator, denoiser, *rest):
        calls.append(1)
        in_stage = denoiser.config.sample_size == (4 if stop_at else 8)
        if in_stage and len(calls) == (3 if stop_at else 7):
            signal.raise_signal(signal.SIGTERM)
        return plain(accelerator, denoiser, *rest)

    monkeypatch.setattr(denoiser_task, "batch_loss", interrupted)
    with pytest.raises(SystemExit):
        script.main(staged(arguments, "broken"))
    assert not (folder / "metrics.json").exists()
    monkeypatch.setattr(denoiser_task, "batch_loss", plain)
    script.main(staged(arguments, "broken"))
    for part in ("", "stage-1-16"):
        torch.testing.assert_close(
            denoiser_weights(tmp_path / "broken" / part), denoiser_weights(tmp_path / "whole" / part), rtol=0, atol=0
        )


@pytest.mark.slow
def test_a_run_that_is_killed_in_its_second_stage_goes_on_to_the_same_weights(arguments, tmp_path):
    def steps(number):
        return STAGES.replace("32, steps: 4", f"32, steps: {number}")

    process = launch(staged(arguments, "killed", stages=steps(100_000)))
    wait_for(tmp_path / "killed" / "checkpoints" / "step-00000004", process)
    process.kill()
    process.wait()
    reached = max(int(path.name[5:]) for path in (tmp_path / "killed" / "checkpoints").glob("step-*"))
    for name in ("killed", "whole"):
        load_script("train_t2i").main(staged(arguments, name, stages=steps(reached + 3)))
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("carried", ["carry", "reset"])
@pytest.mark.slow
def test_optimizer_and_average_are_carried_or_begun_afresh(arguments, tmp_path, carried):
    stages = STAGES.replace("steps: 4, batch", f"optimizer: {carried}, average: {carried}, steps: 4, batch")
    argv = staged(arguments, stages=stages)
    load_script("train_t2i").main(argv)
    stage = list_stages(parse_config(RunConfig, argv, ROOT / "training" / "configs" / "quickstart.yaml"), "text")[1]
    low = DiffusionPipeline.from_pretrained(tmp_path / "run" / "stage-1-16").denoiser
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # otherwise, the stage would resume with its own
    objective = make_objective("epsilon")
    start = begin_stage(stage, low, objective, factor=4)
    assert start.model.config.sample_size == 8 == 2 * low.config.sample_size
    if carried == "reset":
        assert start.averaged is None and start.optimizer_state is None
        return
    assert start.optimizer_state["state"]
    kept, average = start.averaged.state_dict(), low.state_dict()
    assert all(torch.equal(kept[name], average[name]) for name in average if name != "positions")
    raw = start.model.state_dict()
    assert any(not torch.equal(raw[name], kept[name]) for name in kept)


def test_a_stage_crops_at_the_scale_of_the_last_one(arguments, tmp_path):
    stages = STAGES.replace("steps: 4}", "steps: 4, crop_policy: crop_at_target_scale}")
    config = parse_config(
        RunConfig, staged(arguments, stages=stages), ROOT / "training" / "configs" / "quickstart.yaml"
    )
    first, last = (stage.config for stage in list_stages(config, "text"))
    assert (first.transform.crop_policy, first.transform.target_scale) == ("crop_at_target_scale", 32)
    assert (last.transform.crop_policy, last.transform.target_scale) == (config.transform.crop_policy, None)
    assert (first.training.batch_size, last.training.batch_size) == (8, 4)
    assert (first.optimizer.learning_rate, last.optimizer.learning_rate) == (config.optimizer.learning_rate, 5e-4)
    assert last.output_dir == config.output_dir


def test_the_guidance_of_a_stage_is_kept_or_rescaled_from_the_stage_before(arguments):
    stages = "[{resolution: 16, steps: 4}, {resolution: 32, steps: 4, guidance: rescale}, {resolution: 64, steps: 4}]"
    argv = staged(arguments, stages=stages, **{"sampling.guidance_scale": 2.0})
    first, second, third = list_stages(
        parse_config(RunConfig, argv, ROOT / "training" / "configs" / "quickstart.yaml"), "text"
    )
    assert [stage.config.sampling.guidance_scale for stage in (first, second, third)] == [2.0, 3.0, 3.0]
    assert [record.get("guidance") for record in third.lineage] == ["rescale", None]


def test_a_class_conditional_run_has_stages_too(arguments, tmp_path):
    load_script("train_class_conditional").main(staged(arguments))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.default_size == (32, 32) and len(pipeline.config.lineage) == 1


@pytest.mark.parametrize(
    ("stages", "overrides", "message"),
    [
        (STAGES.replace("32,", "30,"), {}, "`resolution` of a stage is 30; it must be a multiple of 8"),
        (
            STAGES.replace("32,", "[32, 30],"),
            {},
            "`resolution` of a stage is 32x30; both sides must be multiples of 8",
        ),
        (STAGES.replace("32,", "32, positions: extrapolate,"), {"denoiser.name": "mdt"}, "positions are learned"),
        (STAGES.replace("32,", "[32, 64], positions: interpolate,"), {}, "`positions` is 'interpolate'"),
        (STAGES.replace("32,", "32, positions: interpolate,"), BUCKETS, "'interpolate'"),
        (
            STAGES.replace("16,", "16, crop_policy: crop_at_target_scale,").replace("32,", "8,"),
            {},
            "`target_scale` is 8",
        ),
    ],
    ids=["size", "sides", "positions", "shape", "buckets", "crop"],
)
def test_stages_that_cannot_begin_are_errors_before_the_first_does(arguments, tmp_path, stages, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_script("train_t2i").main(staged(arguments, stages=stages, **overrides))
    assert not list((tmp_path / "run").rglob("checkpoints"))


@pytest.mark.slow
def test_the_images_of_earlier_stages_are_counted_without_their_metrics(arguments, tmp_path):
    script, first = load_script("train_t2i"), tmp_path / "run" / "stage-1-16"
    script.main(staged(arguments))
    counted = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["stages"]
    assert len(counted) == 2
    for damage in (
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("[1]", encoding="utf-8"),
        Path.unlink,
    ):
        damage(first / "metrics.json")
        script.main(staged(arguments))
        assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["stages"] == counted
    for file in first.glob("checkpoints/*/ema.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="stage-1-16/checkpoints holds no intact checkpoint"):
        script.main(staged(arguments))


def test_a_stage_that_began_otherwise_is_not_gone_on_with(arguments, tmp_path):
    script = load_script("train_t2i")
    script.main(staged(arguments))
    with pytest.raises(ValueError, match=r"`after.noise` was 'rescale' and is 'keep'"):
        script.main(staged(arguments, stages=STAGES.replace("32,", "32, noise: keep,")))
    guided = {"stages": STAGES.replace("32,", "32, guidance: rescale,"), "sampling.guidance_scale": 2.0}
    script.main(staged(arguments, **guided))  # the weights are the same
    assert DiffusionPipeline.from_pretrained(tmp_path / "run").config.default_guidance_scale == 3.0
    with pytest.raises(ValueError, match=r"`after.steps` was 4 and is 6"):
        script.main(staged(arguments, stages=STAGES.replace("16, steps: 4", "16, steps: 6")))


@pytest.mark.slow
def test_a_transferred_pipeline_is_trained_on_with_its_own_schedule(arguments, tmp_path):
    script = load_script("train_t2i")
    script.main(arguments("low", **{"transform.resolution": 16, "objective.prediction": "epsilon"}))
    high = transfer(DiffusionPipeline.from_pretrained(tmp_path / "low"), 32)
    high.save_pretrained(tmp_path / "high")
    source = {"denoiser.pretrained": tmp_path / "high", "denoiser.subfolder": "transformer"}
    script.main(arguments(**source, **{"objective.prediction": "epsilon"}))
    trained = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert trained.scheduler.config.trained_betas == high.scheduler.config.trained_betas
    assert [record["source"] for record in trained.config.lineage] == [".../low", ".../high"]
    with pytest.raises(ValueError, match="for the prediction 'epsilon', not 'flow'"):
        script.main(arguments("flow", **source))
