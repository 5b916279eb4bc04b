"""Transfer of a trained denoiser to other classes, from classes to text or back, or to another text encoder."""

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from improved_ldm.models.changes import Changes
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.published import PublishedTrunk
from improved_ldm.models.trunk import ConditioningTrunk

logger = logging.getLogger(__name__)

MAX_LISTED_CLASSES = 20
RowPairs = list[tuple[int, int]]  # (row of the new class table, row of the old one)


@dataclass(frozen=True)
class ConditionChanges(Changes):
    """A report of what happened to weights and classes.

    Args:
        matched_classes: Names of the classes that both models have.
        new_classes: Names of the classes that only the new model has.
        dropped_classes: Names of the classes that only the old model has.
    """

    matched_classes: tuple[str, ...] = ()
    new_classes: tuple[str, ...] = ()
    dropped_classes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [super().__str__()]
        for part in ("matched", "new", "dropped"):
            if names := getattr(self, f"{part}_classes"):
                more = ", …" if len(names) > MAX_LISTED_CLASSES else ""
                lines.append(f"{part} classes: {len(names)}: {', '.join(names[:MAX_LISTED_CLASSES])}{more}")
        return "\n".join(lines)


@torch.no_grad()
def change_conditions(
    denoiser: Denoiser,
    *,
    num_classes: int | None = None,
    text_dim: int | None = None,
    pooled_dim: int | None = None,
    class_names: list[str] | None = None,
    old_class_names: list[str] | None = None,
) -> tuple[Denoiser, ConditionChanges]:
    """A denoiser with the weights of a trained one and other semantic conditions; the report is logged.

    The new model reads only the conditions that are given. Weights are kept if name and size match, classes if their
    names match or, without names, if their number is equal. A new condition starts as the null condition: the
    prediction for it, and for the new null, is equal to the earlier one for the old null. This is exact

    - if the null is one token, that is, `num_class_tokens` and `num_null_tokens` are 1; otherwise the mean of the
      tokens is used,
    - for any number of tokens; but in an mmDiT, or if `control_route` is `tokens`, only for as many tokens as before,
      because they compete with the tokens of the image or the control,
    - for every text; but in a UNet whose old tokens are as wide as the new text, only for the null text, because such
      a UNet reads the text with its old weights.

    Args:
        denoiser: Denoiser of any backbone and mode; it is not changed.
        num_classes: Number of classes of a class-conditional model.
        text_dim: Channels of the text tokens of a text-conditional model.
        pooled_dim: Channels of the pooled text, which the published mode of most backbones reads.
        class_names: Names of the new classes, in the order of their labels, which are matched with the old ones.
        old_class_names: Names of the denoiser's classes, in the order of their labels.

    Returns:
        The denoiser, and a report of what is kept, changed, new and dropped.

    Raises:
        ValueError: If both classes and text or neither are given, the mode does not read the text, a number is below
            1, the names do not match the number of classes or are listed twice, or the denoiser has adapters.

    Source: Berrada et al., 2024, for the transfer; how new conditions start is our choice.
    """
    conditions = {"num_classes": num_classes, "text_dim": text_dim, "pooled_dim": pooled_dim}
    changed, report = with_conditions(denoiser, conditions, class_names, old_class_names)
    logger.warning("%s with other conditions\n%s", type(changed).__name__, report)
    return changed, report


@torch.no_grad()
def with_conditions(
    denoiser: Denoiser,
    conditions: dict[str, int | None],
    class_names: list[str] | None = None,
    old_class_names: list[str] | None = None,
) -> tuple[Denoiser, ConditionChanges]:
    """`change_conditions` for callers that show the report themselves; `conditions` as in `check_change`."""
    conditions = dict.fromkeys(("num_classes", "text_dim", "pooled_dim")) | conditions
    check_change(denoiser, conditions, denoiser.config.num_classes, class_names, old_class_names)

    changed = denoiser.remade(**{name: value for name, value in conditions.items() if name in denoiser.config})
    old, fresh = denoiser.state_dict(), changed.state_dict()
    fits = {
        name: tensor.clone() for name, tensor in old.items() if name in fresh and tensor.shape == fresh[name].shape
    }
    changed.load_state_dict(fits, strict=False, assign=True)

    rows = _matching_rows(denoiser.config.num_classes, conditions["num_classes"], class_names, old_class_names)
    for name, trunk in denoiser.named_modules():
        if isinstance(trunk, ConditioningTrunk):
            if isinstance(trunk, PublishedTrunk):
                _carry_embedding(trunk, changed.get_submodule(name), rows)
            _carry_tokens(trunk, changed.get_submodule(name), rows)
    _carry_values(denoiser, changed)

    return changed, _report(denoiser, changed, class_names or [], old_class_names or [])


def check_change(
    denoiser: Denoiser,
    conditions: dict[str, int | None],
    old_num_classes: int | None,
    class_names: list[str] | None = None,
    old_class_names: list[str] | None = None,
):
    """Raise a ValueError if `change_conditions` cannot be done.

    Args:
        denoiser: Denoiser whose class and mode are checked.
        conditions: `num_classes`, `text_dim` and `pooled_dim` of the new conditions.
        old_num_classes: Number of classes before, or None.
        class_names: Names of the new classes.
        old_class_names: Names of the classes before.
    """
    _check_conditions(denoiser, conditions)
    _check_names(conditions.get("num_classes"), old_num_classes, class_names, old_class_names)


def _check_conditions(denoiser: Denoiser, conditions: dict[str, int | None]):
    given = {name: value for name, value in conditions.items() if value is not None}
    mode = denoiser.config.conditioning
    takes = ("num_classes", *denoiser.text_arguments(mode))
    for name, value in given.items():
        if name not in takes:
            raise ValueError(
                f"`{name}` is {value}, but a {type(denoiser).__name__} of the {mode!r} mode takes {', '.join(takes)}."
            )
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; it must be an integer ≥ 1.")
    if not given or ("num_classes" in given and len(given) > 1):
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in given) or 'nothing'} is given; give `num_classes`, or the text's "
            f"{' and '.join(f'`{name}`' for name in takes[1:])}."
        )


def _check_names(
    num_classes: int | None,
    old_num_classes: int | None,
    class_names: list[str] | None,
    old_class_names: list[str] | None,
):
    if (class_names is None) != (old_class_names is None):
        missing = "class_names" if class_names is None else "old_class_names"
        raise ValueError(f"`{missing}` is None; classes are matched by `class_names` and `old_class_names` together.")
    for name, names, number in (
        ("class_names", class_names, num_classes),
        ("old_class_names", old_class_names, old_num_classes),
    ):
        if names is None:
            continue
        if len(names) != (number or 0):
            raise ValueError(f"`{name}` has {len(names)} names; it must have {number or 0}, one per class.")
        if twice := [one for one, count in Counter(names).items() if count > 1]:
            raise ValueError(f"`{name}` has {twice[0]!r} more than once; every class needs its own name.")


def _matching_rows(
    old_number: int | None, number: int | None, names: list[str] | None, old_names: list[str] | None
) -> RowPairs:
    if names is not None:
        places = {name: place for place, name in enumerate(old_names)}
        return [(row, places[name]) for row, name in enumerate(names) if name in places]
    return [(row, row) for row in range(number or 0)] if number == old_number else []


def _carry_rows(old: nn.Embedding, new: nn.Embedding, rows: RowPairs):
    """Copy the rows of classes that both tables have; the last row is the null, and new classes start as its copy."""
    new.weight.copy_(old.weight[-1].expand_as(new.weight))
    if rows:
        places, old_places = torch.tensor(rows, device=new.weight.device).T
        new.weight[places] = old.weight[old_places]


def _carry_embedding(old: PublishedTrunk, new: PublishedTrunk, rows: RowPairs):
    """Copy the embeddings of class, pooled text and sizes; a dropped null is added to the timestep's embedding."""
    if new.class_embedding is not None:
        if old.class_embedding is None:
            new.class_embedding.weight.zero_()
        else:
            _carry_rows(old.class_embedding, new.class_embedding, rows)

    old_pooled, new_pooled = (getattr(trunk.added_embedding, "pooled_dim", None) or 0 for trunk in (old, new))
    if new.added_embedding is not None and old.added_embedding is None:
        _zero(new.added_embedding.mlp.linear_2)
    elif new.added_embedding is not None and old_pooled != new_pooled:  # the sizes come after the pooled text
        weight = new.added_embedding.mlp.linear_1.weight.zero_()
        weight[:, new_pooled:] = old.added_embedding.mlp.linear_1.weight[:, old_pooled:]

    if any(
        (getattr(old, part) is None) != (getattr(new, part) is None) for part in ("class_embedding", "added_embedding")
    ):
        new.time_embedding.linear_2.bias += old.null_addition() - new.null_addition()


def _null_token(trunk: ConditioningTrunk) -> torch.Tensor | None:
    """The token (token_dim,) that is attended to for the null condition; the mean if there are several."""
    if trunk.class_tokens is not None:
        return trunk.class_tokens.weight[-1].unflatten(-1, (trunk.num_class_tokens, -1)).mean(0)
    if trunk.text_projection is not None:
        return trunk.text_projection(trunk.null_text.to(trunk.dtype)).mean(0)
    return None


def _carry_tokens(old: ConditioningTrunk, new: ConditioningTrunk, rows: RowPairs):
    """Copy class tokens, or initialise a projection that maps every text to the null token."""
    null = _null_token(old)
    if null is None:  # the old model has no attention to tokens; the new attention starts at zero
        return
    if new.class_tokens is not None:
        if old.class_tokens is not None:
            _carry_rows(old.class_tokens, new.class_tokens, rows)
        elif new.class_tokens.embedding_dim == new.num_class_tokens * len(null):
            new.class_tokens.weight.copy_(null.repeat(new.num_class_tokens).expand_as(new.class_tokens.weight))
    elif new.text_projection is not None:
        old_linears, linears = (_linears(trunk.text_projection) for trunk in (old, new))
        if not linears:
            if new.null_text.shape[-1] == len(null):
                new.null_text.copy_(null.expand_as(new.null_text))
        elif not old_linears:
            linears[-1].weight.zero_()
            linears[-1].bias.copy_(null)
        elif old_linears[0].in_features != linears[0].in_features:
            linears[0].weight.zero_()
            linears[0].bias.copy_(old_linears[0](old.null_text.to(old.dtype).mean(0)))


def _carry_values(old: Denoiser, new: Denoiser):
    """For tokens of another width, start the values at zero and add those of the null to the output's bias."""
    for name, attention in old.named_modules():
        if not hasattr(attention, "to_v"):
            continue
        new_attention = new.get_submodule(name)
        if attention.to_v.weight.shape != new_attention.to_v.weight.shape:
            _zero(new_attention.to_v)
            new_attention.to_out[0].bias.copy_(attention.to_out[0](attention.to_v(_null_token(old.trunk))))


def _linears(module: nn.Module | None) -> list[nn.Linear]:
    return [] if module is None else [part for part in module.modules() if isinstance(part, nn.Linear)]


def _zero(module: nn.Module):
    for parameter in module.parameters():
        parameter.zero_()


def _report(denoiser: Denoiser, changed: Denoiser, names: list[str], old_names: list[str]) -> ConditionChanges:
    old, new = denoiser.state_dict(), changed.state_dict()
    # tensors of another size that are kept in part: rows of class tables, the sizes next to the pooled text
    partly: tuple[str, ...] = ("class_tokens.weight", "class_embedding.weight")
    if getattr(getattr(changed.trunk, "added_embedding", None), "size_features", 0):
        partly += ("added_embedding.mlp.linear_1.weight",)
    parts: dict[str, Any] = {
        "kept": [],
        "changed": [],
        "new": [],
        "dropped": [name for name in old if name not in new],
    }
    for name, tensor in new.items():
        if name not in old or (tensor.shape != old[name].shape and not name.endswith(partly)):
            parts["new"].append(name)
        else:
            parts["kept" if torch.equal(tensor, old[name]) else "changed"].append(name)
    known, asked = set(old_names), set(names)
    classes = {
        "matched_classes": [name for name in names if name in known],
        "new_classes": [name for name in names if name not in known],
        "dropped_classes": [name for name in old_names if name not in asked],
    }
    return ConditionChanges(**{part: tuple(values) for part, values in (parts | classes).items()})
