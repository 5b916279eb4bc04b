"""From a published denoiser to a disentangled one that starts where it ended."""

import logging

import torch

from improved_ldm.models.changes import Changes
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.trunk import ConditioningTrunk

logger = logging.getLogger(__name__)


@torch.no_grad()
def disentangle(published: Denoiser) -> tuple[Denoiser, Changes]:
    """A disentangled denoiser with the weights of a published one.

    What a published embedding adds for the null condition goes into the bias of the timestep's embedding, class
    embeddings go on as class tokens, and what is new contributes nothing yet. So the first prediction is, whatever the
    control, that of the published model for the same text tokens; and for the null class, null pooled text and null
    sizes, since these reach the disentangled embedding no more.

    Args:
        published: in the published mode; it stays as it is.

    Returns:
        The denoiser, and what became of the weights.

    Raises:
        ValueError: for a denoiser in the disentangled mode, or one that reads neither classes nor text tokens.

    Source: our choice.
    """
    if published.config.conditioning != "published":
        raise ValueError(f"`conditioning` of the denoiser is {published.config.conditioning!r}, not 'published'.")
    if published.config.num_classes is None and published.config.text_dim is None:
        raise ValueError("the denoiser reads pooled text alone, which has no place in the disentangled mode.")
    reads_only_published = {"pooled_dim": None, "size_conditions": False}
    config = {name: value for name, value in reads_only_published.items() if name in published.config}
    denoiser = published.remade(conditioning="disentangled", **config)

    old, new = published.state_dict(), denoiser.state_dict()
    carried = {name: tensor for name, tensor in old.items() if name in new}
    moved = {}
    for name in old.keys() - new.keys():
        as_tokens = name.replace("class_embedding", "class_tokens")
        if as_tokens in new and as_tokens not in old and new[as_tokens].shape == old[name].shape:
            moved[name] = as_tokens
            carried[as_tokens] = old[name]
    denoiser.load_state_dict({name: tensor.clone() for name, tensor in carried.items()}, strict=False, assign=True)
    for name, trunk in published.named_modules():
        if isinstance(trunk, ConditioningTrunk):
            denoiser.get_submodule(name).time_embedding.linear_2.bias += trunk.null_addition()

    now = denoiser.state_dict()
    same = [name for name in new if name in old and torch.equal(now[name], old[name])]
    changes = Changes(
        kept=tuple(same),
        changed=tuple(name for name in new if name in old and name not in same),
        new=tuple(name for name in new if name not in carried),
        dropped=tuple(name for name in old if name not in new and name not in moved),
        moved=moved,
    )
    logger.warning("%s with disentangled conditioning\n%s", type(denoiser).__name__, changes)
    return denoiser, changes
