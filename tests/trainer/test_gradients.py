"""The gradient of a training step, with the loss of the training loop."""

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm.conditioning.control import Control, control_tensor
from improved_ldm.conditioning.text import TextTokens
from improved_ldm.data.latents import EncodedBatch
from improved_ldm.diffusion.objectives import make_objective
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.family import DENOISERS
from improved_ldm.trainer.config import OptimizerConfig, RunConfig
from improved_ldm.trainer.denoiser_task import batch_conditions, batch_loss
from improved_ldm.trainer.optimizer import learning_rate_at
from improved_ldm.trainer.randomness import ImageRandomness, StepRandomness


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
    training = {"batch_size": 32 // micro_batches, "gradient_accumulation_steps": micro_batches}
    training |= {"semantic_dropout": 0.3, "control_dropout": 0.3}
    config = RunConfig(training=training, text={"noise_scale": 0.1})
    objective, accelerator = make_objective(prediction), Accelerator(cpu=True)
    randomness = StepRandomness(1, 5, config.training.batch_size, micro_batches)
    batch = encoded_batch(32)
    for number in range(micro_batches):
        part = rows(batch, slice(number * 32 // micro_batches, (number + 1) * 32 // micro_batches))
        images = randomness.images(number)
        loss = batch_loss(accelerator, denoiser, objective, part, images, config.training, config.text)
        (loss / micro_batches).backward()
    # a gradient is None for unused parameters: the queries of the context in the last block of an mmDiT
    parameters = denoiser.named_parameters()
    return {name: torch.zeros_like(value) if value.grad is None else value.grad.clone() for name, value in parameters}


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize("name", DENOISERS)
def test_two_micro_batches_of_16_give_the_gradient_of_one_of_32(tiny_denoiser, name, prediction):
    denoiser = tiny_denoiser(name, sample_size=8, text_dim=16)
    whole, parts = (gradients(denoiser, micro_batches, prediction) for micro_batches in (1, 2))
    scale = max(gradient.abs().max().item() for gradient in whole.values())
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5 * scale)


def test_the_loss_of_an_mdt_is_the_sum_of_a_plain_and_a_masked_pass_with_their_own_noise(tiny_denoiser):
    denoiser, batch = tiny_denoiser("mdt", sample_size=8, text_dim=16), encoded_batch(8)
    config = RunConfig(training={"semantic_dropout": 0.5, "control_dropout": 0.5}, text={"noise_scale": 0.1})
    objective, images = make_objective("epsilon"), StepRandomness(1, 5, 8).images(0)
    found = batch_loss(Accelerator(cpu=True), denoiser, objective, batch, images, config.training, config.text)

    timestep = objective.timestep_quantile(images.timestep_fractions())
    conditions = batch_conditions(batch, config.text, images).only(denoiser.inputs)
    masked = {"mask_noise": images.mask_uniform(16), "num_kept": int(16 * (1 - 0.3 - 0.2 * images.mask_level))}
    expected = 0.0
    for number, further in enumerate(({}, masked)):
        noise, dropped = images.noise((4, 8, 8), number), images.dropped(0.5, 0.5, number)
        seen = conditions.dropped(*dropped, None).kwargs()
        prediction = denoiser(objective.add_noise(batch.latents, noise, timestep), timestep, **seen, **further).sample
        expected = expected + (prediction - noise).square().mean()
    torch.testing.assert_close(found, expected)
    assert not torch.equal(images.noise((4, 8, 8), 0), images.noise((4, 8, 8), 1))
    assert not torch.equal(torch.stack(images.dropped(0.5, 0.5, 0)), torch.stack(images.dropped(0.5, 0.5, 1)))


def numbers_of(images: ImageRandomness) -> list[torch.Tensor]:
    fractions, dropped = images.timestep_fractions(), images.dropped(0.5, 0.5)
    return [fractions, *dropped, images.noise((4, 2, 2)), images.text_noise((3, 5)), images.mask_uniform(7)]


@given(
    seed=st.integers(0, 2**32), step=st.integers(0, 10**7), ranks=st.sampled_from([1, 2, 4]), micro=st.integers(1, 3)
)
def test_randomness_depends_on_the_seed_and_the_place_of_an_image_only(seed, step, ranks, micro):
    """One process and many micro-batches, or many processes: the images of a step get the same numbers."""
    whole = numbers_of(StepRandomness(seed, step, batch_size=ranks * micro * 2).images(0))
    split = [
        numbers_of(StepRandomness(seed, step, 2, micro, rank, ranks).images(number))
        for number in range(micro)
        for rank in range(ranks)
    ]
    for together, *parts in zip(whole, *split, strict=True):
        torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-6)


def test_randomness_differs_between_images_steps_seeds_and_purposes():
    def noise(seed=0, step=0):
        return StepRandomness(seed, step, 2).images(0).noise((2, 8))

    images = [*noise(), *noise(step=1), *noise(seed=1), *StepRandomness(0, 0, 2).images(0).text_noise((2, 8))]
    assert len({tuple(image.flatten().tolist()) for image in images}) == 8


def test_the_mask_level_is_the_same_on_all_processes():
    levels = {StepRandomness(3, 7, 2, 2, rank, ranks).mask_level for ranks in (1, 2) for rank in range(ranks)}
    assert len(levels) == 1 and 0 < levels.pop() < 1
    assert len({StepRandomness(3, step, 2).mask_level for step in range(20)}) == 20


def test_learning_rate_warms_up_then_stays_or_falls_to_zero():
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    assert [learning_rate_at(constant, step, 100) for step in (0, 9, 10, 99)] == [0.1, 1.0, 1.0, 1.0]
    cosine = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="cosine")
    assert learning_rate_at(cosine, 10, 100) == 1.0
    assert learning_rate_at(cosine, 55, 100) == pytest.approx(0.5)
    assert learning_rate_at(cosine, 99, 100) < 1e-3
