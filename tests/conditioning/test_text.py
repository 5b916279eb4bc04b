from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.conditioning.text import TextPadding, TextTokens, encode_prompts, pad_tokens, unique_prompts

LENGTH = 7
MODES = get_args(TextPadding)
COUNTS = st.lists(st.integers(0, LENGTH), min_size=1, max_size=5)
PROMPTS = ["a red coat", "", "a blue bag with a white boot", "a red coat"]


def tokens_of(counts, length=LENGTH, channels=6, side="right"):
    generator = torch.Generator().manual_seed(sum(counts))
    hidden_states = torch.randn(len(counts), length, channels, generator=generator)
    position = torch.arange(length).expand(len(counts), length)
    count = torch.tensor(counts)[:, None]
    mask = position < count if side == "right" else position >= length - count
    return TextTokens(hidden_states, mask, hidden_states.mean(1))


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("mode", MODES)
@given(counts=COUNTS, side=st.sampled_from(["left", "right"]))
def test_own_tokens_come_first_and_survive_exactly(mode, counts, side):
    tokens = tokens_of(counts, side=side)
    padded, _ = pad_tokens(tokens, mode, 0.5, generators(len(counts)))
    assert padded.shape == tokens.hidden_states.shape
    for row, count in enumerate(counts):
        assert torch.equal(padded[row, :count], tokens.hidden_states[row][tokens.attention_mask[row]])


@pytest.mark.parametrize("mode", MODES)
@given(counts=COUNTS)
def test_every_prompt_is_finite_in_every_mode(mode, counts):
    padded, _ = pad_tokens(tokens_of(counts), mode, 0.5, generators(len(counts)))
    assert padded.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_a_full_prompt_is_unchanged(mode):
    tokens = tokens_of([LENGTH])
    padded, mask = pad_tokens(tokens, mode, 0.5)
    assert torch.equal(padded, tokens.hidden_states)
    assert mask is None or mask.all()


@given(COUNTS)
def test_replicas_are_cyclic(counts):
    padded, mask = pad_tokens(tokens_of(counts), "replicate")
    assert mask is None
    for row, count in enumerate(counts):
        period = max(count, 1)
        assert torch.equal(padded[row, period:], padded[row, :-period])


@given(COUNTS)
def test_zero_and_mask_have_zeros_behind_the_prompt(counts):
    tokens = tokens_of(counts)
    zero, no_mask = pad_tokens(tokens, "zero")
    masked, mask = pad_tokens(tokens, "mask")
    assert no_mask is None
    assert torch.equal(zero, masked)
    for row, count in enumerate(counts):
        period = max(count, 1)
        assert torch.equal(zero[row, period:], torch.zeros_like(zero[row, period:]))
        assert mask[row].tolist() == [True] * period + [False] * (LENGTH - period)


@pytest.mark.parametrize(("count", "repeats"), [(2, 32), (3, 22), (40, 2), (63, 2)])
def test_noise_has_the_deviation_of_its_formula(count, repeats):
    tokens = tokens_of([count], length=64, channels=512)
    copies, _ = pad_tokens(tokens, "replicate")
    noisy, _ = pad_tokens(tokens, "noisy_replicate", 0.3, torch.Generator().manual_seed(1))
    channel_deviation = tokens.hidden_states[0, :count].std(0, correction=0)
    unit_noise = (noisy - copies)[0, count:] / (0.3 * (repeats - 1) ** 0.5 * channel_deviation)
    tolerance = 4 / unit_noise.numel() ** 0.5
    assert abs(unit_noise.std() - 1) < tolerance
    assert abs(unit_noise.mean()) < tolerance


def test_no_noise_scale_is_plain_replication():
    tokens = tokens_of([2, 5])
    assert torch.equal(pad_tokens(tokens, "noisy_replicate", 0.0)[0], pad_tokens(tokens, "replicate")[0])


def test_a_generator_a_sample_makes_the_noise_independent_of_the_batch():
    tokens = tokens_of([2, 3, 0])
    batch, _ = pad_tokens(tokens, "noisy_replicate", 0.5, generators(3))
    for row, generator in enumerate(generators(3)):
        alone, _ = pad_tokens(tokens.rows(torch.tensor([row])), "noisy_replicate", 0.5, [generator])
        assert_close(batch[row], alone[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_padding_keeps_the_dtype(mode, dtype):
    tokens = tokens_of([2, 0])
    half = TextTokens(tokens.hidden_states.to(dtype), tokens.attention_mask, tokens.pooled)
    padded, _ = pad_tokens(half, mode, 0.5, generators(2))
    assert padded.dtype == dtype and padded.isfinite().all()


def test_unknown_mode_and_negative_noise_are_errors():
    with pytest.raises(ValueError, match="'repeat'"):
        pad_tokens(tokens_of([2]), "repeat")
    with pytest.raises(ValueError, match="noise_scale"):
        pad_tokens(tokens_of([2]), "noisy_replicate", -0.1)


@given(st.lists(st.sampled_from("abc"), min_size=1))
def test_unique_prompts_and_their_places_give_the_prompts_back(prompts):
    unique, index = unique_prompts(prompts)
    assert len(set(unique)) == len(unique)
    assert [unique[place] for place in index] == prompts


@pytest.fixture(params=["clip_text", "t5_text", "bert_text"])
def text(request):
    return request.getfixturevalue(request.param)


def test_encoders_give_tokens_mask_and_pooled(text):
    tokenizer, encoder = text
    width = encoder.config.hidden_size
    tokens = encode_prompts(PROMPTS, tokenizer, encoder, 16)
    assert tokens.hidden_states.shape == (4, 16, width)
    assert tokens.attention_mask.shape == (4, 16) and tokens.attention_mask.dtype == torch.bool
    assert tokens.pooled.shape == (4, width)
    assert tokens.hidden_states.isfinite().all() and tokens.pooled.isfinite().all()
    assert tokens.attention_mask.sum(1).tolist() == [len(ids) for ids in tokenizer(PROMPTS)["input_ids"]]


def test_a_prompt_encodes_alike_alone_and_in_a_batch(text):
    batch = encode_prompts(PROMPTS, *text, 16)
    for row, prompt in enumerate(PROMPTS):
        alone = encode_prompts([prompt], *text, 16)
        own = alone.attention_mask[0]
        assert torch.equal(batch.attention_mask[row], own)
        assert_close(batch.hidden_states[row][own], alone.hidden_states[0][own])
        assert_close(batch.pooled[row], alone.pooled[0])


def test_prompts_that_are_too_long_are_cut_with_a_warning(text):
    with pytest.warns(UserWarning, match="cut to 5"):
        tokens = encode_prompts([PROMPTS[2]], *text, 5)
    assert tokens.hidden_states.shape[1] == 5 and tokens.attention_mask.all()


def test_prompts_that_fit_warn_of_nothing(text, caplog, recwarn):
    encode_prompts(PROMPTS, *text, 16)
    assert not caplog.records and not recwarn.list


def test_pooled_of_an_encoder_without_one_is_the_mean_of_the_own_tokens(t5_text):
    tokens = encode_prompts(["a red coat"], *t5_text, 9)
    assert_close(tokens.pooled[0], tokens.hidden_states[0, :4].mean(0))


def test_padding_on_the_left_gives_the_tokens_of_padding_on_the_right(t5_text):
    tokenizer, encoder = t5_text
    right, _ = pad_tokens(encode_prompts(PROMPTS, tokenizer, encoder, 16), "replicate")
    tokenizer.padding_side = "left"
    try:
        left, _ = pad_tokens(encode_prompts(PROMPTS, tokenizer, encoder, 16), "replicate")
    finally:
        tokenizer.padding_side = "right"
    assert_close(left, right)


def test_tokens_concatenate_and_select_by_row():
    first, second = tokens_of([1, 2]), tokens_of([3])
    joined = TextTokens.concatenate([first, second])
    assert torch.equal(joined.rows(torch.tensor([2])).hidden_states, second.hidden_states)
    assert torch.equal(joined.rows(torch.tensor([0, 1])).attention_mask, first.attention_mask)
