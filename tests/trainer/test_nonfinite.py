"""Runs with NaN and infinity on real images, some of whose cached latents are damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from improved_ldm.manifest import write_manifest
from improved_ldm.trainer.config import OptimizerConfig
from improved_ldm.trainer.nonfinite import NonFiniteLossError, pass_nonfinite_to_gradient
from improved_ldm.trainer.optimizer import WeightAverage, make_optimizer
from tests.scripts import launch
from tests.trainer.conftest import load_script, make_arguments
from tests.trainer.test_runs import assert_same_weights, weights

STEPS = {"training.steps": 12, "training.checkpoint_every": 4}  # each of the 96 images is seen once


@pytest.fixture(scope="module")
def filled_cache(images, tmp_path_factory) -> Path:
    """A folder with the cache of a short run."""
    folder = tmp_path_factory.mktemp("filled")
    values = {"training.steps": 1, "cache.folder": folder / "cache"}
    load_script("train_t2i").main(make_arguments(images, folder / "run", **values))
    return folder / "cache"


@pytest.fixture
def cache(filled_cache, tmp_path) -> Path:
    """A copy of that folder that can be damaged."""
    return Path(shutil.copytree(filled_cache, tmp_path / "cache"))


def spoil(cache: Path, value: float, rows=slice(5, 6), name: str = "latents"):
    """Write a value to rows of a tensor in the only shard, as if it had been encoded."""
    (shard,) = cache.glob("*/*.safetensors")
    tensors = load_file(shard)
    tensors[name][rows] = value
    save_file(tensors, shard)
    write_manifest(shard.parent)


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "value, options",
    [
        (float("inf"), {}),
        (float("nan"), {"training.gradient_accumulation_steps": 2, "training.steps": 6}),
        (1e30, {"training.mixed_precision": "no", "training.log_every": 5}),  # finite; its square is not
        (float("nan"), {"denoiser.name": "unet", "training.log_every": 1}),
    ],
    ids=["infinity", "accumulated", "huge", "unet"],
)
def test_a_spoilt_image_costs_its_step_and_no_more(arguments, tmp_path, cache, value, options, capsys):
    spoil(cache, value)
    load_script("train_t2i").main(arguments(**STEPS | {"cache.folder": cache} | options))
    run = tmp_path / "run"
    assert all(tensor.isfinite().all() for tensor in weights(run).values())
    records = history(run)
    assert sum(record.get("skipped_steps", 0) for record in records) == 1
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["skipped_steps"] == 1
    assert "1 in all; their loss or gradient is NaN or infinite" in capsys.readouterr().out
    (file,) = (run / "nonfinite").iterdir()
    step = int(file.name[5:13])
    assert any(record["step"] >= step and "skipped_steps" in record for record in records)
    kept = load_file(file)
    assert (
        len(kept["latents"]) == 8
        and kept["latents"].abs().flatten(1).amax(1).ge(1e30).sum() + kept["latents"].isnan().flatten(1).any(1).sum()
        == 1
    )
    assert not kept["loss"].isfinite()
    assert kept["timesteps"].shape == kept["drops_control"].shape == (8,) and "text.hidden_states" in kept
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"step": str(step), "process": "0"}


def test_the_skipped_step_changes_nothing(arguments, tmp_path, cache):
    spoil(cache, float("nan"))
    steps = {"training.keep_checkpoints": 12, "training.checkpoint_every": 1, "training.log_every": 1}
    load_script("train_t2i").main(arguments(**STEPS | steps | {"cache.folder": cache}))
    (record,) = [record for record in history(tmp_path / "run") if "skipped_steps" in record]
    assert record["loss"] is None and record["gradient_norm"] is None
    before, after = (
        tmp_path / "run" / "checkpoints" / f"step-{step:08d}" for step in (record["step"] - 1, record["step"])
    )
    for name in ("model.safetensors", "ema.safetensors"):
        torch.testing.assert_close(load_file(before / name), load_file(after / name), rtol=0, atol=0)
    one, other = (torch.load(path / "optimizer.bin", weights_only=True)["state"] for path in (before, after))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_with_skipped_steps_in_two_parts_is_the_same_run(arguments, tmp_path, cache):
    spoil(cache, float("inf"), slice(0, 96, 40))
    script, options = load_script("train_t2i"), STEPS | {"cache.folder": cache}
    script.main(arguments("whole", **options))
    script.main(arguments("parts", **options | {"training.steps": 6}))
    script.main(arguments("parts", **options))
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    totals = [
        json.loads((tmp_path / name / "metrics.json").read_text(encoding="utf-8"))["skipped_steps"]
        for name in ("whole", "parts")
    ]
    assert totals[0] == totals[1] > 1


@pytest.mark.slow
def test_one_process_with_a_spoilt_image_skips_the_step_on_both(arguments, tmp_path, cache):
    spoil(cache, float("nan"))
    arguments = arguments(**STEPS | {"training.steps": 6, "cache.folder": cache})
    process = launch(arguments, processes=2)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    run = tmp_path / "run"
    assert sum(record.get("skipped_steps", 0) for record in history(run)) == 1
    assert all(tensor.isfinite().all() for tensor in weights(run).values())
    losses = [load_file(file)["loss"].isfinite().item() for file in (run / "nonfinite").glob("*-rank[01].safetensors")]
    assert sorted(losses) == [False, True]  # only one process reads it


@pytest.mark.parametrize("limit", [0, 3, 100])
def test_a_run_that_only_skips_stops(arguments, tmp_path, cache, limit):
    spoil(cache, float("nan"), slice(None))
    options = STEPS | {"cache.folder": cache, "training.max_skipped_steps": limit}
    with pytest.raises(NonFiniteLossError, match=f"`training.max_skipped_steps` is {limit}"):
        load_script("train_t2i").main(arguments(**options))
    records = history(tmp_path / "run")
    assert all(record["loss"] is None for record in records)
    assert records[-1]["step"] == {0: 2, 3: 4, 100: 8}[limit]  # more than half of 12
    for checkpoint in (tmp_path / "run").glob("checkpoints/step-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spoilt_caption_is_skipped_and_not_taken_for_none(arguments, tmp_path, cache, value):
    spoil(cache, value, slice(0, 1), "text.hidden_states")
    load_script("train_t2i").main(arguments(**STEPS | {"cache.folder": cache}))
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["skipped_steps"] >= 1


def test_a_run_whose_samples_are_nan_is_saved_without_them(arguments, tmp_path, capsys):
    hot = {
        "optimizer.learning_rate": "1e9",
        "training.steps": 2,
        "training.max_skipped_steps": 2,
        "sampling.every": 1,
    }
    load_script("train_t2i").main(arguments(**hot))
    run, output = tmp_path / "run", capsys.readouterr().out
    assert "sampling failed: the latents are NaN or infinite after step" in output
    assert "training continues" in output
    assert (run / "metrics.json").exists() and not (run / "samples.png").exists()
    assert "samples.png" not in (run / "README.md").read_text(encoding="utf-8")
    assert DiffusionPipeline.from_pretrained(run).denoiser is not None
    with pytest.raises(SystemExit, match="not evaluated: the latents are NaN or infinite after step"):
        evaluate(run, arguments)
    assert not (tmp_path / "evaluated" / "metrics.json").exists()


def evaluate(run: Path, arguments):
    """Run the evaluation script on a run."""
    script = load_script("evaluate")
    data = next(word for word in arguments() if word.startswith("--data.source="))
    config = script.parse_config_or_exit(
        script.EvaluateConfig,
        [
            f"--pipeline={run}",
            data.replace("--data.source", "--data"),
            "--split=train",
            f"--output_dir={run.parent / 'evaluated'}",
            "--num_samples=8",
            "--num_reference_images=8",
            "--batch_size=8",
            "--features=embedded:judge",
            "--scores={kid_subset_size: 4, kid_subsets: 2, nearest_k: 2, inception_splits: 1}",
        ],
    )
    with script.exit_on_error("not evaluated"):
        script.main(config)


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))


@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_skipped_steps_leave_the_optimizer_and_the_average_as_they_are(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.1, ema_decay=0.5)
    inputs = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))

    def trained(skips: tuple[int, ...]):
        model = tiny_model()
        optimizer, average = make_optimizer(model.parameters(), config), WeightAverage(model, config.ema_decay)
        kept = iter(inputs)
        for step in range(len(inputs) + len(skips)):
            bad = step in skips
            loss = model(torch.full((4, 5), torch.nan) if bad else next(kept)).square().mean()
            loss.backward()
            skipped = ~nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
            optimizer.skip_where(skipped)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model, skipped)
        return model.state_dict(), average.state_dict(), optimizer.state_dict()

    plain = trained(())
    for skips in ((0,), (3,), (0, 1, 5, 7)):
        torch.testing.assert_close(trained(skips), plain, rtol=0, atol=0)


def test_the_average_is_that_of_torch():
    model, decay = tiny_model(), 0.9
    ours = WeightAverage(model, decay)
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update_parameters(model, torch.tensor(False))
        theirs.update_parameters(model)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_is_told_by_the_gradient(value):
    weight = torch.tensor(2.0, requires_grad=True)
    pass_nonfinite_to_gradient(weight.detach() * value + weight).backward()  # its own gradient is 1
    assert not weight.grad.isfinite()
    weight.grad = None
    pass_nonfinite_to_gradient(3 * weight, torch.ones(2, 3), torch.ones(2, dtype=torch.bool), None).backward()
    assert weight.grad == 3
    pass_nonfinite_to_gradient(3 * weight, torch.ones(2, 3), torch.tensor([0.0, value])).backward()
    assert not weight.grad.isfinite()


def test_the_average_reads_nothing_on_the_host():
    model = tiny_model().to("meta")  # on this device, every read is an error
    average = WeightAverage(model, 0.9).to("meta")
    average.update_parameters(model, torch.empty((), dtype=torch.bool, device="meta"))


def test_the_average_with_warmup_is_that_of_diffusers():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    ours, theirs = WeightAverage(model, 0.6, warmup=True), EMAModel(model.parameters(), decay=0.6)
    for _ in range(12):
        with torch.no_grad():
            model.weight.normal_()
        ours.update_parameters(model, torch.tensor(False))
        theirs.step(model.parameters())
    torch.testing.assert_close(list(ours.module.parameters()), theirs.shadow_params)
