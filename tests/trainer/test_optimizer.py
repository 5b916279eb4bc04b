"""The optimizers of a recipe, their learning rate and the average of the weights."""

import copy
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from improved_ldm.settings import ConfigError, parse_config
from improved_ldm.trainer.checkpoints import read_weights
from improved_ldm.trainer.config import OptimizerConfig, RunConfig
from improved_ldm.trainer.optimizer import WeightAverage, fitting_state, make_optimizer, scaled
from tests.trainer.conftest import load_script
from tests.trainer.test_runs import assert_same_weights


def adan_by_hand(weight: float, gradients: list[float], rate: float, decay: float, eps: float) -> float:
    """The weight after Adan's updates, by algorithm 1 of Xie et al., 2024, with 1 − β in place of its β."""
    b1, b2, b3 = 0.98, 0.92, 0.99
    m = v = n = 0.0
    before = gradients[0]
    for k, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g - before)
        n = b3 * n + (1 - b3) * (g + b2 * (g - before)) ** 2
        size = rate / ((n / (1 - b3**k)) ** 0.5 + eps)
        weight = (weight - size * (m / (1 - b1**k) + b2 * v / (1 - b2**k))) / (1 + rate * decay)
        before = g
    return weight


def stepped(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradient: float) -> torch.Tensor:
    """The weight after a step."""
    weight.grad = torch.full_like(weight, gradient)
    optimizer.step()
    return weight.detach().clone()


def test_adan_is_that_of_its_paper():
    weight, gradients = nn.Parameter(torch.ones(1, dtype=torch.float64)), [0.3, -0.2, 0.5, 0.1]
    config = OptimizerConfig(name="adan", learning_rate=0.1, weight_decay=0.2, eps=1e-3)
    optimizer = make_optimizer([weight], config)
    for gradient in gradients:
        after = stepped(optimizer, weight, gradient)
    assert after.item() == pytest.approx(adan_by_hand(1.0, gradients, 0.1, 0.2, 1e-3), rel=1e-9)


@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_moments_that_a_stage_carries_over_keep_their_step_count(name):
    config = OptimizerConfig(name=name, learning_rate=0.1)
    weight = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([weight], config)
    for gradient in (0.5, 0.2, -0.1):
        stepped(optimizer, weight, gradient)
    again = nn.Parameter(weight.detach().clone())
    carried = make_optimizer([again], config)
    carried.load_state_dict(fitting_state(copy.deepcopy(optimizer.state_dict()), carried))
    assert torch.equal(stepped(carried, again, 0.3), stepped(optimizer, weight, 0.3))


def test_adan_without_timm_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    parse_config(RunConfig, [])
    with pytest.raises(ConfigError, match=r"`optimizer\.name` is adan, which needs timm: pip install timm"):
        parse_config(RunConfig, ["--optimizer.name", "adan"])


def test_betas_are_those_of_the_optimizer():
    assert OptimizerConfig().betas == (0.9, 0.95)
    adan = OptimizerConfig(name="adan")
    assert adan.betas == (0.98, 0.92, 0.99)
    assert OptimizerConfig.model_validate(adan.model_dump()) == adan
    with pytest.raises(ConfigError, match=r"`optimizer\.betas` .*adan has 3, by default 0\.98, 0\.92, 0\.99"):
        parse_config(RunConfig, ["--optimizer.name", "adan", "--optimizer.betas", "[0.9, 0.999]"])


@given(images=st.integers(1, 10_000), base=st.integers(1, 10_000))
def test_the_learning_rate_scales_with_the_images_per_step(images, base):
    for rule, power in (("sqrt", 0.5), ("linear", 1)):
        peak = scaled(OptimizerConfig(learning_rate=1e-6, lr_scaling=rule, lr_base_batch=base), images)
        assert peak.learning_rate == pytest.approx(1e-6 * (images / base) ** power)
        assert scaled(peak, images) == peak  # it is scaled once
    assert scaled(OptimizerConfig(), images) == OptimizerConfig()


def test_a_scaling_without_a_base_is_refused():
    with pytest.raises(ConfigError, match=r"`optimizer\.lr_base_batch` .*`lr_scaling` is sqrt, which needs a base"):
        parse_config(RunConfig, ["--optimizer.lr_scaling", "sqrt"])


def test_a_rate_that_is_scaled_to_nonsense_is_refused_before_the_folder_is_written(arguments, tmp_path):
    settings = {"optimizer.learning_rate": "0.05", "optimizer.lr_scaling": "linear", "optimizer.lr_base_batch": 1}
    with pytest.raises(ValueError, match=r"turns 0\.05 into 0\.4 for 8 images per step"):
        load_script("train_t2i").main(arguments(**settings))
    assert not (tmp_path / "run").exists()


def test_an_average_that_goes_on_has_warmed_up():
    torch.manual_seed(0)
    earlier, model = nn.Linear(2, 2), nn.Linear(2, 2)
    average = WeightAverage(model, 0.9, warmup=True)
    average.start_from(earlier)
    average.update_parameters(model, torch.tensor(False))
    torch.testing.assert_close(average.module.weight, 0.9 * earlier.weight + 0.1 * model.weight)


def test_the_average_is_updated_every_few_steps(arguments, tmp_path):
    settings = {"optimizer.ema_every": 2, "optimizer.ema_decay": 0.75, "training.steps": 5}
    checkpoints = {"training.checkpoint_every": 1, "training.keep_checkpoints": 9}
    load_script("train_t2i").main(arguments(**settings, **checkpoints))
    folders = [tmp_path / "run" / "checkpoints" / f"step-{step:08d}" for step in range(1, 6)]
    _, second, third, fourth, fifth = (read_weights(folder / "ema.safetensors") for folder in folders)
    models = [load_file(folder / "model.safetensors") for folder in folders]
    torch.testing.assert_close(second, models[1], rtol=0, atol=0)
    torch.testing.assert_close(third, second, rtol=0, atol=0)
    torch.testing.assert_close(fourth, {name: 0.75 * second[name] + 0.25 * models[3][name] for name in second})
    torch.testing.assert_close(fifth, fourth, rtol=0, atol=0)


def test_a_scaled_rate_is_said_and_no_clipping_is_that_of_a_large_norm(arguments, tmp_path, capsys):
    script = load_script("train_t2i")
    scaling = {"optimizer.learning_rate": "4e-3", "optimizer.lr_scaling": "sqrt", "optimizer.lr_base_batch": 32}
    script.main(arguments("free", **scaling, **{"optimizer.max_grad_norm": "null", "training.steps": 3}))
    assert capsys.readouterr().out.count("learning rate 0.004 × √(8 / 32) = 0.002\n") == 1
    clipped = {"optimizer.learning_rate": "2e-3", "optimizer.max_grad_norm": "1e9", "training.steps": 3}
    script.main(arguments("clipped", **clipped))
    assert_same_weights(tmp_path / "free", tmp_path / "clipped")
