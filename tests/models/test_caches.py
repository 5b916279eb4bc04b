"""diffusers' caches: which denoisers they fit, how much work they save, and how close the images stay."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)

from improved_ldm.models.family import DENOISERS

MODES = ("disentangled", "published")
STACKS = ("dit", "pixart", "mmdit")
STEPS = 10


def pyramid(timestep):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(0, 1001),
        cross_attention_timestep_skip_range=(0, 1001),
        current_timestep_callback=timestep,
    )


def faster(timestep, **settings):
    settings = {
        "tensor_format": "BCHW",
        "current_timestep_callback": timestep,
        "spatial_attention_timestep_skip_range": (-1, 1001),
    } | settings
    return FasterCacheConfig(
        unconditional_batch_timestep_skip_range=(-1, 1001),
        unconditional_batch_skip_range=3,
        **settings,
    )


CACHES = {
    "pyramid": pyramid,
    "faster": faster,
    "taylor": lambda _: TaylorSeerCacheConfig(cache_interval=2, taylor_factors_dtype=torch.float32),
    "taylor_lite": lambda _: TaylorSeerCacheConfig(
        cache_interval=2, taylor_factors_dtype=torch.float32, use_lite_mode=True
    ),
    "first_block": lambda _: FirstBlockCacheConfig(threshold=2.0),
    "mag": lambda _: MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
}
WORKS = {
    "pyramid": DENOISERS,
    "faster": STACKS,
    "taylor": DENOISERS,
    "taylor_lite": [name for name in DENOISERS if name != "unet"],
    "first_block": STACKS,
    "mag": STACKS,
}
CASES = [(cache, name, mode) for cache, names in WORKS.items() for name in names for mode in MODES]
REFUSED = [(cache, name) for cache in CACHES for name in DENOISERS if name not in WORKS[cache]]


class Meter:
    """Counts the rows that the linear layers of a denoiser's blocks compute, and holds the current timestep."""

    def __init__(self, denoiser):
        self.rows, self.timestep = 0, None
        denoiser.register_forward_pre_hook(self.at)
        for path, module in denoiser.named_modules():
            if "blocks" in path and isinstance(module, torch.nn.Linear):
                module.register_forward_hook(self.count)

    def at(self, module, args):
        self.timestep = args[1]

    def count(self, module, args, output):
        self.rows += len(args[0])


@pytest.fixture
def make_drawing(class_pipeline):
    """Builds a pipeline, a function that samples latents and counts rows, and the denoiser's timestep."""

    def build(name, mode="disentangled", guidance_scale=2.0, **config):
        pipe = class_pipeline(name=name, conditioning=mode, **config)
        meter = Meter(pipe.denoiser)

        def draw(**arguments):
            meter.rows = 0
            arguments = {
                "class_labels": [0, 2],
                "num_inference_steps": STEPS,
                "guidance_scale": guidance_scale,
                "generator": torch.Generator().manual_seed(5),
                "output_type": "latent",
            } | arguments
            return pipe(**arguments).images, meter.rows

        return pipe, draw, lambda: meter.timestep

    return build


@pytest.mark.parametrize(("cache", "name", "mode"), CASES)
def test_a_cache_saves_work_and_draws_nearly_the_same(make_drawing, cache, name, mode):
    pipe, draw, timestep = make_drawing(name, mode)
    plain, work = draw()
    pipe.denoiser.enable_cache(CACHES[cache](timestep))
    cached, cached_work = draw()
    assert cached_work < 0.95 * work
    assert 0 < (cached - plain).norm() < 0.05 * plain.norm()
    assert torch.equal(draw()[0], cached)
    pipe.denoiser.disable_cache()
    assert torch.equal(draw()[0], plain)
    assert draw()[1] == work


@pytest.mark.parametrize(("cache", "name"), REFUSED)
def test_a_cache_that_does_not_fit_is_refused_with_those_that_do(tiny_denoiser, cache, name):
    denoiser = tiny_denoiser(name, num_classes=3)
    with pytest.raises(ValueError, match=r"must be one of PyramidAttentionBroadcastConfig, Tayl|use_lite_mode"):
        denoiser.enable_cache(CACHES[cache](lambda: 0))
    assert not denoiser.is_cache_enabled


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("config", [SeaCacheConfig(), TextKVCacheConfig(), {"threshold": 1}, None])
def test_caches_of_other_models_are_refused(tiny_denoiser, name, config):
    with pytest.raises(
        ValueError, match=rf"a {type(config).__name__} does not fit this \w+Denoiser.*; it must be one of"
    ):
        tiny_denoiser(name, num_classes=3).enable_cache(config)


NOWHERE = {
    "spatial_attention_block_identifiers": ("layers",),
    "cross_attention_block_identifiers": ("layers",),
    "current_timestep_callback": lambda: 0,
    "spatial_attention_block_skip_range": 2,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaylorSeerCacheConfig(cache_identifiers=["double_blocks.*"]), "match no attention of this DiTDenoiser"),
        (PyramidAttentionBroadcastConfig(**NOWHERE), "match no attention of this DiTDenoiser"),
        (faster(lambda: 0, spatial_attention_block_identifiers=("layers",)), "match no attention of this DiT"),
        (faster(lambda: 0, tensor_format="BCFHW"), "`tensor_format` is 'BCFHW'; it must be 'BCHW'"),
        (faster(None), "`current_timestep_callback` is None"),
        (PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2), "`current_timestep_callback`"),
    ],
)
def test_settings_that_hit_nothing_are_refused(tiny_denoiser, make_drawing, config, message):
    pipe, draw, _ = make_drawing("dit")
    plain = draw()[0]
    with pytest.raises(ValueError, match=message):
        pipe.denoiser.enable_cache(config)
    assert not pipe.denoiser.is_cache_enabled
    assert torch.equal(draw()[0], plain)


def test_a_first_block_cache_needs_a_second_block(tiny_denoiser):
    with pytest.raises(ValueError, match="needs at least two blocks"):
        tiny_denoiser("dit", num_classes=3, num_layers=1).enable_cache(FirstBlockCacheConfig())


@pytest.mark.parametrize("name", STACKS)
def test_faster_cache_infers_the_unconditional_half_from_the_conditional_one(make_drawing, name):
    pipe, draw, timestep = make_drawing(name)
    pipe.denoiser.enable_cache(faster(timestep))
    seen = []
    pipe.denoiser.trunk.register_forward_pre_hook(lambda module, args: seen.append(args[1].class_labels.tolist()))
    draw()
    assert sorted(seen[0]) == [0, 2, 3, 3]
    assert seen[1] == seen[2] == [0, 2]


@pytest.mark.parametrize("arguments", [{"guidance_scale": 1.0}, {"control_guidance_scale": 1.5}])
def test_faster_cache_needs_one_unconditional_term(make_drawing, arguments):
    pipe, draw, timestep = make_drawing("dit")
    pipe.denoiser.enable_cache(faster(timestep))
    with pytest.raises(ValueError, match=r"evaluates [13] conditions; set a `guidance_scale` other than 1"):
        draw(**arguments)
    pipe.denoiser.disable_cache()
    late = {"spatial_attention_timestep_skip_range": (-1, 681)}  # diffusers' default, after the first step
    pipe.denoiser.enable_cache(faster(timestep, is_guidance_distilled=True, **late))
    assert draw(**arguments)[0].isfinite().all()


@pytest.mark.parametrize(
    ("cache", "name"), [(cache, names[0]) for cache, names in WORKS.items() for names in [[*names]]]
)
def test_a_drawing_that_was_broken_off_leaves_nothing_to_the_next(make_drawing, cache, name):
    pipe, draw, timestep = make_drawing(name)
    pipe.denoiser.enable_cache(CACHES[cache](timestep))
    cached = draw()[0]

    def stop(pipe, step, timestep, tensors):
        if step == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        draw(class_labels=[1, 1, 1], callback_on_step_end=stop)
    assert torch.equal(draw()[0], cached)


@pytest.mark.parametrize("cache", ["pyramid", "taylor", "first_block", "mag"])
@pytest.mark.parametrize("arguments", [{"guidance_scale": 1.0}, {"control_guidance_scale": 1.5}])
def test_caches_hold_under_every_guidance(make_drawing, cache, arguments):
    pipe, draw, timestep = make_drawing("dit")
    plain = draw(**arguments)[0]
    pipe.denoiser.enable_cache(CACHES[cache](timestep))
    assert (draw(**arguments)[0] - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize("cache", WORKS)
def test_text_goes_through_a_cache(text_pipeline, cache):
    pipe = text_pipeline(name="mmdit" if cache in ("faster", "first_block", "mag") else "pixart", text_padding="mask")
    meter = Meter(pipe.denoiser)
    call = {"prompt": ["a red boot", "a coat"], "num_inference_steps": STEPS, "output_type": "latent"}

    def draw():
        return pipe(**call, generator=torch.Generator().manual_seed(3)).images

    plain = draw()
    pipe.denoiser.enable_cache(CACHES[cache](lambda: meter.timestep))
    assert 0 < (draw() - plain).norm() < 0.1 * plain.norm()
