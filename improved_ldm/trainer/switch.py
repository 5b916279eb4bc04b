"""A change of conditions when a stage begins: what the denoiser keeps, what begins anew, and the record of both."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from improved_ldm.data.latents import SampleEncoder
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.seeds import derive_seed
from improved_ldm.trainer.semantic import Semantic
from improved_ldm.transfer.conditions import ConditionChanges, check_change, with_conditions


@dataclass(frozen=True)
class ConditionSwitch:
    """A change of classes, of the text encoder, or from one kind of condition to the other.

    Args:
        described: conditions before and after, in words.
        sizes: `num_classes`, or `text_dim` and `pooled_dim`, of the new conditions.
        old_num_classes: number of classes before, or None.
        class_names: names of the new classes; None if classes are not matched by name.
        old_class_names: names of the classes before.
        seed: seed of the weights that begin anew.
    """

    described: tuple[str, str]
    sizes: dict[str, int]
    old_num_classes: int | None
    class_names: list[str] | None
    old_class_names: list[str] | None
    seed: int

    def check(self, denoiser: Denoiser):
        """Raise a ValueError if denoisers of this class and mode do not take the new conditions."""
        check_change(denoiser, self.sizes, self.old_num_classes, self.class_names, self.old_class_names)

    def apply(self, denoiser: Denoiser) -> tuple[Denoiser, ConditionChanges]:
        """The denoiser with the new conditions, and what happened to its weights; the same in every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return with_conditions(denoiser, self.sizes, self.class_names, self.old_class_names)


def list_switches(
    semantics: Sequence[Semantic], encoders: Sequence[SampleEncoder], seed: int
) -> list[ConditionSwitch | None]:
    """The change of conditions at the start of each stage; None where they stay as they are.

    Args:
        semantics: what is sampled in each stage.
        encoders: encoder of each stage.
        seed: seed of the run.

    Raises:
        ValueError: if it is not known whether a label means the same in two stages.
    """
    sizes = [semantic.conditions(encoder) for semantic, encoder in zip(semantics, encoders, strict=True)]
    switches: list[ConditionSwitch | None] = [None]
    for number in range(1, len(semantics)):
        old, new = semantics[number - 1], semantics[number]
        unnamed = [semantic.class_names is None for semantic in (old, new)]
        if sizes[number - 1] == sizes[number] and "num_classes" in sizes[number] and any(unnamed) != all(unnamed):
            raise ValueError(
                f"the sets of stages {number} and {number + 1} have {old.described}, but only one of them names its "
                "classes; both must name them, or none, so that it is known whether a label means the same in both."
            )
        if (sizes[number - 1], old.described, old.class_names) == (sizes[number], new.described, new.class_names):
            switches.append(None)
            continue
        names = (None, None) if any(unnamed) else (new.class_names, old.class_names)
        described, old_number = (old.described, new.described), sizes[number - 1].get("num_classes")
        switches.append(ConditionSwitch(described, sizes[number], old_number, *names, derive_seed(seed, number)))
    return switches


def kept_moments(
    state: dict[str, Any], denoiser: Denoiser, changed: Denoiser, kept: Collection[str]
) -> dict[str, Any]:
    """A state dict of an optimizer with the moments of the kept weights only, by their places in the changed denoiser.

    Args:
        state: state dict of the optimizer of `denoiser`, whose moments are numbered like its parameters.
        denoiser: the denoiser before the change.
        changed: the denoiser after it.
        kept: names of the unchanged weights.
    """
    old_places = {name: place for place, (name, _) in enumerate(denoiser.named_parameters()) if name in kept}
    places = {place: old_places.get(name) for place, (name, _) in enumerate(changed.named_parameters())}
    moments = {place: state["state"][old] for place, old in places.items() if old in state["state"]}
    return {**state, "state": moments}


def changes_record(
    switch: ConditionSwitch,
    denoiser: Denoiser,
    changed: Denoiser,
    changes: ConditionChanges,
    moments: Collection[int],
    averages: bool,
) -> dict[str, Any]:
    """What a change of conditions keeps and what begins anew, as numbers of parameters.

    Args:
        switch: the change.
        denoiser: the denoiser before it.
        changed: the denoiser after it.
        changes: what happened to the weights.
        moments: places of the parameters whose moments are kept.
        averages: whether the averages of the weights are kept.

    Returns:
        Part of a record of the lineage: `conditions` before and after; `parameters` that are kept, changed, new, and
        dropped, and those that start at zero, by group of layers; the numbers of parameters whose `moments` and
        `averages` are kept, and of those whose begin anew; numbers of `classes` if they are matched by name.
    """
    old, new = dict(denoiser.named_parameters()), dict(changed.named_parameters())
    total = _total(new.values())
    zero = [name for name in (*changes.changed, *changes.new) if name in new and not new[name].any()]
    with_moments = _total(parameter for place, parameter in enumerate(new.values()) if place in moments)
    with_averages = total - _total(new[name] for name in changes.new if name in new) if averages else 0
    record = {
        "conditions": list(switch.described),
        "parameters": {
            "kept": _by_group(changes.kept, new),
            "changed": _by_group(changes.changed, new),
            "new": _by_group(changes.new, new),
            "zero": _by_group(zero, new),
            "dropped": _by_group(changes.dropped, old),
        },
        "moments": {"kept": with_moments, "new": total - with_moments},
        "averages": {"kept": with_averages, "new": total - with_averages},
    }
    if switch.class_names is not None:
        parts = ("matched", "new", "dropped")
        record["classes"] = {part: len(getattr(changes, f"{part}_classes")) for part in parts}
    return record


def _total(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _by_group(names: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Numbers of parameters by the first two names on the way to their layer; buffers are left out."""
    counts = Counter()
    for name in names:
        if name in parameters:
            path = [part for part in name.split(".") if not part.isdigit() and part not in ("weight", "bias")]
            counts[".".join(path[:2])] += parameters[name].numel()
    return dict(counts)
