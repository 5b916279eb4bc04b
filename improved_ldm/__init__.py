"""Latent diffusion with disentangled conditioning: denoisers, their pipeline, training and evaluation.

Importing the package registers its classes with diffusers, so that `DiffusionPipeline.from_pretrained` loads them.
"""

import sys

import diffusers
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils

from improved_ldm.compatibility import check_libraries
from improved_ldm.models.dit import DiTDenoiser
from improved_ldm.models.mdt import MDTDenoiser
from improved_ldm.models.mmdit import MMDiTDenoiser
from improved_ldm.models.pixart import PixArtDenoiser
from improved_ldm.models.unet import UNetDenoiser
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.version import __version__ as __version__

__all__ = ["DiTDenoiser", "ImprovedLDMPipeline", "MDTDenoiser", "MMDiTDenoiser", "PixArtDenoiser", "UNetDenoiser"]


def _register_with_diffusers():
    """Let diffusers find the classes by name: it searches itself, its pipelines and a list of libraries.

    If a denoiser is passed to `from_pretrained`, diffusers warns that it cannot check the class. The warning is
    filtered, because the pipeline checks it.
    """
    package = sys.modules[__name__]
    for name in __all__:
        setattr(diffusers, name, getattr(package, name))
    setattr(diffusers.pipelines, __name__, package)
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(__name__, {})
    pipeline_loading_utils.logger.addFilter(
        lambda record: not any(f"a non-standard module {name}(" in record.getMessage() for name in __all__)
    )
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[__name__] = ImprovedLDMPipeline


check_libraries()
_register_with_diffusers()
