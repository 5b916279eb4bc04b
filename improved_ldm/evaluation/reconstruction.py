"""What an autoencoder keeps of images: their pixels, and their colour."""

import torch


def psnr(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image, (batch,) dB.

    Args:
        images: (batch, 3, height, width) in [-1, 1].
        reconstructions: the same images after encoding and decoding; values beyond [-1, 1] are cut off, as in a file.
    """
    error = reconstructions.clamp(-1, 1) - images
    return 10 * (4 / error.square().mean((1, 2, 3)).clamp(min=1e-10)).log10()


def mean_saturation(images: torch.Tensor) -> torch.Tensor:
    """Mean saturation of each image, (batch,) in [0, 1]: the largest minus the smallest of red, green and blue.

    This is the saturation of HSV times its value, so that noise in dark pixels counts little.

    Args:
        images: (batch, 3, height, width) in [-1, 1]; values beyond are cut off.
    """
    channels = (images.clamp(-1, 1) + 1) / 2
    return (channels.amax(1) - channels.amin(1)).mean((1, 2))
