from itertools import product

import pytest
import torch

from improved_ldm.conditioning.control import Control, control_tensor, null_control
from improved_ldm.models.presets import DENOISERS

NUM_CLASSES, TEXT_DIM, POOLED_DIM, TEXT_TOKENS = 5, 12, 10, 3
SEMANTIC = {
    "class": {"num_classes": NUM_CLASSES},
    "text": {"text_dim": TEXT_DIM, "pooled_dim": POOLED_DIM},
}


def semantic_config(name, conditioning, semantic):
    arguments = DENOISERS[name].text_arguments(conditioning)
    return {key: dim for key, dim in SEMANTIC[semantic].items() if semantic == "class" or key in arguments}


def case_id(case):
    return "-".join(case)


CASES = list(product(DENOISERS, ["disentangled", "published"], ["class", "text"]))


@pytest.fixture(params=CASES, ids=case_id)
def denoiser(request, tiny_denoiser):
    """Every backbone, in every mode, with every semantic condition, randomised."""
    name, conditioning, _ = request.param
    return tiny_denoiser(name, conditioning=conditioning, **semantic_config(*request.param))


@pytest.fixture(params=[case for case in CASES if case[1] == "disentangled"], ids=case_id)
def disentangled(request, tiny_denoiser):
    return tiny_denoiser(request.param[0], **semantic_config(*request.param))


@pytest.fixture(params=[case for case in CASES if "text_dim" in semantic_config(*case)], ids=case_id)
def text_denoiser(request, tiny_denoiser):
    """The denoisers that attend to text."""
    name, conditioning, _ = request.param
    return tiny_denoiser(name, conditioning=conditioning, **semantic_config(*request.param))


@pytest.fixture
def make_inputs():
    """Arguments of a denoiser's forward, every condition that it reads among them."""

    def build(denoiser, batch_size=2, size=(4, 4), seed=1):
        generator = torch.Generator().manual_seed(seed)
        conditions = {
            "encoder_hidden_states": torch.randn(batch_size, TEXT_TOKENS, TEXT_DIM, generator=generator),
            "pooled_projections": torch.randn(batch_size, POOLED_DIM, generator=generator),
            "class_labels": torch.arange(batch_size) % NUM_CLASSES,
            "control": control_tensor([Control((40, 60), (0, 20), (40, 40), (32, 32))] * batch_size),
        }
        latents = torch.randn(batch_size, denoiser.config.in_channels, *size, generator=generator)
        timestep = torch.linspace(100, 700, batch_size)
        read = {name: value for name, value in conditions.items() if name in denoiser.inputs}
        return {"hidden_states": latents, "timestep": timestep, **read}

    return build


@pytest.fixture
def null_conditions():
    """The explicit nulls of all conditions that a denoiser reads."""

    def build(denoiser, batch_size=2):
        conditions = {
            "encoder_hidden_states": torch.full((batch_size, 1, TEXT_DIM), torch.nan),
            "pooled_projections": torch.full((batch_size, POOLED_DIM), torch.nan),
            "class_labels": torch.full((batch_size,), NUM_CLASSES),
            "control": null_control(batch_size),
        }
        return {name: value for name, value in conditions.items() if name in denoiser.inputs}

    return build
