"""The training of an autoencoder, from its images to the network that a pipeline uses."""

import torch

from improved_ldm.autoencoder import spatial_factor
from improved_ldm.resolution import sides_of, size_text
from improved_ldm.trainer.autoencoder_model import build_autoencoder
from improved_ldm.trainer.autoencoder_task import AutoencoderTask
from improved_ldm.trainer.data import check_buckets, open_images
from improved_ldm.trainer.network_config import AutoencoderRunConfig
from improved_ldm.trainer.network_run import train_network


def train_autoencoder(config: AutoencoderRunConfig):
    """Train an autoencoder on images, and save it with what it keeps of them.

    Raises:
        ValueError, OSError: as in `train_network`, or if the sizes of autoencoder and images do not suit each other.
    """
    check_sizes(config)
    train_network(config, open_images, lambda run, mixture: AutoencoderTask(config))


def check_sizes(config: AutoencoderRunConfig):
    """Raise a ValueError if images do not divide into latent pixels, or the blocks do not suit each other."""
    with torch.device("meta"):
        factor = spatial_factor(build_autoencoder(config.autoencoder))
    check_buckets(config.transform, factor)
    for key in ("resolution", "target_scale"):
        size = getattr(config.transform, key)
        if size is not None and any(side % factor for side in sides_of(size)):
            raise ValueError(
                f"`transform.{key}` is {size_text(size)}; it must be a multiple of {factor} pixels, a latent pixel of "
                f"`autoencoder.block_out_channels` {list(config.autoencoder.block_out_channels)}."
            )
