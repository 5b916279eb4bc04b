"""A disentangled denoiser that starts from the weights of a published one."""

import logging

import torch

from improved_ldm.models.changes import Changes
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.published import PublishedTrunk

logger = logging.getLogger(__name__)


@torch.no_grad()
def disentangle(published: Denoiser) -> tuple[Denoiser, Changes]:
    """A disentangled denoiser with the weights of a published one.

    The vector that a published embedding adds for the null condition is added to the bias of the timestep's embedding,
    class embeddings become class tokens, and new weights contribute nothing yet. So at first, regardless of the
    control, the prediction is that of the published model for the same text tokens, the null class, null pooled text
    and null sizes, because the last three no longer enter the embedding.

    Args:
        published: Denoiser in the published mode; it is not changed.

    Returns:
        The denoiser, and a report of what happened to the weights.

    Raises:
        ValueError: If the denoiser is in the disentangled mode, or reads neither classes nor text tokens.

    Source: our choice.
    """
    if published.config.conditioning != "published":
        raise ValueError(f"`conditioning` of the denoiser is {published.config.conditioning!r}, not 'published'.")
    if published.config.num_classes is None and published.config.text_dim is None:
        raise ValueError("the denoiser reads pooled text alone, which has no place in the disentangled mode.")
    config = {"pooled_dim": None} if "pooled_dim" in published.config else {}
    if form := published.config.get("published"):
        config["published"] = {name: value for name, value in form.items() if name != "size_conditions"}
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
        if isinstance(trunk, PublishedTrunk):
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
