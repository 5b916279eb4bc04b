"""diffusers' caches, which reuse states that hardly change between steps, and the denoisers that each one fits.

A cache of attention fits every denoiser; a cache that skips blocks needs blocks without skip connections.
"""

import inspect
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from improved_ldm.conditioning.conditions import Conditioning

ATTENTION_CACHES = (PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig)
BLOCK_CACHES = (FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig)

# full names of modules, as regular expressions
ATTENTION = r".*blocks.*\.attn\d*"
BLOCK = r"[^.]*blocks\.\d+"
OUTPUT = r"output_layer"

# arguments of `forward` that have a row per image
ROWS = ("hidden_states", "timestep", *Conditioning().kwargs())


class CachingMixin(CacheMixin):
    """diffusers' interface to the caches of a denoiser; caches without effect or with a wrong effect are refused."""

    _skip_connections = False  # whether skip connections join blocks
    _num_terms: int | None = None  # of the guidance, at the last evaluation

    @property
    def caches(self) -> tuple[type, ...]:
        """Config classes of the caches that fit."""
        return ATTENTION_CACHES if self._skip_connections else (*ATTENTION_CACHES, *BLOCK_CACHES)

    def enable_cache(self, config: Any):
        """Reuse states that hardly change between steps.

        Args:
            config: Config of a diffusers cache; `caches` lists the classes that fit.

        Raises:
            ValueError: If the cache does not fit the denoiser, or its settings match none of the layers.
        """
        self._check_cache(config)
        if isinstance(config, TaylorSeerCacheConfig):
            config = self._with_our_names(config)
        if isinstance(config, FasterCacheConfig):  # diffusers halves the batch of the arguments with these names
            config = replace(config, _unconditional_conditional_input_kwargs_identifiers=ROWS)
        before = _num_hooks(self)
        super().enable_cache(config)
        if _num_hooks(self) == before:
            self.disable_cache()
            raise ValueError(
                f"the identifiers of the {type(config).__name__} match no attention of this "
                f"{type(self).__name__}, such as {next(name for name, _ in self.named_modules() if 'attn' in name)!r}."
            )
        if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
            HookRegistry.check_if_exists_or_initialize(self).register_hook(
                _UnconditionalFirst(), _UnconditionalFirst.name
            )

    def disable_cache(self):
        """Disable the cache; every step is computed in full again."""
        HookRegistry.check_if_exists_or_initialize(self).remove_hook(_UnconditionalFirst.name, recurse=False)
        super().disable_cache()

    def start_caching(self, num_terms: int):
        """Clear the states of an earlier call, also of an interrupted one.

        Args:
            num_terms: Evaluations per step that the guidance needs.

        Raises:
            ValueError: If a FasterCache does not get exactly one conditional and one unconditional evaluation.
        """
        self._num_terms = num_terms
        if not self.is_cache_enabled:
            return
        self._reset_stateful_cache()
        config = self._cache_config
        if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled and num_terms != 2:
            raise ValueError(
                f"a FasterCache infers the unconditional prediction from the conditional one, but the guidance "
                f"evaluates {num_terms} conditions; set a `guidance_scale` other than 1, `control_guidance_scale` to "
                f"1 and a constant schedule in `guidance_options`, or `is_guidance_distilled=True`."
            )

    def guidance_context(self, num_terms: int):
        """The cache context for evaluating all conditions of the guidance in one batch.

        Args:
            num_terms: Number of conditions; if it changes between steps, the caches are cleared.
        """
        if num_terms != self._num_terms:
            self.start_caching(num_terms)
        return self.cache_context("guided")

    def _check_cache(self, config: Any):
        name = type(self).__name__
        if not isinstance(config, self.caches):
            raise ValueError(
                f"a {type(config).__name__} does not fit this {name}"
                f"{', whose blocks are joined by skip connections' if self._skip_connections else ''}; "
                f"it must be one of {', '.join(cache.__name__ for cache in self.caches)}."
            )
        if isinstance(config, FasterCacheConfig):
            if config.tensor_format != "BCHW":
                raise ValueError(f"`tensor_format` is {config.tensor_format!r}; it must be 'BCHW'.")
            if config.current_timestep_callback is None:
                raise ValueError("`current_timestep_callback` is None; pass `lambda: pipe.current_timestep`.")
        if isinstance(config, FirstBlockCacheConfig) and len(self.transformer_blocks) < 2:
            raise ValueError(f"a FirstBlockCacheConfig needs at least two blocks; this {name} has one.")
        if isinstance(config, TaylorSeerCacheConfig) and config.use_lite_mode and not hasattr(self, OUTPUT):
            raise ValueError(f"`use_lite_mode` is True, but not all blocks of this {name} can be skipped.")

    def _with_our_names(self, config: TaylorSeerCacheConfig) -> TaylorSeerCacheConfig:
        """The config with our module names, where diffusers uses the names of its own models."""
        if config.use_lite_mode:
            return replace(config, use_lite_mode=False, skip_predict_identifiers=[BLOCK], cache_identifiers=[OUTPUT])
        return config if config.cache_identifiers else replace(config, cache_identifiers=[ATTENTION])


class _UnconditionalFirst(ModelHook):
    """Swaps the halves of the batch for diffusers' FasterCache, which expects the unconditional rows first."""

    name = "unconditional_first"

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        del arguments["self"]
        batch_size = len(arguments["hidden_states"])
        arguments["timestep"] = torch.as_tensor(arguments["timestep"]).expand(batch_size)
        if arguments.get("added_cond_kwargs"):
            raise ValueError("`added_cond_kwargs` does not work with a FasterCache; pass `control` instead.")
        return (), {
            name: _swap_halves(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
            if value is not None
        }

    def post_forward(self, module: nn.Module, output):
        if isinstance(output, tuple):
            return _swap_halves(output[0]), *output[1:]
        return type(output)(sample=_swap_halves(output.sample))


def _swap_halves(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def _num_hooks(denoiser: nn.Module) -> int:
    """The number of diffusers hooks on the modules of a denoiser, without those on the denoiser itself."""
    registries = (getattr(module, "_diffusers_hook", None) for name, module in denoiser.named_modules() if name)
    return sum(len(registry.hooks) for registry in registries if registry is not None)
