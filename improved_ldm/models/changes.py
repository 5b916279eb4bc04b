"""What became of a model's weights when another was made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Changes:
    """Names of tensors, by what became of them.

    Args:
        kept: as they were.
        changed: kept in part, or with the contribution of a null condition added.
        new: not in the old model, or there in another size.
        dropped: without a place in the new model.
        moved: on under another name, old → new.
    """

    kept: tuple[str, ...]
    changed: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    moved: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"kept: {len(self.kept)} tensors"]
        lines += [f"{part}: {', '.join(getattr(self, part)) or 'nothing'}" for part in ("changed", "new", "dropped")]
        if self.moved:
            lines.append(f"moved: {', '.join(f'{old} as {new}' for old, new in self.moved.items())}")
        return "\n".join(lines)
