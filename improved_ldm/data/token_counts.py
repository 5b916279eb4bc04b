"""The tokens of captions: how many a caption has, and how many only spell words that the tokenizer does not know."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from improved_ldm.conditioning.text import TOKENIZING


class TokenCounts:
    """Counts the tokens of captions.

    `lengths` counts captions by their number of tokens, special ones included. `tokens` counts the tokens without the
    special ones, and `spelled` those of them that only spell a word.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.lengths, self.tokens, self.spelled = tokenizer, Counter(), 0, 0

    def add(self, captions: Sequence[str]):
        """Count the tokens of captions."""
        if not captions:
            return
        fast = self.tokenizer.is_fast  # others do not tell which letters a token stands for
        with TOKENIZING:
            encoded = self.tokenizer(
                list(captions), verbose=False, return_special_tokens_mask=fast, return_offsets_mapping=fast
            )
        self.lengths.update(map(len, encoded["input_ids"]))
        if not fast:
            return
        parts = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
        for caption, ids, spans, special in zip(captions, *parts, strict=True):
            own = [pair[:2] for pair in zip(ids, spans, special, strict=True) if not pair[2]]
            self.tokens += len(own)
            self.spelled += self._spelled(caption, own)

    def quantile(self, share: float) -> int:
        """The number of tokens that this share of the captions has at most."""
        return int(np.quantile(sorted(self.lengths.elements()), share, method="nearest"))

    def longer_than(self, max_tokens: int) -> int:
        """The number of captions that have more than `max_tokens` tokens."""
        return sum(count for length, count in self.lengths.items() if length > max_tokens)

    @property
    def spelled_share(self) -> float:
        """The share of tokens that only spell a word; 0 if the tokenizer does not tell."""
        return self.spelled / self.tokens if self.tokens else 0.0

    def _spelled(self, caption: str, tokens: list[tuple[int, tuple[int, int]]]) -> int:
        """Number of tokens that are unknown, one letter of a longer word, or one of the bytes of a character."""
        sharing = Counter(span for _, span in tokens)
        return sum(
            token == self.tokenizer.unk_token_id or sharing[span] > 1 or _is_letter_of_word(caption, *span)
            for token, span in tokens
        )


def _is_letter_of_word(caption: str, start: int, end: int) -> bool:
    """Whether a part of a caption is one letter of a longer word; in scripts without case one letter can be a word."""
    start += len(caption[start:end]) - len(caption[start:end].lstrip())
    letter = caption[start:end]
    if len(letter) != 1 or letter.lower() == letter.upper():
        return False
    return any(neighbour.isalpha() for neighbour in (caption[max(0, start - 1) : start], caption[end : end + 1]))
