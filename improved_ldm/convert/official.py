"""The models as their authors published them: DiT, MDT, PixArt-α, Stable Diffusion 3 and 3.5."""

import math
from typing import Any

import torch

from improved_ldm.convert.arguments import read_arguments
from improved_ldm.convert.mapping import Rule, StateDict, class_table, derived, fused, layer, mlp, same, unsqueezed
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.positions import relative_offsets, sincos_grid

QKV = ("to_q", "to_k", "to_v")

DIT_ARGUMENTS = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
}


def dit_config(config: dict[str, Any], state_dict: StateDict) -> dict[str, Any]:
    """Arguments of facebookresearch/DiT's `DiT` as ours."""
    arguments = read_arguments(
        config, DIT_ARGUMENTS | {"num_classes": 1000, "learn_sigma": True}, {}, ignored=("class_dropout_prob",)
    )
    return _sizes(arguments, arguments.learn_sigma) | {"num_classes": arguments.num_classes}


def dit_rules(denoiser: Denoiser) -> list[Rule]:
    """DiT's tensors."""
    return [
        *_trunk_and_ends(denoiser),
        *_adaptive_output(),
        unsqueezed("pos_embed", "positions"),
        *(
            rule
            for i in range(denoiser.config.num_layers)
            for rule in _dit_block(f"blocks.{i}", f"transformer_blocks.{i}")
        ),
    ]


def mdt_config(config: dict[str, Any], state_dict: StateDict) -> dict[str, Any]:
    """Arguments of sail-sg/MDT's `MDTv2` as ours; without a mask ratio, the published 0.3 is used."""
    arguments = read_arguments(
        config,
        DIT_ARGUMENTS | {"num_classes": 1000, "learn_sigma": True, "mask_ratio": None, "decode_layer": 4},
        {},
        ignored=("class_dropout_prob",),
    )
    decoder = int(arguments.decode_layer)
    return _sizes(arguments, arguments.learn_sigma) | {
        "num_classes": arguments.num_classes,
        "num_layers": (arguments.depth - decoder) // 2 * 2 + decoder,
        "num_decoder_layers": decoder,
        "mask_ratio": 0.3 if arguments.mask_ratio is None else float(arguments.mask_ratio),
    }


def mdt_rules(denoiser: Denoiser) -> list[Rule]:
    """MDTv2's tensors."""
    side = denoiser.config.sample_size // denoiser.config.patch_size
    offsets = relative_offsets(side, side, "cpu")
    blocks = [("sideblocks.0", "side_block")] + [
        (f"{published}.{i}", f"{ours}.{i}")
        for published, ours in (
            ("en_inblocks", "encoder_blocks"),
            ("en_outblocks", "encoder_skip_blocks"),
            ("de_blocks", "decoder_blocks"),
        )
        for i in range(len(getattr(denoiser, ours)))
    ]
    rules = [
        *_trunk_and_ends(denoiser),
        *_adaptive_output(),
        unsqueezed("pos_embed", "positions"),
        unsqueezed("decoder_pos_embed", "decoder_positions"),
        unsqueezed("mask_token", "mask_token", dims=2),
    ]
    for published, ours in blocks:
        bias = f"{published}.attn.rel_pos_bias"
        rules += _dit_block(published, ours)
        rules += [same(f"{bias}.relative_position_bias_table", f"{ours}.position_bias.table")]
        rules += [derived(f"{bias}.relative_position_index", offsets)]
        if denoiser.get_submodule(ours).skip_linear is not None:
            rules += layer(f"{published}.skip_linear", f"{ours}.skip_linear")
    return rules


def pixart_config(config: dict[str, Any], state_dict: StateDict) -> dict[str, Any]:
    """Arguments of PixArt-alpha's `PixArt` or `PixArtMS` as ours; the weights show which of the two it is."""
    arguments = read_arguments(
        config,
        DIT_ARGUMENTS | {"pred_sigma": True, "caption_channels": 4096, "lewei_scale": 1.0, "model_max_length": 120},
        {"window_size": 0, "use_rel_pos": False},
        ignored=("class_dropout_prob", "drop_path", "config", "learn_sigma", "window_block_indexes"),
    )
    return _sizes(arguments, arguments.pred_sigma) | {
        "text_dim": arguments.caption_channels,
        "position_extent": arguments.input_size // arguments.patch_size / arguments.lewei_scale,
        "published": {
            "num_null_tokens": arguments.model_max_length,
            "size_conditions": any(name.startswith("csize_embedder.") for name in state_dict),
        },
    }


def pixart_rules(denoiser: Denoiser) -> list[Rule]:
    """PixArt-α's tensors."""
    rules = [
        *_trunk_and_ends(denoiser),
        unsqueezed("pos_embed", "positions"),
        *mlp("y_embedder.y_proj", "trunk.text_projection", ("fc1", "fc2")),
        same("y_embedder.y_embedding", "trunk.null_text"),
        *layer("t_block.1", "modulation.linear"),
        same("final_layer.scale_shift_table", "output_layer.modulation.table"),
    ]
    if denoiser.published.size_conditions:
        rules += mlp("csize_embedder.mlp", "trunk.added_embedding.resolution")
        rules += mlp("ar_embedder.mlp", "trunk.added_embedding.aspect_ratio")
    for i in range(denoiser.config.num_layers):
        published, ours = f"blocks.{i}", f"transformer_blocks.{i}"
        rules += [same(f"{published}.scale_shift_table", f"{ours}.modulation.table")]
        rules += _self_attention(f"{published}.attn", f"{ours}.attn1")
        rules += layer(f"{published}.cross_attn.q_linear", f"{ours}.attn2.to_q")
        rules += fused(f"{published}.cross_attn.kv_linear", [f"{ours}.attn2.to_k", f"{ours}.attn2.to_v"])
        rules += layer(f"{published}.cross_attn.proj", f"{ours}.attn2.to_out.0")
        rules += _feed_forward(f"{published}.mlp", f"{ours}.ff")
    return rules


def sd3_config(config: dict[str, Any], state_dict: StateDict) -> dict[str, Any]:
    """Arguments of Stability-AI's `MMDiTX` as ours; as in the original code, sizes are inferred from the weights."""
    read_arguments(
        config,
        {},
        {"register_length": 0, "rmsnorm": False, "scale_mod_only": False, "swiglu": False, "qkv_bias": True},
        ignored=(
            "input_size",
            "patch_size",
            "in_channels",
            "depth",
            "mlp_ratio",
            "learn_sigma",
            "adm_in_channels",
            "context_embedder_config",
            "out_channels",
            "pos_embed_scaling_factor",
            "pos_embed_offset",
            "pos_embed_max_size",
            "num_patches",
            "qk_norm",
            "x_block_self_attn_layers",
            "dtype",
            "device",
            "verbose",
        ),
    )
    fc1 = "joint_blocks.0.x_block.mlp.fc1.weight"
    needed = ("pos_embed", "x_embedder.proj.weight", "context_embedder.weight", "final_layer.linear.weight", fc1)
    if missing := [name for name in needed if name not in state_dict]:
        raise ValueError(f"the state dict does not fit the source: keys are missing ({', '.join(missing)}).")
    hidden_size, in_channels, patch_size, _ = state_dict["x_embedder.proj.weight"].shape
    head_norm = state_dict.get("joint_blocks.0.x_block.attn.ln_q.weight")
    pooled = state_dict.get("y_embedder.mlp.0.weight")
    table = state_dict["pos_embed"][0]
    return {
        "sample_size": _trained_side(table) * patch_size,
        "in_channels": in_channels,
        "out_channels": len(state_dict["final_layer.linear.weight"]) // patch_size**2,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "num_layers": len({name.split(".")[1] for name in state_dict if name.startswith("joint_blocks.")}),
        "num_attention_heads": hidden_size // (64 if head_norm is None else len(head_norm)),
        "mlp_ratio": len(state_dict[fc1]) / hidden_size,
        "qk_norm": head_norm is not None,
        "text_dim": state_dict["context_embedder.weight"].shape[1],
        "pooled_dim": None if pooled is None else pooled.shape[1],
        "dual_attention_layers": sorted(
            int(name.split(".")[1]) for name in state_dict if name.endswith(".x_block.attn2.proj.weight")
        ),
        "published": {"position_table_size": math.isqrt(len(table))},
    }


def sd3_rules(denoiser: Denoiser) -> list[Rule]:
    """Stable Diffusion 3's and 3.5's tensors."""
    config = denoiser.config
    rules = [
        *_trunk_and_ends(denoiser),
        *_adaptive_output(),
        unsqueezed("pos_embed", "positions"),
        *layer("context_embedder", "trunk.text_projection"),
    ]
    if config.pooled_dim is not None:
        rules += mlp("y_embedder.mlp", "trunk.added_embedding.mlp")
    for i in range(config.num_layers):
        image, context = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        ours, is_last = f"transformer_blocks.{i}", i == config.num_layers - 1
        rules += layer(f"{image}.adaLN_modulation.1", f"{ours}.modulation.linear")
        rules += layer(f"{context}.adaLN_modulation.1", f"{ours}.context_modulation.linear")
        rules += _self_attention(f"{image}.attn", f"{ours}.attn")
        rules += fused(f"{context}.attn.qkv", [f"{ours}.attn.add_{name}_proj" for name in "qkv"])
        rules += _feed_forward(f"{image}.mlp", f"{ours}.ff")
        if not is_last:
            rules += layer(f"{context}.attn.proj", f"{ours}.attn.to_add_out")
            rules += _feed_forward(f"{context}.mlp", f"{ours}.ff_context")
        if i in config.dual_attention_layers:
            rules += _self_attention(f"{image}.attn2", f"{ours}.attn2")
        if config.qk_norm:
            for name in "qk":
                rules += [same(f"{image}.attn.ln_{name}.weight", f"{ours}.attn.norm_{name}.weight")]
                rules += [same(f"{context}.attn.ln_{name}.weight", f"{ours}.attn.norm_added_{name}.weight")]
                if i in config.dual_attention_layers:
                    rules += [same(f"{image}.attn2.ln_{name}.weight", f"{ours}.attn2.norm_{name}.weight")]
    return rules


def _sizes(arguments, learns_variance: bool) -> dict[str, Any]:
    return {
        "sample_size": arguments.input_size,
        "in_channels": arguments.in_channels,
        "out_channels": arguments.in_channels * (2 if learns_variance else 1),
        "patch_size": arguments.patch_size,
        "hidden_size": arguments.hidden_size,
        "num_layers": arguments.depth,
        "num_attention_heads": arguments.num_heads,
        "mlp_ratio": arguments.mlp_ratio,
    }


def _trained_side(table: torch.Tensor) -> int:
    """Patches per side at training: the extent of a sin-cos table of positions, or the side of any other table."""
    side = math.isqrt(len(table))
    step = torch.asin(table[1, 0].double().clamp(-1, 1)).item()  # the first channel is the sine of the column
    trained = round(side * step)
    if trained > 0 and torch.allclose(table.float(), sincos_grid(side, side, table.shape[1], trained), atol=1e-2):
        return trained
    return side


def _trunk_and_ends(denoiser: Denoiser) -> list[Rule]:
    rules = [
        *layer("x_embedder.proj", "patch_embedding.proj"),
        *mlp("t_embedder.mlp", "trunk.time_embedding"),
        *layer("final_layer.linear", "output_layer.linear"),
    ]
    if denoiser.config.num_classes is not None:
        table = "y_embedder.embedding_table.weight"
        rules += [class_table(table, "trunk.class_embedding.weight", denoiser.config.num_classes)]
    return rules


def _adaptive_output() -> list[Rule]:
    return layer("final_layer.adaLN_modulation.1", "output_layer.modulation.linear")


def _dit_block(published: str, ours: str) -> list[Rule]:
    return [
        *layer(f"{published}.adaLN_modulation.1", f"{ours}.modulation.linear"),
        *_self_attention(f"{published}.attn", f"{ours}.attn1"),
        *_feed_forward(f"{published}.mlp", f"{ours}.ff"),
    ]


def _self_attention(published: str, ours: str) -> list[Rule]:
    return [
        *fused(f"{published}.qkv", [f"{ours}.{name}" for name in QKV]),
        *layer(f"{published}.proj", f"{ours}.to_out.0"),
    ]


def _feed_forward(published: str, ours: str) -> list[Rule]:
    return [*layer(f"{published}.fc1", f"{ours}.net.0.proj"), *layer(f"{published}.fc2", f"{ours}.net.2")]
