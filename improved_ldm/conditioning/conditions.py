"""The conditions of a batch as one bundle, which the trainer drops conditions from and denoisers take as input."""

from dataclasses import dataclass, fields, replace

import torch

from improved_ldm.conditioning.control import null_control


@dataclass(frozen=True)
class Conditioning:
    """The conditions of a batch; the fields are arguments of every denoiser's `forward`, None if unused.

    Each field can hold null conditions: rows of NaN in `encoder_hidden_states`, `pooled_projections` and `control`,
    and the index `num_classes` in `class_labels`.

    Args:
        encoder_hidden_states: (batch, tokens, text_dim).
        encoder_attention_mask: (batch, tokens) bool.
        pooled_projections: (batch, pooled_dim).
        class_labels: (batch,) int.
        control: (batch, n_control) float32; NaN marks unknown values.
    """

    encoder_hidden_states: torch.Tensor | None = None
    encoder_attention_mask: torch.Tensor | None = None
    pooled_projections: torch.Tensor | None = None
    class_labels: torch.Tensor | None = None
    control: torch.Tensor | None = None

    def _map(self, function) -> "Conditioning":
        values = self.kwargs().items()
        return type(self)(**{name: None if value is None else function(value) for name, value in values})

    def kwargs(self) -> dict[str, torch.Tensor | None]:
        """The bundle as keyword arguments of a denoiser."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Conditioning":
        """Move the bundle to a device, and its text to a dtype; the control stays float32, which sizes need."""
        moved = self._map(lambda value: value.to(device))
        text = {
            name: value.to(dtype)
            for name in ("encoder_hidden_states", "pooled_projections")
            if (value := getattr(moved, name)) is not None
        }
        return replace(moved, **text) if dtype is not None else moved

    def only(self, names: frozenset[str]) -> "Conditioning":
        """The conditions with these names; all others are None."""
        return type(self)(**{name: value for name, value in self.kwargs().items() if name in names})

    def with_control(self, control: torch.Tensor | None) -> "Conditioning":
        """The same semantic condition with a control of shape (batch, n_control)."""
        return replace(self, control=control)

    def without_semantic(self, num_classes: int | None, keeps_mask: bool = False) -> "Conditioning":
        """The same batch with the null semantic condition: no text, no class.

        Args:
            num_classes: Index of the null class.
            keeps_mask: Whether the null text keeps the mask of the text; otherwise all its tokens count.
        """
        nan, mask = torch.nan, self.encoder_attention_mask
        return replace(
            self,
            encoder_hidden_states=_full(self.encoder_hidden_states, nan),
            encoder_attention_mask=mask if keeps_mask else _full(mask, True),
            pooled_projections=_full(self.pooled_projections, nan),
            class_labels=_full(self.class_labels, num_classes),
        )

    def without_control(self) -> "Conditioning":
        """The same batch with the null control."""
        if self.control is None:
            return self
        return replace(self, control=null_control(len(self.control), self.control.device))

    def dropped(
        self, semantic: torch.Tensor, control: torch.Tensor, num_classes: int | None, keeps_mask: bool = False
    ) -> "Conditioning":
        """Replace the conditions of some samples by their nulls, the semantic condition and the control separately.

        Args:
            semantic: (batch,) bool, True where text and class are dropped.
            control: (batch,) bool, True where the control is dropped.
            num_classes: Index of the null class.
            keeps_mask: As in `without_semantic`.
        """
        blank = self.without_semantic(num_classes, keeps_mask).without_control()

        def pick(name: str) -> torch.Tensor | None:
            value, null = getattr(self, name), getattr(blank, name)
            if value is None:
                return None
            where = control if name == "control" else semantic
            return torch.where(where.view(-1, *[1] * (value.ndim - 1)), null, value)

        return type(self)(**{field.name: pick(field.name) for field in fields(self)})

    @classmethod
    def concatenate(cls, parts: "list[Conditioning]") -> "Conditioning":
        """Concatenate several batches, in order.

        Raises:
            ValueError: If some of the batches have a condition that others lack.
        """

        def join(name: str) -> torch.Tensor | None:
            values = [getattr(part, name) for part in parts]
            if all(value is None for value in values):
                return None
            if any(value is None for value in values):
                raise ValueError(f"`{name}` is None in some of the batches to concatenate; set it in all or in none.")
            return torch.cat(values)

        return cls(**{field.name: join(field.name) for field in fields(cls)})


def _full(value: torch.Tensor | None, fill) -> torch.Tensor | None:
    return None if value is None else torch.full_like(value, fill)
