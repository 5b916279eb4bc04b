"""What an autoencoder keeps of images: their pixels, and their colour."""

import torch
from PIL import Image


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


def hue_is_right(images: torch.Tensor, reconstructions: torch.Tensor) -> tuple[int, int]:
    """Number of coloured pixels whose reconstruction has the same hue, within 30°, and of all coloured pixels.

    A pixel is coloured if its saturation is above 0.3 and its value above 0.2 (of HSV). A grey reconstruction, whose
    saturation is below 0.05, has no hue.

    Args:
        images: (batch, 3, height, width) in [-1, 1].
        reconstructions: the same images after encoding and decoding; values beyond [-1, 1] are cut off.

    Source: our choice.
    """
    (hue, saturation, value), (found, left, _) = map(_hsv, (images, reconstructions))
    coloured = (saturation > 0.3) & (value > 0.2)
    turned = (hue - found).abs()
    right = (torch.minimum(turned, 360 - turned) <= 30) & (left >= 0.05)
    return int((right & coloured).sum()), int(coloured.sum())


def _hsv(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hue in degrees, saturation and value of pixels, (batch, height, width) each; the hue of a grey pixel is 0."""
    red, green, blue = ((images.clamp(-1, 1) + 1) / 2).unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    sector = torch.where(
        value == red, (green - blue) % (6 * chroma), torch.where(value == green, blue - red, red - green)
    )
    start = torch.where(value == red, 0.0, torch.where(value == green, 120.0, 240.0))
    hue = (start + 60 * sector / chroma).nan_to_num(0, 0, 0) % 360
    return hue, (chroma / value).nan_to_num(0, 0, 0), value


def reconstruction_strip(images: torch.Tensor, reconstructions: torch.Tensor) -> Image.Image:
    """A picture of images in a row, above their reconstructions.

    Args:
        images: (count, 3, height, width) in [-1, 1].
        reconstructions: the same images after encoding and decoding.
    """
    rows = torch.stack([images, reconstructions.clamp(-1, 1)])  # (2, count, 3, height, width)
    pixels = ((rows + 1) * 127.5).round().byte().permute(0, 3, 1, 4, 2)  # (2, height, count, width, 3)
    height, width = pixels.shape[1], pixels.shape[2] * pixels.shape[3]
    return Image.fromarray(pixels.reshape(2 * height, width, 3).numpy())
