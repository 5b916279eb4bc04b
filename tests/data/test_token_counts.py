"""Counts of the tokens of captions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm.data.token_counts import TokenCounts


def counted(tokenizer, *captions: str) -> TokenCounts:
    counts = TokenCounts(tokenizer)
    counts.add(captions)
    return counts


@pytest.mark.parametrize(
    ("caption", "tokens", "spelled"),
    [
        ("a photo of a sneaker", 5, 0),  # "a" is a word
        ("a photo of a newt", 8, 4),
        ("a photo of a 7", 5, 0),  # a digit is no letter
        ("A. B. C.", 6, 0),  # letters that stand alone are words
        ("猫", 3, 3),  # three bytes of one character
        ("", 0, 0),
    ],
)
def test_the_embedded_tokenizer_spells_what_it_does_not_know(clip_text, caption, tokens, spelled):
    counts = counted(clip_text[0], caption)
    assert (counts.tokens, counts.spelled) == (tokens, spelled)
    assert counts.lengths == {tokens + 2: 1}


def test_words_that_a_tokenizer_does_not_have_are_unknown(bert_text):
    counts = counted(bert_text[0], "the red boot", "the green boot with wings")
    assert (counts.tokens, counts.spelled) == (8, 2)
    assert counts.spelled_share == 2 / 8


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=8))
def test_counts_of_captions_add_up(clip_text, captions):
    together, apart = counted(clip_text[0], *captions), counted(clip_text[0])
    for caption in captions:
        apart.add([caption])
    assert (together.lengths, together.tokens, together.spelled) == (apart.lengths, apart.tokens, apart.spelled)
    assert 0 <= together.spelled <= together.tokens == sum(together.lengths.elements()) - 2 * len(captions)
    assert together.longer_than(together.quantile(1)) == 0
    assert together.longer_than(1) == len(captions)
