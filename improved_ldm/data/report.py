"""What a look at a set has counted, in words and small tables."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from improved_ldm.data.files import count_of
from improved_ldm.data.look import MUCH_CUT, Look
from improved_ldm.data.rows import Rows
from improved_ldm.data.tally import MAX_CORRUPT

SQUARE = 1.1  # longer side / shorter side, up to which an image counts as square
DEGREES = ((3 / 2, "a little {}, up to 3:2"), (2, "{}, 3:2 to 2:1"), (np.inf, "very {}, over 2:1"))
SHAPES = (
    *(name.format("tall") for _, name in reversed(DEGREES)),
    "about square, within 10%",
    *(name.format("wide") for _, name in DEGREES),
)
BAR = 30  # characters of the longest bar
SHOWN_CLASSES = 20  # a set with more classes shows half as many large and small ones


def report_lines(look: Look, text: str, max_tokens: int) -> list[str]:
    """The lines of a report.

    Args:
        look: the look, after all rows have been read.
        text: name of the tokenizer.
        max_tokens: L, tokens per prompt.
    """
    lines = [look.rows.description, *_row_lines(look)]
    if look.usable:
        lines += [*_size_lines(look.sizes), *_ratio_lines(look.sizes), *_sample_lines(look)]
        lines += _caption_lines(look, text, max_tokens) if look.tokens is not None else []
        lines += _class_lines(look.labels, look.rows) if look.labels else []
        lines += _duplicate_lines(look)
    return lines


def _row_lines(look: Look) -> list[str]:
    skipped, total = look.skipped.total(), look.usable + look.skipped.total() + look.left_out.total()
    share = f", {skipped:,} of them ({skipped / total:.1%}) cannot be used and are skipped" if skipped else ""
    lines = [f"{count_of(total, 'row')} looked at{share}"]
    for what, counts in (("row", look.skipped), ("file", look.lost)):
        for reason, count in counts.most_common():
            lines.append(f"    {count_of(count, what)}: {reason}; the first is {look.first_place[reason]}")
    lines += [f"    {count_of(count, 'row')} left out: {reason}" for reason, count in look.left_out.most_common()]
    if skipped > MAX_CORRUPT * total:
        lines.append(f"    more than {MAX_CORRUPT:.0%} are skipped: a training run would stop")
    return lines


def _size_lines(sizes: Counter) -> list[str]:
    """Smallest, quartiles and largest of the sides, pixels."""
    sides = np.repeat(np.array(list(sizes)), list(sizes.values()), axis=0)  # (images, 2)
    columns = {"height": sides[:, 0], "width": sides[:, 1], "shorter side": sides.min(1), "longer side": sides.max(1)}
    rows = [
        (name, *(f"{value:,.0f}" for value in np.quantile(values, [0, 0.25, 0.5, 0.75, 1], method="nearest")))
        for name, values in columns.items()
    ]
    return ["", "Sizes of the images, pixels", *_table(("", "min", "25%", "median", "75%", "max"), rows)]


def _ratio_lines(sizes: Counter) -> list[str]:
    counts = Counter()
    for (height, width), count in sizes.items():
        counts[_shape(height, width)] += count
    lines, total = ["", "Aspect ratios"], sizes.total()
    for name in SHAPES:
        bar = "█" * round(BAR * counts[name] / max(counts.values()))
        lines.append(f"    {name:<26}{counts[name]:>8,}{counts[name] / total:>7.1%}  {bar}".rstrip())
    return lines


def _shape(height: int, width: int) -> str:
    ratio = max(height, width) / min(height, width)
    if ratio <= SQUARE:
        return "about square, within 10%"
    return next(name for limit, name in DEGREES if ratio <= limit).format("tall" if height > width else "wide")


def _sample_lines(look: Look) -> list[str]:
    """A row per size of the samples, and the sum of all if there are several."""
    samples = dict(sorted(look.samples.items(), key=lambda item: item[0][1] / item[0][0]))
    rows = [
        (f"{height} x {width}", f"{part.rows:,}", *_shares(part.rows, part.cut_away, part.much_cut, part.enlarged))
        for (height, width), part in samples.items()
    ]
    if len(samples) > 1:
        sums = (sum(getattr(part, name) for part in samples.values()) for name in ("cut_away", "much_cut", "enlarged"))
        rows.append(("all", f"{look.usable:,}", *_shares(look.usable, *sums)))
    names = ("sample", "rows", "cut away", f"over {MUCH_CUT:.0%} cut", "enlarged")
    return [
        "",
        "Samples by height x width: mean share of the image that is cut away, and of the rows that are enlarged",
        *_table(names, rows),
    ]


def _shares(total: int, *parts: float) -> list[str]:
    return [f"{part / total:.1%}" if total else "–" for part in parts]


def _caption_lines(look: Look, text: str, max_tokens: int) -> list[str]:
    tokens, cut = look.tokens, look.tokens.longer_than(max_tokens)
    return [
        "",
        f"Captions, in tokens of {text}",
        f"    median {tokens.quantile(0.5)}, 95% have at most {tokens.quantile(0.95)}, the longest has "
        f"{tokens.quantile(1)}",
        f"    {cut:,} ({cut / tokens.lengths.total():.1%}) are longer than `text.max_tokens` {max_tokens} and are cut "
        "off",
        f"    {tokens.spelled_share:.1%} of the tokens only spell words that the tokenizer does not know",
        f"    {look.distinct_captions:,} distinct captions, {look.empty_captions:,} empty",
    ]


def _class_lines(labels: Counter, rows: Rows) -> list[str]:
    names = rows.class_names or []
    known = rows.num_classes or len(names)
    missing = f", {known - len(labels):,} of {known:,} have no row here" if known > len(labels) else ""
    ordered = labels.most_common()
    table = [(names[label] if label < len(names) else str(label), f"{count:,}") for label, count in ordered]
    if len(table) > SHOWN_CLASSES:
        half = SHOWN_CLASSES // 2
        table = [*table[:half], (f"… {len(table) - 2 * half:,} more", "…"), *table[-half:]]
    return ["", f"Classes: {len(labels):,}{missing}", *_table(("class", "rows"), table)]


def _duplicate_lines(look: Look) -> list[str]:
    found = look.duplicates
    near, first_near = found.near()
    scope = "" if found.compared + found.copies == look.usable else f" among the first {found.compared:,}"
    exact = f"{found.copies:,} with the bytes of an earlier image{_pair(found.first_copy)}"
    similar = f"{near:,} that hardly differ from an earlier one{scope}, by thumbnails{_pair(first_near)}"
    return ["", "Duplicates", f"    {exact}", f"    {similar}"]


def _pair(places: tuple[str, str] | None) -> str:
    return "" if places is None else f"; the first is {places[0]}, like {places[1]}"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    signs = ["<", *[">"] * (len(names) - 1)]
    lines = []
    for row in (names, *rows):
        cells = (f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True))
        lines.append("    " + "  ".join(cells).rstrip())
    return lines
