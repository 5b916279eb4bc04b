"""The models as implemented in diffusers; the class is read from the configuration."""

import inspect
from typing import Any

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from improved_ldm.convert.arguments import read_arguments
from improved_ldm.convert.mapping import (
    Rule,
    StateDict,
    copies,
    layer,
    mlp,
    same,
    swapped,
    unsqueezed,
)
from improved_ldm.models.denoiser import Denoiser

LINEARS = ("linear_1", "linear_2")
BLOCK_FIXED = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    # arguments of `Transformer2DModel`, which once contained these classes
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
    "double_self_attention": False,
}
BLOCK_IGNORED = ("dropout", "norm_num_groups", "upcast_attention")


def defaults_of(cls: type, *names: str) -> dict[str, Any]:
    """Arguments of a diffusers class with their defaults."""
    parameters = inspect.signature(cls.__init__).parameters
    return {name: parameters[name].default for name in names}


SIZES = ("sample_size", "patch_size", "in_channels", "out_channels", "num_layers")
HEADS = ("num_attention_heads", "attention_head_dim")


def dit_config(config: dict[str, Any], state_dict: StateDict) -> dict[str, Any]:
    """Arguments of `DiTTransformer2DModel` as ours."""
    arguments = read_arguments(
        config,
        defaults_of(DiTTransformer2DModel, *SIZES, *HEADS, "num_embeds_ada_norm", "norm_eps"),
        BLOCK_FIXED | {"norm_type": "ada_norm_zero", "cross_attention_dim": None, "attention_type": "default"},
        BLOCK_IGNORED,
    )
    return _sizes(arguments) | {
        "num_classes": arguments.num_embeds_ada_norm,
        "published": {
            "norm_eps": arguments.norm_eps,
            "downscale_freq_shift": 1.0,
            "trunk_per_block": not _embedders_are_equal(state_dict, arguments.num_layers),
        },
    }


def dit_rules(denoiser: Denoiser) -> list[Rule]:
    """The tensors of `DiTTransformer2DModel`, which has embedders of timestep and class in each block."""
    config = denoiser.config

    def trunk(i: int, ours: str) -> list[Rule]:
        embedders = f"transformer_blocks.{i}.norm1.emb"
        return [
            *mlp(f"{embedders}.timestep_embedder", f"{ours}.time_embedding", LINEARS),
            same(f"{embedders}.class_embedder.embedding_table.weight", f"{ours}.class_embedding.weight"),
        ]

    rules = [
        *layer("pos_embed.proj", "patch_embedding.proj"),
        *layer("proj_out_1", "output_layer.modulation.linear"),
        *layer("proj_out_2", "output_layer.linear"),
    ]
    if denoiser.published.trunk_per_block:
        names = ["trunk", *(f"later_trunks.{i}" for i in range(config.num_layers - 1))]
        rules += [rule for i, name in enumerate(names) for rule in trunk(i, name)]
    else:
        rules += copies([trunk(i, "trunk") for i in range(config.num_layers)])
    for i in range(config.num_layers):
        block = f"transformer_blocks.{i}"
        rules += layer(f"{block}.norm1.linear", f"{block}.modulation.linear")
        rules += _kept(denoiser, f"{block}.attn1", f"{block}.ff")
    return rules


def pixart_config(config: dict[str, Any], state_dict: StateDict) -> dict[str, Any]:
    """Arguments of `PixArtTransformer2DModel` as ours."""
    names = ("caption_channels", "cross_attention_dim", "interpolation_scale", "use_additional_conditions", "norm_eps")
    arguments = read_arguments(
        config,
        defaults_of(PixArtTransformer2DModel, *SIZES, *HEADS, *names),
        BLOCK_FIXED | {"norm_type": "ada_norm_single", "attention_type": "default"},
        (*BLOCK_IGNORED, "num_embeds_ada_norm"),
    )
    sizes = _sizes(arguments)
    if arguments.caption_channels is None:
        raise ValueError("`caption_channels` is None in the source's configuration; it must be a number.")
    if arguments.cross_attention_dim != sizes["hidden_size"]:
        raise ValueError(
            f"`cross_attention_dim` is {arguments.cross_attention_dim} in the source's configuration; "
            f"only the width {sizes['hidden_size']} converts."
        )
    if arguments.norm_eps != 1e-6:
        raise ValueError(f"`norm_eps` is {arguments.norm_eps} in the source's configuration; only 1e-06 converts.")
    scale, has_sizes = arguments.interpolation_scale, arguments.use_additional_conditions
    return sizes | {
        "text_dim": arguments.caption_channels,
        "position_extent": arguments.sample_size
        // arguments.patch_size
        / (max(arguments.sample_size // 64, 1) if scale is None else scale),
        "published": {"size_conditions": arguments.sample_size == 128 if has_sizes is None else has_sizes},
    }


def pixart_rules(denoiser: Denoiser) -> list[Rule]:
    """The tensors of `PixArtTransformer2DModel`."""
    embedders = "adaln_single.emb"
    rules = [
        *layer("pos_embed.proj", "patch_embedding.proj"),
        *mlp(f"{embedders}.timestep_embedder", "trunk.time_embedding", LINEARS),
        *mlp("caption_projection", "trunk.text_projection", LINEARS),
        *layer("adaln_single.linear", "modulation.linear"),
        same("scale_shift_table", "output_layer.modulation.table"),
        *layer("proj_out", "output_layer.linear"),
    ]
    if denoiser.published.size_conditions:
        rules += mlp(f"{embedders}.resolution_embedder", "trunk.added_embedding.resolution", LINEARS)
        rules += mlp(f"{embedders}.aspect_ratio_embedder", "trunk.added_embedding.aspect_ratio", LINEARS)
    for i in range(denoiser.config.num_layers):
        block = f"transformer_blocks.{i}"
        rules += [same(f"{block}.scale_shift_table", f"{block}.modulation.table")]
        rules += _kept(denoiser, f"{block}.attn1", f"{block}.attn2", f"{block}.ff")
    return rules


def sd3_config(config: dict[str, Any], state_dict: StateDict) -> dict[str, Any]:
    """Arguments of `SD3Transformer2DModel` as ours."""
    names = ("joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size", "dual_attention_layers", "qk_norm")
    arguments = read_arguments(
        config, defaults_of(SD3Transformer2DModel, *SIZES, *HEADS, *names), {}, ("caption_projection_dim",)
    )
    if arguments.qk_norm not in (None, "rms_norm"):
        raise ValueError(
            f"`qk_norm` is {arguments.qk_norm!r} in the source's configuration; only 'rms_norm' converts."
        )
    return _sizes(arguments) | {
        "qk_norm": arguments.qk_norm is not None,
        "text_dim": arguments.joint_attention_dim,
        "pooled_dim": arguments.pooled_projection_dim,
        "dual_attention_layers": tuple(arguments.dual_attention_layers),
        "published": {"position_table_size": arguments.pos_embed_max_size},
    }


def sd3_rules(denoiser: Denoiser) -> list[Rule]:
    """The tensors of `SD3Transformer2DModel`."""
    rules = [
        unsqueezed("pos_embed.pos_embed", "positions"),
        *layer("pos_embed.proj", "patch_embedding.proj"),
        *mlp("time_text_embed.timestep_embedder", "trunk.time_embedding", LINEARS),
        *mlp("time_text_embed.text_embedder", "trunk.added_embedding.mlp", LINEARS),
        *layer("context_embedder", "trunk.text_projection"),
        *swapped("norm_out.linear", "output_layer.modulation.linear"),
        *layer("proj_out", "output_layer.linear"),
    ]
    last = denoiser.config.num_layers - 1
    for i, module in enumerate(denoiser.transformer_blocks):
        block = f"transformer_blocks.{i}"
        rules += layer(f"{block}.norm1.linear", f"{block}.modulation.linear")
        context = swapped if i == last else layer
        rules += context(f"{block}.norm1_context.linear", f"{block}.context_modulation.linear")
        parts = ["attn", "ff"] + ["ff_context"] * (i < last) + ["attn2"] * (module.attn2 is not None)
        rules += _kept(denoiser, *(f"{block}.{part}" for part in parts))
    return rules


def unet_config(config: dict[str, Any], state_dict: StateDict) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel` as ours."""
    carried = (
        *("sample_size", "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types"),
        *("layers_per_block", "transformer_layers_per_block", "attention_head_dim", "cross_attention_dim"),
        *("use_linear_projection", "norm_num_groups", "addition_embed_type", "addition_time_embed_dim"),
        "projection_class_embeddings_input_dim",
    )
    ignored = ("dropout", "addition_embed_type_num_heads", "mid_block_only_cross_attention", "upcast_attention")
    names = inspect.signature(UNet2DConditionModel.__init__).parameters.keys() - {"self", *carried, *ignored}
    arguments = read_arguments(
        config, defaults_of(UNet2DConditionModel, *carried), defaults_of(UNet2DConditionModel, *names), ignored
    )
    levels = len(arguments.block_out_channels)
    if arguments.addition_embed_type not in (None, "text_time"):
        raise ValueError(
            f"`addition_embed_type` is {arguments.addition_embed_type!r} in the source's configuration; "
            "only None and 'text_time' convert."
        )
    if not isinstance(arguments.layers_per_block, int) or not isinstance(arguments.cross_attention_dim, int):
        raise ValueError("`layers_per_block` and `cross_attention_dim` convert as one number for all levels only.")
    sample_size = 64 if arguments.sample_size is None else arguments.sample_size
    if not isinstance(sample_size, int):
        raise ValueError(f"`sample_size` is {sample_size!r} in the source's configuration; only a square converts.")
    size_features, pooled_dim = 0, None
    if arguments.addition_embed_type == "text_time":
        size_features = arguments.addition_time_embed_dim
        pooled_dim = arguments.projection_class_embeddings_input_dim - 6 * size_features
    return {
        "sample_size": sample_size,
        "in_channels": arguments.in_channels,
        "out_channels": arguments.out_channels,
        "block_out_channels": tuple(arguments.block_out_channels),
        "down_block_types": tuple(arguments.down_block_types),
        "up_block_types": tuple(arguments.up_block_types),
        "layers_per_block": arguments.layers_per_block,
        "transformer_layers_per_block": _each_level(arguments.transformer_layers_per_block, levels),
        "num_attention_heads": _each_level(arguments.attention_head_dim, levels),  # diffusers' name is a mistake
        "use_linear_projection": arguments.use_linear_projection,
        "norm_num_groups": arguments.norm_num_groups,
        "text_dim": arguments.cross_attention_dim,
        "pooled_dim": pooled_dim,
        "published": {"size_features": size_features},
    }


def unet_rules(denoiser: Denoiser) -> list[Rule]:
    """The tensors of `UNet2DConditionModel`."""
    rules = mlp("time_embedding", "trunk.time_embedding", LINEARS)
    if denoiser.trunk.added_embedding is not None:
        rules += mlp("add_embedding", "trunk.added_embedding.mlp", LINEARS)
    return rules + [same(name, name) for name in denoiser.state_dict() if not name.startswith("trunk.")]


def _sizes(arguments) -> dict[str, Any]:
    out_channels = arguments.in_channels if arguments.out_channels is None else arguments.out_channels
    return {
        "sample_size": arguments.sample_size,
        "in_channels": arguments.in_channels,
        "out_channels": out_channels,
        "patch_size": arguments.patch_size,
        "hidden_size": arguments.num_attention_heads * arguments.attention_head_dim,
        "num_layers": arguments.num_layers,
        "num_attention_heads": arguments.num_attention_heads,
    }


def _embedders_are_equal(state_dict: StateDict, num_layers: int) -> bool:
    """Whether the embedders of timestep and class are equal in all blocks of a DiT, as in the published weights."""
    first = "transformer_blocks.0.norm1.emb."
    names = [name for name in state_dict if name.startswith(first)]
    return all(
        (copy := state_dict.get(name.replace(first, f"transformer_blocks.{i}.norm1.emb."))) is None
        or copy.equal(state_dict[name])
        for name in names
        for i in range(1, num_layers)
    )


def _each_level(value: int | list[int] | tuple[int, ...], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)


def _kept(denoiser: Denoiser, *modules: str) -> list[Rule]:
    """Modules whose tensors have the same names in both models."""
    return [
        same(f"{module}.{name}", f"{module}.{name}")
        for module in modules
        for name in denoiser.get_submodule(module).state_dict()
    ]
