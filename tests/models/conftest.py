from itertools import product

import pytest
import torch

from improved_ldm.conditioning.control import Control, control_tensor, null_control
from improved_ldm.models.family import DENOISERS

NUM_CLASSES, TEXT_DIM, POOLED_DIM, TEXT_TOKENS = 5, 12, 10, 3
MODES = ("disentangled", "published")
SEMANTIC = {
    "class": {
        "num_classes": NUM_CLASSES,
        "num_class_tokens": 2,
    },  # attention to a single token would not train the queries
    "text": {"text_dim": TEXT_DIM, "pooled_dim": POOLED_DIM},
}


def semantic_config(name, conditioning, semantic):
    arguments = DENOISERS[name].text_arguments(conditioning)
    return {key: dim for key, dim in SEMANTIC[semantic].items() if semantic == "class" or key in arguments}


def config_of(name, conditioning, semantic, **config):
    return {"conditioning": conditioning, **semantic_config(name, conditioning, semantic), **config}


# every backbone, in every mode, with every semantic condition
CASES = {"-".join(case): (case[0], config_of(*case)) for case in product(DENOISERS, MODES, SEMANTIC)}
# and the options of single published models
CASES |= {
    "unet-published-text-without_sizes": (
        "unet",
        config_of("unet", "published", "text", published={"size_features": 0}),
    ),
    "dit-published-class-trunk_per_block": (
        "dit",
        config_of(
            "dit",
            "published",
            "class",
            published={"trunk_per_block": True, "norm_eps": 1e-5, "downscale_freq_shift": 1.0},
        ),
    ),
    "pixart-published-text-sizes": (
        "pixart",
        config_of("pixart", "published", "text", published={"size_conditions": True}, hidden_size=48),
    ),
    "mmdit-published-text-table_and_dual": (
        "mmdit",
        config_of(
            "mmdit",
            "published",
            "text",
            published={"position_table_size": 6},
            dual_attention_layers=(0,),
            qk_norm=True,
        ),
    ),
}


def cases(condition):
    """Ids of the cases whose name and config satisfy a condition."""
    return [case for case, (name, config) in CASES.items() if condition(name, config)]


@pytest.fixture
def make_case(tiny_denoiser):
    """Builds the denoiser of a case with random weights."""

    def build(case):
        name, config = CASES[case]
        return tiny_denoiser(name, **config)

    return build


@pytest.fixture(params=CASES)
def denoiser(request, make_case):
    """Every case."""
    return make_case(request.param)


@pytest.fixture(params=cases(lambda name, config: name != "unet"))
def patch_denoiser(request, make_case):
    """The denoisers with patches: all except the UNet."""
    return make_case(request.param)


@pytest.fixture(params=cases(lambda name, config: name in ("dit", "pixart", "mmdit")))
def plain_stack(request, make_case):
    """The denoisers whose blocks form one stack, without the skip connections of the UNet and mDT."""
    return make_case(request.param)


@pytest.fixture(params=cases(lambda name, config: config["conditioning"] == "disentangled"))
def disentangled(request, make_case):
    return make_case(request.param)


@pytest.fixture(params=cases(lambda name, config: "text_dim" in config))
def text_denoiser(request, make_case):
    """The denoisers that attend to text."""
    return make_case(request.param)


@pytest.fixture
def make_inputs():
    """Arguments of a denoiser's forward, including every condition that it reads."""

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


@pytest.fixture
def fresh_compiler():
    """Clears compiled code, so that earlier tests do not count towards a limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
