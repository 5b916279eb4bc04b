"""The gradient of a step, through the loop's own loss."""

import pytest
import torch
from accelerate import Accelerator

from improved_ldm.conditioning.control import Control, control_tensor
from improved_ldm.conditioning.text import TextTokens
from improved_ldm.data.latents import EncodedBatch
from improved_ldm.diffusion.objectives import make_objective
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.presets import DENOISERS
from improved_ldm.trainer.config import OptimizerConfig, TextConfig, TrainingConfig
from improved_ldm.trainer.draws import StepDraws
from improved_ldm.trainer.loop import batch_loss, learning_rate_at


def encoded_batch(size: int) -> EncodedBatch:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(12) < torch.randint(2, 12, (size, 1), generator=generator)
    text = TextTokens(torch.randn(size, 12, 16, generator=generator), mask, torch.randn(size, 16, generator=generator))
    control = control_tensor([Control.of_whole_image((28, 28), (32, 32))] * size)
    return EncodedBatch(torch.randn(size, 4, 8, 8, generator=generator), control, text)


def rows(batch: EncodedBatch, part: slice) -> EncodedBatch:
    return EncodedBatch.from_tensors({name: value[part] for name, value in batch.tensors().items()})


def gradients(denoiser: Denoiser, micro_batches: int, prediction: str) -> dict[str, torch.Tensor]:
    denoiser.zero_grad()
    config = TrainingConfig(
        batch_size=32 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        semantic_dropout=0.3,
        control_dropout=0.3,
    )
    objective, accelerator = make_objective(prediction), Accelerator(cpu=True)
    draws = StepDraws(config, objective, seed=1, step=5, rank=0, device=torch.device("cpu"))
    batch = encoded_batch(32)
    for number in range(micro_batches):
        part = rows(batch, slice(number * config.batch_size, (number + 1) * config.batch_size))
        loss = batch_loss(accelerator, denoiser, objective, part, TextConfig(noise_scale=0.1), draws, number)
        (loss / micro_batches).backward()
    # a gradient is None where no pass reached: the queries of the context in the last block of an mmDiT
    parameters = denoiser.named_parameters()
    return {name: torch.zeros_like(value) if value.grad is None else value.grad.clone() for name, value in parameters}


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize("name", DENOISERS)
def test_two_micro_batches_of_16_give_the_gradient_of_one_of_32(tiny_denoiser, name, prediction):
    denoiser = tiny_denoiser(name, sample_size=8, text_dim=16)
    whole, parts = (gradients(denoiser, micro_batches, prediction) for micro_batches in (1, 2))
    scale = max(gradient.abs().max().item() for gradient in whole.values())
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5 * scale)


def test_a_masked_pass_is_half_of_the_loss(tiny_denoiser):
    denoiser = tiny_denoiser("mdt", sample_size=8, text_dim=16)
    both = gradients(denoiser, 1, "flow")
    assert both["mask_token"].abs().max() > 0

    def only(number):
        one = tiny_denoiser("mdt", sample_size=8, text_dim=16)
        draw = one.training_passes
        one.training_passes = lambda *args: draw(*args)[number : number + 1]
        return gradients(one, 1, "flow")

    plain, masked = only(0), only(1)
    assert plain["mask_token"].abs().max() == 0
    mean = {name: (plain[name] + masked[name]) / 2 for name in both}
    torch.testing.assert_close(both, mean, rtol=1e-4, atol=1e-6)


def test_draws_depend_on_seed_step_and_rank_only():
    def noise(**changes):
        arguments = {"seed": 0, "step": 0, "rank": 0} | changes
        draws = StepDraws(TrainingConfig(), make_objective("flow"), device=torch.device("cpu"), **arguments)
        return draws.noise_like(torch.empty(4, 4))

    assert torch.equal(noise(), noise())
    for change in ({"seed": 1}, {"step": 1}, {"rank": 1}):
        assert not torch.equal(noise(), noise(**change))


def test_learning_rate_warms_up_then_stays_or_falls_to_zero():
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    assert [learning_rate_at(constant, step, 100) for step in (0, 9, 10, 99)] == [0.1, 1.0, 1.0, 1.0]
    cosine = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="cosine")
    assert learning_rate_at(cosine, 10, 100) == 1.0
    assert learning_rate_at(cosine, 55, 100) == pytest.approx(0.5)
    assert learning_rate_at(cosine, 99, 100) < 1e-3
