"""The sources of published weights, and the conversion from and to each."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from improved_ldm.convert import diffusers_classes, official
from improved_ldm.convert.mapping import Rule, StateDict, check_shapes, to_ours
from improved_ldm.convert.mapping import to_published as publish
from improved_ldm.convert.warm_start import disentangle
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.dit import DiTDenoiser
from improved_ldm.models.mdt import MDTDenoiser
from improved_ldm.models.mmdit import MMDiTDenoiser
from improved_ldm.models.pixart import PixArtDenoiser
from improved_ldm.models.published import PublishedDiT
from improved_ldm.models.trunk import ConditioningMode
from improved_ldm.models.unet import UNetDenoiser


@dataclass(frozen=True)
class Source:
    """A published implementation.

    Args:
        denoiser: Class of the family.
        config: Function from its constructor arguments and state dict to the denoiser's constructor arguments.
        rules: Function from a denoiser to the rules that map its tensors.
        condition: Which of `num_classes` and `text_dim` the implementation needs.
        required: Values that the denoiser's config or published form must have for the implementation to express it.
    """

    denoiser: type[Denoiser]
    config: Callable[[dict[str, Any], StateDict], dict[str, Any]]
    rules: Callable[[Denoiser], list[Rule]]
    condition: str
    required: Mapping[str, Any] = field(default_factory=dict)


SD3 = Source(MMDiTDenoiser, official.sd3_config, official.sd3_rules, "text_dim")
SOURCES = {
    "facebookresearch/DiT": Source(
        DiTDenoiser,
        official.dit_config,
        official.dit_rules,
        "num_classes",
        {**asdict(PublishedDiT()), "qk_norm": False, "pooled_dim": None},
    ),
    "sail-sg/MDT": Source(
        MDTDenoiser, official.mdt_config, official.mdt_rules, "num_classes", {"qk_norm": False, "pooled_dim": None}
    ),
    "PixArt-alpha/PixArt-alpha": Source(
        PixArtDenoiser, official.pixart_config, official.pixart_rules, "text_dim", {"qk_norm": False}
    ),
    "Stability-AI/sd3": SD3,
    "Stability-AI/sd3.5": SD3,
}
DIFFUSERS = {
    "DiTTransformer2DModel": Source(
        DiTDenoiser,
        diffusers_classes.dit_config,
        diffusers_classes.dit_rules,
        "num_classes",
        {"downscale_freq_shift": 1.0, "qk_norm": False, "mlp_ratio": 4.0, "pooled_dim": None},
    ),
    "PixArtTransformer2DModel": Source(
        PixArtDenoiser,
        diffusers_classes.pixart_config,
        diffusers_classes.pixart_rules,
        "text_dim",
        {"qk_norm": False, "mlp_ratio": 4.0},
    ),
    "SD3Transformer2DModel": Source(
        MMDiTDenoiser,
        diffusers_classes.sd3_config,
        diffusers_classes.sd3_rules,
        "text_dim",
        {"mlp_ratio": 4.0},
    ),
    "UNet2DConditionModel": Source(
        UNetDenoiser, diffusers_classes.unet_config, diffusers_classes.unet_rules, "text_dim"
    ),
}


def from_published(
    source: str,
    state_dict: StateDict,
    config: dict[str, Any] | None = None,
    conditioning: ConditioningMode = "published",
) -> Denoiser:
    """A denoiser with published weights.

    In the published mode its predictions are those of the published model. In the disentangled mode all weights that
    it can use are kept and new weights start at zero, see `disentangle`; new and dropped weights are logged.

    Args:
        source: A key of `SOURCES`, or `diffusers`.
        state_dict: Published weights; they are copied.
        config: The source's own constructor arguments; missing ones take the source's defaults. For `diffusers` it
            must have `_class_name`.
        conditioning: `published` or `disentangled`.

    Returns:
        The denoiser, in evaluation mode and in the dtype of the weights.

    Raises:
        ValueError: If the source is unknown, an argument cannot be converted, or keys are missing or left over.
    """
    if conditioning not in ("published", "disentangled"):
        raise ValueError(f"`conditioning` is {conditioning!r}; it must be 'published' or 'disentangled'.")
    config = dict(config or {})
    entry = _source(source, _class_name(config))
    denoiser = entry.denoiser(**entry.config(config, state_dict), conditioning="published")
    rules = entry.rules(denoiser)
    ours = to_ours(rules, state_dict)
    check_shapes(rules, ours, denoiser.state_dict())
    denoiser.type(ours["trunk.time_embedding.linear_1.weight"].dtype)
    denoiser.load_state_dict(ours, strict=False, assign=True)  # keeps each tensor's dtype
    denoiser.eval()
    return denoiser if conditioning == "published" else disentangle(denoiser)[0]


def to_published(source: str, denoiser: Denoiser) -> StateDict:
    """The state dict that a published implementation loads.

    A learned null text, which no implementation has, is left out.

    Args:
        source: A key of `SOURCES`, or `diffusers`.
        denoiser: Denoiser in the published mode.

    Raises:
        ValueError: If the source cannot express the denoiser.
    """
    class_name = None
    if source == "diffusers":
        class_name = next((name for name, entry in DIFFUSERS.items() if type(denoiser) is entry.denoiser), "")
    entry = _source(source, class_name)
    if type(denoiser) is not entry.denoiser:
        raise ValueError(
            f"`denoiser` is a {type(denoiser).__name__}; {source} has the weights of a {entry.denoiser.__name__}."
        )
    values = {**denoiser.config, **asdict(denoiser.published)}
    for name, value in {"conditioning": "published", **entry.required}.items():
        if values[name] != value:
            raise ValueError(f"`{name}` of the denoiser is {values[name]!r}; {source} has {value!r} only.")
    if denoiser.config[entry.condition] is None:
        raise ValueError(f"`{entry.condition}` of the denoiser is None; {source} needs it.")
    with torch.no_grad():
        return publish(entry.rules(denoiser), denoiser.state_dict())


def _class_name(config: dict[str, Any]) -> str | None:
    """The class of a diffusers configuration; the published ones of DiT and PixArt-α name an older class."""
    name = config.get("_class_name")
    if name == "Transformer2DModel":
        norms = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
        return norms.get(config.get("norm_type"), name)
    return name


def _source(source: str, class_name: str | None) -> Source:
    if source == "diffusers":
        if class_name not in DIFFUSERS:
            raise ValueError(f"`_class_name` is {class_name!r}; diffusers' classes are {', '.join(DIFFUSERS)}.")
        return DIFFUSERS[class_name]
    if source not in SOURCES:
        raise ValueError(f"`source` is {source!r}; it must be diffusers, {', '.join(SOURCES)}.")
    return SOURCES[source]
