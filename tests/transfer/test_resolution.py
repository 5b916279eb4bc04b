"""Transfer of a denoiser or pipeline to another resolution: positions and noise change, everything else is kept."""

from itertools import product

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.diffusion.schedules import flow_scheduler
from improved_ldm.models.family import DENOISERS
from improved_ldm.models.mdt import RelativePositionBias
from improved_ldm.models.positions import sincos_grid
from improved_ldm.transfer import transfer

POSITIONS = ("resample", "interpolate", "extrapolate", "keep")
SINCOS = {"dit": {}, "pixart": {}, "mmdit": {}}
TABLE = {"mmdit": {"published": {"position_table_size": 8}}}
COMPUTED = [*SINCOS.items(), *TABLE.items()]
COMPUTED_IDS = [*SINCOS, "mmdit-table"]


@pytest.fixture
def make(tiny_denoiser):
    """Builds a denoiser with 3 classes and 8 x 8 latents, which are 4 x 4 patches if it has patches."""
    return lambda name, **config: tiny_denoiser(name, **{"num_classes": 3, "sample_size": 8, **config})


@pytest.fixture(params=COMPUTED, ids=COMPUTED_IDS)
def computed(request, make):
    """The denoisers with computed positions."""
    name, config = request.param
    return make(name, **config)


def grid_of(denoiser):
    """The position embeddings (rows, columns, dim) of a denoiser's own grid."""
    side = denoiser.config.sample_size // denoiser.patch_size
    return denoiser.positions_for((side, side)).view(side, side, -1)


def close(first, second):
    assert_close(first, second, rtol=0, atol=1e-6)


def exactly(first, second):
    assert_close(first, second, rtol=0, atol=0)


@torch.no_grad()
def predict(denoiser, side=8):
    latents = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(1))
    labels = {"class_labels": torch.tensor([0, 2])}
    return denoiser(latents.to(denoiser.dtype), torch.tensor([50, 800]), **labels).sample


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels=[0, 2], generator=torch.Generator().manual_seed(0), output_type="latent").images


# the same resolution


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", DENOISERS)
def test_the_same_resolution_is_the_identity(make, name, positions):
    old = make(name)
    new = transfer(old, 64, positions=positions)
    assert new is not old and dict(new.config) == dict(old.config)
    exactly(new.state_dict(), old.state_dict())
    exactly(predict(new), predict(old))
    next(new.parameters()).data.add_(1)
    assert not torch.equal(next(new.parameters()), next(old.parameters()))


@pytest.mark.parametrize("noise", ["rescale", "keep"])
@pytest.mark.parametrize("name", DENOISERS)
def test_the_same_resolution_leaves_a_pipeline_as_it_is(class_pipeline, name, noise):
    old = class_pipeline(name=name)
    new = transfer(old, old.default_size, noise=noise)
    assert dict(new.scheduler.config) == dict(old.scheduler.config) and new.config.lineage is None
    exactly(new.scheduler.alphas_cumprod, old.scheduler.alphas_cumprod)
    exactly(new.denoiser.state_dict(), old.denoiser.state_dict())
    exactly(sample(new), sample(old))


# positions


@pytest.mark.parametrize("factor", [2, 3])
def test_resampled_positions_hold_the_old_ones(computed, factor):
    new = transfer(computed, factor * 64)
    assert new.config.sample_size == factor * 8
    close(grid_of(new)[::factor, ::factor], grid_of(computed))


@given(old=st.integers(1, 6), new=st.integers(1, 12), then=st.integers(1, 12))
def test_resampling_twice_is_resampling_once(tiny_denoiser, old, new, then):
    denoiser = tiny_denoiser("dit", num_layers=0, sample_size=2 * old)
    steps, once = (
        denoiser.resized(2 * new, "resample").resized(2 * then, "resample"),
        denoiser.resized(2 * then, "resample"),
    )
    close(steps.positions, once.positions)
    close(once.resized(2 * old, "resample").positions, denoiser.positions)


@pytest.mark.parametrize("name", SINCOS)
@pytest.mark.parametrize("set_extent", [None, 2.5])
def test_extrapolated_positions_begin_with_the_old_ones(make, name, set_extent):
    old = make(name, position_extent=set_extent)
    new = transfer(old, 128, positions="extrapolate")
    close(grid_of(new)[:4, :4], grid_of(old))
    assert new.config.position_extent == 2 * (set_extent or 4)


@pytest.mark.parametrize("name", SINCOS)
def test_keeping_positions_extrapolates_them_where_the_config_sets_no_extent(make, name):
    old = make(name)
    kept, extrapolated = (transfer(old, 128, positions=positions) for positions in ("keep", "extrapolate"))
    close(kept.positions, extrapolated.positions)
    assert kept.config.position_extent is None


@pytest.mark.parametrize("name", SINCOS)
def test_keeping_positions_resamples_them_where_the_config_sets_an_extent(make, name):
    old = make(name, position_extent=2.5)
    kept, resampled = (transfer(old, 128, positions=positions) for positions in ("keep", "resample"))
    exactly(kept.positions, resampled.positions)


@pytest.mark.parametrize("name", SINCOS)
def test_interpolated_positions_are_those_of_the_centres_of_the_patches(make, name):
    """A patch of half the size has its centre a quarter of a step before the old one's; resampling counts corners."""
    old = make(name)
    interpolated, resampled = (grid_of(transfer(old, 128, positions=positions)) for positions in POSITIONS[1::-1])
    quarters = sincos_grid(16, 16, 32, 4.0).view(16, 16, 32)
    close(resampled, quarters[::2, ::2])
    inner, before = slice(2, 6), slice(3, 11, 2)  # coordinates 0.75, 1.25, … as the edges have no neighbours
    assert_close(interpolated[inner, inner], quarters[before, before], rtol=0, atol=0.1)
    assert (interpolated - resampled).abs().max() > 0.2


def test_interpolated_positions_survive_saving(computed, tmp_path):
    new = transfer(computed, 128, positions="interpolate")
    new.save_pretrained(tmp_path)
    loaded = type(new).from_pretrained(tmp_path)
    exactly(loaded.positions, new.positions)
    exactly(predict(loaded, 16), predict(new, 16))


@pytest.mark.parametrize("positions", ["extrapolate", "keep"])
def test_a_table_is_cropped_less(make, positions):
    old = make("mmdit", published={"position_table_size": 8})
    new = transfer(old, 96, positions=positions)
    exactly(new.positions, old.positions)
    exactly(grid_of(new), old.positions.view(8, 8, -1)[1:7, 1:7])
    exactly(grid_of(new)[1:5, 1:5], grid_of(old))
    with pytest.raises(ValueError, match=r"10x10 patches.*8x8"):
        transfer(old, 160, positions=positions)


def test_a_resampled_table_is_denser(make):
    new = transfer(make("mmdit", published={"position_table_size": 8}), 128)
    assert new.published.position_table_size == 16 and new.config.position_extent == 4
    assert transfer(new, 64).published.position_table_size == 8


@pytest.mark.parametrize(
    ("name", "config"), [*COMPUTED, ("mdt", {}), ("unet", {})], ids=[*COMPUTED_IDS, "mdt", "unet"]
)
def test_a_denoiser_of_a_larger_grid_predicts_what_the_old_one_did_for_it(make, name, config):
    """Every denoiser accepts latents of other sizes; the transfer predicts the same for the larger grid."""
    old = make(name, **config)
    new = transfer(old, 128, positions="keep" if config else "resample")
    assert_close(predict(new, 16), predict(old, 16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_unet_has_no_positions(make, positions):
    old = make("unet")
    new = transfer(old, 128, positions=positions)
    assert new.config.sample_size == 16 and predict(new, 16).shape == (2, 4, 16, 16)
    exactly(new.state_dict(), old.state_dict())


# learned positions


@pytest.mark.parametrize("positions", ["resample", "interpolate", "keep"])
@pytest.mark.parametrize("resolution", [32, 96, 128])
def test_constant_learned_tables_stay_constant(make, positions, resolution):
    old, side = make("mdt"), resolution // 16
    row, bias = torch.arange(32.0), torch.tensor([3.0, -5.0])
    tables = [module.table for module in old.modules() if isinstance(module, RelativePositionBias)]
    for table, value in ((old.positions, row), (old.decoder_positions, -row), *((table, bias) for table in tables)):
        table.data.copy_(value.expand_as(table))
    new = transfer(old, resolution, positions=positions)
    assert_close(new.positions.data, row.expand(side**2, 32), rtol=1e-5, atol=1e-5)
    assert_close(new.decoder_positions.data, -row.expand(side**2, 32), rtol=1e-5, atol=1e-5)
    resized = [module.table for module in new.modules() if isinstance(module, RelativePositionBias)]
    assert len(resized) == len(tables)
    for table in resized:
        assert_close(table.data, bias.expand((2 * side - 1) ** 2 + 3, 2), rtol=1e-5, atol=1e-5)


def bias_grid(table, side):
    """The biases (2 side − 1, 2 side − 1, heads) of the offsets down and across; none is in the middle."""
    return table[:-3].view(2 * side - 1, 2 * side - 1, -1)


def test_the_bias_of_no_offset_and_of_the_farthest_ones_stays(make):
    old = make("mdt")
    new = transfer(old, 128)
    for (name, before), (_, after) in zip(old.named_parameters(), new.named_parameters(), strict=True):
        if not name.endswith("position_bias.table"):
            continue
        ends = [bias_grid(table, side)[:: side - 1, :: side - 1] for table, side in ((before, 4), (after, 8))]
        assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)
        exactly(after[-3:], before[-3:])  # no offset of patches


def test_the_bias_of_a_doubled_offset_is_that_of_the_offset(make):
    """Up to the stretch that takes the farthest offset of the old grid, 2 s − 2 new patches, to that of the new."""
    side = 8
    old = make("mdt", sample_size=16)
    offset = torch.arange(-(side - 1), side).float()
    for module in old.modules():
        if isinstance(module, RelativePositionBias):
            bias_grid(module.table.data, side)[..., 0] = offset[:, None]
            bias_grid(module.table.data, side)[..., 1] = offset
    new = transfer(old, 256)
    doubled = bias_grid(new.decoder_blocks[0].position_bias.table.data, 2 * side)[1::2, 1::2]
    stretch = (offset.abs() / (2 * side - 1)).max() + 0.1  # and what bicubic interpolation does at the edge
    assert (doubled[..., 0] - offset[:, None]).abs().max() < stretch
    assert (doubled[..., 1] - offset).abs().max() < stretch


@given(side=st.integers(1, 4), to=st.integers(1, 6))
def test_learned_tables_have_the_shape_of_their_grid(tiny_denoiser, side, to):
    new = tiny_denoiser("mdt", sample_size=2 * side).resized(2 * to, "resample")
    assert new.positions.shape == new.decoder_positions.shape == (to**2, 32)
    assert new.side_block.position_bias.table.shape == ((2 * to - 1) ** 2 + 3, 2)
    assert isinstance(new.positions, torch.nn.Parameter) and new.positions.isfinite().all()


def test_learned_positions_do_not_extrapolate(make):
    with pytest.raises(ValueError, match="'extrapolate', but an mDT's positions are learned"):
        transfer(make("mdt"), 128, positions="extrapolate")


# other weights and settings


@pytest.mark.parametrize(
    ("name", "positions"), [pair for pair in product(DENOISERS, POSITIONS) if pair != ("mdt", "extrapolate")]
)
def test_all_other_weights_are_kept(make, name, positions):
    old = make(name)
    before = {key: tensor.clone() for key, tensor in old.state_dict().items()}
    new = transfer(old, 128, positions=positions)
    for key, tensor in new.state_dict().items():
        if "position" not in key:
            assert torch.equal(tensor, before[key]), key
    for parameter in new.parameters():
        assert parameter.is_leaf and parameter.requires_grad
        parameter.data.fill_(7)
    exactly(old.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", DENOISERS)
def test_dtype_device_and_mode_are_kept(make, name, training, dtype):
    old = make(name).to(dtype).train(training)
    new = transfer(old, 128)
    assert new.dtype == dtype and new.device == old.device
    assert all(module.training is training for module in new.modules())
    assert predict(new, 16).dtype == dtype
    types = {key: tensor.dtype for key, tensor in old.state_dict().items()}
    assert {key: tensor.dtype for key, tensor in new.state_dict().items()} == types


@pytest.mark.parametrize("name", DENOISERS)
def test_a_transferred_denoiser_trains(make, name):
    new = transfer(make(name).train(), 128)
    new(torch.randn(1, 4, 16, 16), 500).sample.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in new.parameters() if parameter.grad is not None)
    assert next(new.parameters()).grad is not None


# pipelines


@pytest.mark.parametrize("name", DENOISERS)
def test_a_pipeline_goes_on_at_another_resolution(class_pipeline, tmp_path, name):
    old = class_pipeline(name=name)
    old.register_to_config(class_names=["boot", "coat", "bag"], default_original_size=64)
    new = transfer(old, 16)
    assert (old.default_size, new.default_size) == ((8, 8), (16, 16))
    record = {"source": old.name_or_path, "resolution": [8, 16], "positions": "resample", "noise": "rescale"}
    assert new.config.lineage == [record] and old.config.lineage is None
    assert new.vae is old.vae and new.config.class_names == ["boot", "coat", "bag"]
    assert new.config.default_original_size == 64
    assert new.config.default_guidance_scale == 2.0 and new.config.default_num_inference_steps == 2
    latents = sample(new)
    assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all()

    new.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(new) and loaded.default_size == (16, 16)
    assert loaded.config.lineage == [record]
    exactly(loaded.denoiser.state_dict(), new.denoiser.state_dict())
    exactly(loaded.scheduler.alphas_cumprod, new.scheduler.alphas_cumprod)
    exactly(sample(loaded), latents)


def test_lineage_grows_with_every_transfer(class_pipeline, tmp_path):
    class_pipeline().save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    new = transfer(transfer(loaded, 16, positions="extrapolate"), 24, noise="keep")
    steps = [{key: record[key] for key in ("resolution", "positions", "noise")} for record in new.config.lineage]
    assert steps == [
        {"resolution": [8, 16], "positions": "extrapolate", "noise": "rescale"},
        {"resolution": [16, 24], "positions": "resample", "noise": "keep"},
    ]
    assert new.config.lineage[0]["source"] == f".../{tmp_path.name}"
    new.save_pretrained(tmp_path / "new")
    assert DiffusionPipeline.from_pretrained(tmp_path / "new").config.lineage == new.config.lineage


def test_the_noise_of_a_pipeline_is_rescaled_or_kept(class_pipeline):
    old = class_pipeline()
    rescaled, kept = (transfer(old, 16, noise=noise).scheduler for noise in ("rescale", "keep"))
    exactly(kept.alphas_cumprod, old.scheduler.alphas_cumprod)
    before, after = (
        scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod) for scheduler in (old.scheduler, rescaled)
    )
    assert_close(after, before / 4, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("resolution", "scale"), [(16, 3.0), (8, 2.0), (4, 1.5)])
def test_the_guidance_of_a_pipeline_is_kept_or_its_excess_rescaled(class_pipeline, resolution, scale):
    old = class_pipeline()
    assert transfer(old, resolution).config.default_guidance_scale == 2.0
    new = transfer(old, resolution, guidance="rescale")
    assert new.config.default_guidance_scale == scale and old.config.default_guidance_scale == 2.0
    told = [record["guidance"] for record in new.config.lineage or ()]
    assert told == (["rescale"] if resolution != 8 else [])


def test_the_shift_of_a_flow_is_rescaled(class_pipeline):
    assert transfer(class_pipeline(flow_scheduler(3.0)), 16).scheduler.config.shift == 6.0


def test_another_sampler_of_a_transferred_pipeline_keeps_the_schedule(class_pipeline):
    new = transfer(class_pipeline(), 16)
    scheduler = DPMSolverMultistepScheduler.from_config(new.scheduler.config)
    exactly(scheduler.alphas_cumprod, new.scheduler.alphas_cumprod)


def test_a_text_pipeline_is_transferred_too(text_pipeline):
    old = text_pipeline()
    new = transfer(old, 16)
    assert new.text_encoder is old.text_encoder and new.tokenizer is old.tokenizer
    assert new.config.text_noise_scale == 0.5 and new.config.max_text_tokens == 16
    assert new("a red coat", output_type="np").images.shape == (1, 16, 16, 3)


# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 0}, "`resolution` is 0; it must be a positive multiple of 4"),
        ({"resolution": -8}, "`resolution` is -8"),
        ({"resolution": 10}, "`resolution` is 10; it must be a positive multiple of 4 pixels"),
        ({"resolution": 16, "positions": "guess"}, "`positions` is 'guess'; it must be one of resample, interpolate"),
        ({"resolution": 8, "positions": "guess"}, "`positions` is 'guess'"),
        ({"resolution": 16, "noise": "more"}, "`noise` is 'more'; it must be one of rescale, keep"),
        ({"resolution": 16, "guidance": "more"}, "`guidance` is 'more'; it must be one of rescale, keep"),
    ],
)
def test_bad_words_and_sizes_are_errors(class_pipeline, arguments, message):
    pipe = class_pipeline()
    with pytest.raises(ValueError, match=message):
        transfer(pipe, **arguments)
    arguments = {**arguments, "latent_factor": 2}
    with pytest.raises(ValueError, match=message):
        transfer(pipe.denoiser, **arguments)


def test_a_unet_divides_by_the_autoencoder_alone(make):
    assert transfer(make("unet"), 72).config.sample_size == 9
    with pytest.raises(ValueError, match="`resolution` is 60; it must be a positive multiple of 8 pixels"):
        transfer(make("unet"), 60)
