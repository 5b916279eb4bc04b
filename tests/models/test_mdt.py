"""The masked pass of mDT: the inputs of encoder and decoder, and the passes of a training step."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.models.positions import relative_offsets
from improved_ldm.seeds import uniform

LEVEL = st.floats(0, 1, exclude_max=True)
# of the four patches in a 4 x 4 latent
NOISE = torch.tensor([[0.1, 0.9, 0.2, 0.8]])
KEPT, MASKED = (slice(0, 2), slice(0, 2)), (slice(0, 2), slice(2, 4))


@pytest.fixture(params=["disentangled", "published"])
def model(request, tiny_denoiser):
    return tiny_denoiser("mdt", conditioning=request.param, num_classes=5)


@torch.no_grad()
def run(model, inputs, **changes):
    return model(**{**inputs, **changes}).sample


def differ(first, second):
    return (first - second).abs().max() > 1e-4


@pytest.fixture
def encoded(model):
    """The encoder's output in each following forward pass."""
    outputs = []
    model.encoder_skip_blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


@pytest.mark.parametrize("size", [(4, 4), (2, 8), (6, 4)])
def test_a_pass_that_masks_nothing_is_the_plain_pass(model, make_inputs, size):
    inputs = make_inputs(model, size=size)
    noise = torch.rand(2, size[0] * size[1] // 4)
    assert_close(run(model, inputs, mask_noise=noise, num_kept=noise.shape[1]), run(model, inputs))


@pytest.mark.parametrize("num_kept", [1, 8, 11, 16])
def test_the_encoder_sees_what_is_kept(model, make_inputs, encoded, num_kept):
    inputs = make_inputs(model, size=(8, 8))
    masked = run(model, inputs, mask_noise=torch.rand(2, 16), num_kept=num_kept)
    assert masked.shape == (2, 4, 8, 8) and masked.isfinite().all()
    assert encoded[0].shape == (2, num_kept, 32)
    assert differ(masked, run(model, inputs)) == (num_kept < 16)


def test_masks_that_do_not_fit_are_errors(model, make_inputs):
    inputs = make_inputs(model)
    for masking, message in (
        ({"num_kept": 2}, "give both or neither"),
        ({"mask_noise": torch.rand(2, 4)}, "give both or neither"),
        ({"mask_noise": torch.rand(2, 5), "num_kept": 2}, r"`mask_noise` is \(2, 5\); it must be \(2, 4\)"),
        ({"mask_noise": torch.rand(2, 4), "num_kept": 5}, "`num_kept` is 5; it must be from 1 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, **masking)


def test_masked_patches_reach_the_decoder_but_not_the_encoder(model, make_inputs, encoded):
    inputs = make_inputs(model, batch_size=1)
    masking = {"mask_noise": NOISE, "num_kept": 2}
    plain = run(model, inputs, **masking)
    outputs = []
    for rows, columns in (KEPT, MASKED):
        latents = inputs["hidden_states"].clone()
        latents[..., rows, columns] += 1
        outputs.append(run(model, inputs, hidden_states=latents, **masking))
    before, with_kept, with_masked = encoded
    assert differ(with_kept, before)
    assert_close(with_masked, before, rtol=0, atol=0)
    assert all(differ(output, plain) for output in outputs)


def test_the_side_block_stands_in_for_masked_patches_only(model, make_inputs):
    inputs, seen = make_inputs(model, batch_size=1), []
    model.decoder_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    masking = {"mask_noise": NOISE, "num_kept": 2}
    run(model, inputs, **masking)
    for parameter in model.side_block.parameters():
        parameter.data += 0.1
    run(model, inputs, **masking)
    changed = (seen[0] != seen[1]).any(-1)
    assert changed.tolist() == [[False, True, False, True]]


def test_the_plain_pass_reads_neither_side_block_nor_mask_token(model, make_inputs):
    inputs = make_inputs(model)
    plain = run(model, inputs)
    for parameter in (model.mask_token, *model.side_block.parameters()):
        parameter.data += 1
    assert_close(run(model, inputs), plain, rtol=0, atol=0)


def test_the_order_of_the_kept_patches_does_not_matter(model, make_inputs):
    inputs = make_inputs(model, batch_size=1)
    other = torch.tensor([[0.3, 0.6, 0.0, 0.7]])
    one, two = (run(model, inputs, mask_noise=noise, num_kept=2) for noise in (NOISE, other))
    assert_close(one, two)
    assert differ(run(model, inputs, mask_noise=1 - NOISE, num_kept=2), one)


def test_rows_of_a_masked_batch_do_not_mix(model, make_inputs):
    inputs, noise = make_inputs(model, batch_size=3, size=(4, 6)), torch.rand(3, 6)
    batch = run(model, inputs, mask_noise=noise, num_kept=3)
    for row in range(3):
        part = slice(row, row + 1)
        alone = {name: value[part] for name, value in inputs.items()}
        assert_close(run(model, alone, mask_noise=noise[part], num_kept=3)[0], batch[row])


def test_every_length_compiles(fresh_compiler, model, make_inputs):
    inputs, noise = make_inputs(model, size=(8, 8)), torch.rand(2, 16)
    levels = torch.arange(9) / 9
    passes = [model.training_passes(inputs["hidden_states"], level.item(), partial(torch.rand, 2)) for level in levels]
    lengths = {further["num_kept"] for _, further in passes}
    assert lengths == {8, 9, 10, 11}
    expected = {kept: run(model, inputs, mask_noise=noise, num_kept=kept) for kept in lengths}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for kept, sample in expected.items():
        assert_close(run(compiled, inputs, mask_noise=noise, num_kept=kept), sample)


def test_blocks_compile_for_every_length(fresh_compiler, model, make_inputs):
    inputs, noise = make_inputs(model, size=(8, 8)), torch.rand(2, 16)
    expected = {kept: run(model, inputs, mask_noise=noise, num_kept=kept) for kept in range(4, 13)}
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for kept, sample in expected.items():
        assert_close(run(model, inputs, mask_noise=noise, num_kept=kept), sample)


def training_passes(model, level, seed=0, size=(8, 8)):
    seeds = seed + torch.arange(4)
    return model.training_passes(torch.zeros(4, 4, *size), level, lambda count: uniform(seeds, (count,)))


def test_a_training_step_is_a_plain_and_a_masked_pass(tiny_denoiser):
    plain, masked = training_passes(tiny_denoiser("mdt"), 0.0)
    assert plain == {}
    assert masked["mask_noise"].shape == (4, 16) and masked["num_kept"] == 11


def test_a_training_step_has_the_same_masks_for_the_same_level_and_seeds(tiny_denoiser):
    model = tiny_denoiser("mdt")
    one, same, other = (training_passes(model, 0.5, seed)[1] for seed in (0, 0, 1))
    assert one["num_kept"] == same["num_kept"] == other["num_kept"]
    assert torch.equal(one["mask_noise"], same["mask_noise"])
    assert not torch.equal(one["mask_noise"], other["mask_noise"])


@pytest.fixture(scope="module")
def half_masked(tiny_denoiser):
    return tiny_denoiser("mdt", mask_ratio=0.5)


@given(LEVEL, LEVEL)
def test_fewer_patches_are_kept_at_higher_levels(half_masked, first, second):
    most, least = (
        training_passes(half_masked, level, size=(40, 40))[1]["num_kept"] for level in sorted((first, second))
    )
    assert 200 >= most >= least >= 119  # of 400 patches; 0.7 is slightly larger in binary


def test_every_number_of_patches_in_the_range_is_kept_at_some_level(half_masked):
    kept = {training_passes(half_masked, level / 1000, size=(40, 40))[1]["num_kept"] for level in range(1000)}
    assert kept == set(range(120, 201))


SIDE = st.integers(1, 6)


@given(SIDE, SIDE)
def test_two_pairs_of_patches_have_one_offset_if_their_positions_differ_alike(rows, columns):
    offsets = relative_offsets(rows, columns, torch.device("cpu"))
    tokens = rows * columns
    assert offsets.shape == (tokens, tokens)
    differences = {}
    for one in range(tokens):
        for other in range(tokens):
            difference = (one // columns - other // columns, one % columns - other % columns)
            differences.setdefault(difference, set()).add(int(offsets[one, other]))
    assert all(len(indices) == 1 for indices in differences.values())
    assert set.union(*differences.values()) == set(range((2 * rows - 1) * (2 * columns - 1)))


def test_the_bias_of_an_offset_is_learned_a_head(tiny_denoiser):
    bias = tiny_denoiser("mdt").decoder_blocks[0].position_bias
    offsets = relative_offsets(2, 2, torch.device("cpu"))
    values = bias(offsets, (2, 2))
    assert values.shape == (2, 4, 4)
    assert_close(values[1], bias.table[offsets][..., 1], rtol=0, atol=0)
    with torch.no_grad():
        bias.table[:] = 7
    assert_close(bias(relative_offsets(3, 5, torch.device("cpu")), (3, 5)), torch.full((2, 15, 15), 7.0))


def test_learned_positions_are_interpolated_for_other_grids(tiny_denoiser):
    model = tiny_denoiser("mdt")
    assert model.positions_for((2, 2)) is model.positions
    other = model.positions_for((3, 5))
    assert other.shape == (15, 32)
    with torch.no_grad():
        model.decoder_positions[:] = torch.arange(32.0)
    square = model.fitted(model.decoder_positions, (5, 5))
    assert_close(square, torch.arange(32.0).expand(25, 32), rtol=1e-5, atol=1e-5)
    inside = model.fitted(model.decoder_positions, (2, 8)).view(2, 8, 32)[:, 2:6]
    assert_close(inside, torch.arange(32.0).expand(2, 4, 32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (3, 5)])
def test_no_two_patches_of_any_grid_have_one_position(tiny_denoiser, grid):
    model = tiny_denoiser("mdt", sample_size=16)
    positions = model.positions_for(grid)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 1e-2


@pytest.mark.parametrize("grid", [(2, 8), (8, 2)])
def test_the_bias_of_an_offset_is_the_same_in_every_grid_of_an_area(tiny_denoiser, grid):
    bias = tiny_denoiser("mdt", sample_size=8).side_block.position_bias  # 4 x 4 patches
    rows, columns = grid
    table = bias.interpolated(grid).view(2 * rows - 1, 2 * columns - 1, -1)
    square = bias.table[:49].view(7, 7, -1)
    down, across = min(rows, 4) - 1, min(columns, 4) - 1  # offsets that both grids have
    shared = table[rows - 1 - down : rows + down, columns - 1 - across : columns + across]
    assert_close(shared, square[3 - down : 4 + down, 3 - across : 4 + across], rtol=1e-4, atol=1e-5)
    far = table[rows - 1, -1] if columns > rows else table[-1, columns - 1]
    assert_close(far, square[3, -1] if columns > rows else square[-1, 3], rtol=1e-4, atol=1e-5)
