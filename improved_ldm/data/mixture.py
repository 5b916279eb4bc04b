"""Several sets that are trained on together, mixed by weight."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from improved_ldm.data.classes import check_num_classes
from improved_ldm.data.rows import Rows


@dataclass(frozen=True)
class Source:
    """A set in a mixture.

    Args:
        rows: the opened set.
        name: name for messages and the card.
        weight: its share of the samples, relative to the other sources.
    """

    rows: Rows
    name: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """Sets of one kind of condition, mixed by weight; a single set is a mixture of one.

    Args:
        sources: the sets, at least one.
    """

    sources: tuple[Source, ...]

    @classmethod
    def of(cls, rows: "Rows | Mixture") -> "Mixture":
        """A mixture of one set; a mixture is returned unchanged."""
        return rows if isinstance(rows, Mixture) else cls((Source(rows),))

    @classmethod
    def join(cls, sources: tuple[Source, ...], num_classes: int | None = None) -> "Mixture":
        """A mixture whose classes have the same numbers in all sources: those of the union of their names.

        Args:
            sources: the sets.
            num_classes: number of classes; None if it is not known.

        Raises:
            ValueError: if only some of the sources name their classes, or `num_classes` is not the number of names.
        """
        if sources[0].rows.label_column is None:
            return cls(sources)
        sources = tuple(replace(source, rows=replace(source.rows, num_classes=num_classes)) for source in sources)
        named = [source.rows.class_names for source in sources]
        if any(names is None for names in named):
            if any(names is not None for names in named):
                unnamed = next(source.name for source in sources if source.rows.class_names is None)
                raise ValueError(
                    f"`data.sources`: {unnamed} does not name its classes, but others do; all must name them, or none."
                )
            return cls(sources)
        union = list(dict.fromkeys(name for names in named for name in names))
        check_num_classes(num_classes, union)
        if len(sources) == 1:
            return cls(sources)
        numbers = {name: number for number, name in enumerate(union)}
        own_classes = (tuple(numbers[name] for name in names) for names in named)
        joined = (
            replace(source.rows, class_names=union, own_classes=own)
            for source, own in zip(sources, own_classes, strict=True)
        )
        return cls(tuple(replace(source, rows=rows) for source, rows in zip(sources, joined, strict=True)))

    @property
    def rows(self) -> tuple[Rows, ...]:
        """The opened sets."""
        return tuple(source.rows for source in self.sources)

    @property
    def shares(self) -> list[float]:
        """The share of each source in the samples; they sum to 1."""
        total = sum(source.weight for source in self.sources)
        return [source.weight / total for source in self.sources]

    def parts(self, count: int) -> Iterator[tuple[Rows, int]]:
        """The opened sets, each with its share of a number of rows, at least one."""
        for rows, share in zip(self.rows, self.shares, strict=True):
            yield rows, max(1, round(count * share))

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their labels, or None."""
        return self.sources[0].rows.class_names

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None if it is not known."""
        return self.sources[0].rows.num_classes

    @property
    def caption_column(self) -> str | None:
        """Column of the captions of the first source; None if captions are not read."""
        return self.sources[0].rows.caption_column

    @property
    def files(self) -> tuple[str, ...]:
        """Absolute paths of the local files of all sources."""
        return tuple(file for rows in self.rows for file in rows.files)

    def descriptions(self) -> Iterator[str]:
        """What is read of each source, one line each."""
        for source, share in zip(self.sources, self.shares, strict=True):
            if len(self.sources) == 1:
                yield source.rows.description
            else:
                yield f"{source.name}, {share:.1%} of the samples: {source.rows.description}"
