"""Which rows of a set are used, by the sizes of their images and by their captions."""

import re
from collections.abc import Callable
from dataclasses import dataclass

MAX_SHOWN = 60  # characters of a pattern in a reason


@dataclass(frozen=True)
class RowFilter:
    """Which rows of a set are used; None leaves out no row.

    Args:
        min_size: smallest shorter side of an image, pixels.
        max_aspect: largest ratio of an image's longer to its shorter side.
        caption_pattern: regular expression that occurs in the caption.

    Source: our choice.
    """

    min_size: int | None = None
    max_aspect: float | None = None
    caption_pattern: str | None = None

    @property
    def reads_sizes(self) -> bool:
        """Whether the filter needs the sizes of the images."""
        return self.min_size is not None or self.max_aspect is not None

    @property
    def is_needed(self) -> bool:
        """Whether the filter can leave out a row."""
        return self.reads_sizes or self.caption_pattern is not None

    def reason(self, captions: Callable[[], list[str]] | None, size: Callable[[], tuple[int, int]]) -> str | None:
        """Why a row is left out; None if it is used.

        Args:
            captions: function that reads the captions, of which one must match; None if the set has no captions.
            size: function that reads the (height, width) of the image, pixels.
        """
        if self.caption_pattern is not None and captions is not None and not self._occurs_in(captions()):
            return f"caption without {self._shown_pattern!r}"
        if self.reads_sizes:
            shorter, longer = sorted(size())
            if self.min_size is not None and shorter < self.min_size:
                return f"shorter side below {self.min_size} pixels"
            if self.max_aspect is not None and longer > self.max_aspect * shorter:
                return f"aspect ratio above {self.max_aspect:g}"
        return None

    @property
    def _shown_pattern(self) -> str:
        pattern = self.caption_pattern
        return pattern if len(pattern) <= MAX_SHOWN else f"{pattern[:MAX_SHOWN]}…"

    def _occurs_in(self, captions: list[str]) -> bool:
        return any(re.search(self.caption_pattern, caption) for caption in captions or [""])


ALL_ROWS = RowFilter()
