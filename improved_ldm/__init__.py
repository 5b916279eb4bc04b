"""Latent diffusion with disentangled conditioning: denoisers, their pipeline, training and evaluation.

Importing the package makes diffusers know its classes, so that `DiffusionPipeline.from_pretrained` loads them.
"""

import sys

import diffusers
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils

from improved_ldm.models.dit import DiTDenoiser
from improved_ldm.models.mdt import MDTDenoiser
from improved_ldm.models.mmdit import MMDiTDenoiser
from improved_ldm.models.pixart import PixArtDenoiser
from improved_ldm.models.unet import UNetDenoiser
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.version import __version__ as __version__

__all__ = ["DiTDenoiser", "ImprovedLDMPipeline", "MDTDenoiser", "MMDiTDenoiser", "PixArtDenoiser", "UNetDenoiser"]


def _register_with_diffusers():
    """Let diffusers find the classes by name: it looks in itself, in its pipelines and in a list of libraries."""
    package = sys.modules[__name__]
    for name in __all__:
        setattr(diffusers, name, getattr(package, name))
    setattr(diffusers.pipelines, __name__, package)
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(__name__, {})
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[__name__] = ImprovedLDMPipeline


_register_with_diffusers()
