"""Rules that map published tensors to ours with the same numbers; each rule works in both directions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensors = list[torch.Tensor]
StateDict = dict[str, torch.Tensor]

MAX_LISTED = 5  # names in a message


@dataclass(frozen=True)
class Rule:
    """Published tensors and ours that hold the same numbers.

    Args:
        published: Names in the published model.
        ours: Names in the denoiser.
        to_ours: Function from the tensors of `published` to the tensors of `ours`.
        to_published: Inverse function.
    """

    published: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Tensors], Tensors] = lambda tensors: tensors
    to_published: Callable[[Tensors], Tensors] = lambda tensors: tensors


def same(published: str, ours: str) -> Rule:
    """One tensor under two names."""
    return Rule((published,), (ours,))


def layer(published: str, ours: str) -> list[Rule]:
    """Weight and bias of a linear layer or a convolution."""
    return [same(f"{published}.{part}", f"{ours}.{part}") for part in ("weight", "bias")]


def mlp(published: str, ours: str, names: tuple[str, str] = ("0", "2")) -> list[Rule]:
    """Two linear layers, `names` in the published model, `linear_1` and `linear_2` here."""
    return [
        *layer(f"{published}.{names[0]}", f"{ours}.linear_1"),
        *layer(f"{published}.{names[1]}", f"{ours}.linear_2"),
    ]


def fused(published: str, ours: list[str]) -> list[Rule]:
    """A linear layer whose output is the concatenated output of several of our layers."""

    def rule(part: str) -> Rule:
        return Rule(
            (f"{published}.{part}",),
            tuple(f"{name}.{part}" for name in ours),
            lambda tensors: list(tensors[0].chunk(len(ours))),
            lambda tensors: [torch.cat(tensors)],
        )

    return [rule("weight"), rule("bias")]


def swapped(published: str, ours: str) -> list[Rule]:
    """A linear layer that outputs scale and shift, while ours outputs shift and scale."""

    def swap(tensors: Tensors) -> Tensors:
        return [torch.cat(tensors[0].chunk(2)[::-1])]

    return [Rule((f"{published}.{part}",), (f"{ours}.{part}",), swap, swap) for part in ("weight", "bias")]


def unsqueezed(published: str, ours: str, dims: int = 1) -> Rule:
    """A tensor that has leading dimensions of size 1 in the published model."""
    return Rule(
        (published,),
        (ours,),
        lambda tensors: [tensors[0].reshape(tensors[0].shape[dims:])],
        lambda tensors: [tensors[0][(None,) * dims]],
    )


def class_table(published: str, ours: str, num_classes: int) -> Rule:
    """Embeddings of the classes and the null class.

    If a published model has no null class, ours gets zeros for it, which are left out when it is converted back.
    """

    def with_null(tensors: Tensors) -> Tensors:
        table = tensors[0]
        return [torch.cat([table, torch.zeros_like(table[:1])]) if len(table) == num_classes else table]

    def without_empty_null(tensors: Tensors) -> Tensors:
        table = tensors[0]
        return [table if table[-1].any() else table[:-1]]

    return Rule((published,), (ours,), with_null, without_empty_null)


def copies(rules: list[list[Rule]]) -> list[Rule]:
    """Lists of rules for single tensors that differ only in published names, whose tensors are equal copies."""

    def rule(alike: tuple[Rule, ...]) -> Rule:
        published = tuple(name for rule in alike for name in rule.published)
        return Rule(published, alike[0].ours, lambda tensors: tensors[:1], lambda tensors: tensors * len(published))

    return [rule(alike) for alike in zip(*rules, strict=True)]


def derived(published: str, value: torch.Tensor) -> Rule:
    """A published tensor that follows from the configuration.

    Raises:
        ValueError: If the tensor differs when weights are converted to ours.
    """

    def check(tensors: Tensors) -> Tensors:
        if not torch.equal(tensors[0], value):
            raise ValueError(f"{published!r} does not have the value that follows from the configuration.")
        return []

    return Rule((published,), (), check, lambda _: [value])


def _listed(names: list[str]) -> str:
    """The first names of a list, and how many follow."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f", … and {more} more" if more > 0 else "")


def to_ours(rules: list[Rule], state_dict: StateDict) -> StateDict:
    """The denoiser's tensors, copies of the published ones.

    Raises:
        ValueError: If published names are missing or left over; the message lists them.
    """
    expected = {name for rule in rules for name in rule.published}
    missing, left_over = sorted(expected - state_dict.keys()), sorted(state_dict.keys() - expected)
    if missing or left_over:
        raise ValueError(
            f"the state dict does not fit the source: {len(missing)} keys are missing ({_listed(missing)}), "
            f"{len(left_over)} are left over ({_listed(left_over)})."
        )
    ours = {}
    for rule in rules:
        tensors = rule.to_ours([state_dict[name] for name in rule.published])
        ours |= {name: tensor.detach().clone() for name, tensor in zip(rule.ours, tensors, strict=True)}
    return ours


def to_published(rules: list[Rule], state_dict: StateDict) -> StateDict:
    """The published model's tensors, copies of the denoiser's."""
    published = {}
    for rule in rules:
        tensors = rule.to_published([state_dict[name] for name in rule.ours])
        published |= {name: tensor.detach().clone() for name, tensor in zip(rule.published, tensors, strict=True)}
    return published


def check_shapes(rules: list[Rule], ours: StateDict, expected: StateDict):
    """Raise a ValueError that lists, by published names, tensors whose shapes do not fit the configuration."""
    wrong = [
        f"{', '.join(rule.published)} gives {tuple(ours[name].shape)} for {tuple(expected[name].shape)}"
        for rule in rules
        for name in rule.ours
        if ours[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"the state dict does not fit the configuration: {'; '.join(wrong)}.")
