"""A report of what happened to a model's weights when a new model was made from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Changes:
    """Names of tensors, by what happened to them.

    Args:
        kept: Unchanged tensors.
        changed: Tensors that are kept in part, or that include the contribution of a null condition.
        new: Tensors that the old model does not have, or has in another size.
        dropped: Tensors that the new model does not have.
        moved: Renamed tensors, old name → new name.
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
