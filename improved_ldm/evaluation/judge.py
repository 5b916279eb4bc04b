"""A small classifier that predicts what an image shows and whether it is mirrored. Distances use its features too."""

from itertools import accumulate

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class Judge(ModelMixin, ConfigMixin):
    """A convolutional classifier of (class, orientation) pairs, trained on real images only.

    Args:
        num_classes: Number of classes. Each has two orientations: as in the data, and mirrored.
        sample_size: Height and width of the images in pixels.
        widths: Channels of each stage. Each stage halves the resolution.
        data_source: Source of the data set that it was trained on, as for `open_rows`.
        one_sided: Classes whose images all face the same way in that data set, so that orientation is defined.

    Source: our choice.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 10,
        sample_size: int = 32,
        widths: tuple[int, ...] = (16, 32, 64, 128),
        data_source: str | None = None,
        one_sided: tuple[int, ...] = (),
    ):
        super().__init__()
        stages = [_stage(width, out) for width, out in zip((3, *widths), widths, strict=False)]
        self.body = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], 2 * num_classes)

    def feature_maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of every stage.

        Args:
            pixels: Images (batch, 3, `sample_size`, `sample_size`) in [-1, 1].

        Returns:
            One tensor (batch, width, height, width) ≥ 0 per stage, each at half the resolution of the previous one.

        Raises:
            ValueError: If the images have another size.
        """
        size = self.config.sample_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"`pixels` is {tuple(pixels.shape)}; the judge reads (batch, 3, {size}, {size}).")
        return list(accumulate(self.body, lambda maps, stage: stage(maps), initial=pixels))[1:]

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (batch, widths[-1]) ≥ 0 of `pixels`, as for `feature_maps`: the input of the last layer."""
        return self.feature_maps(pixels)[-1].mean((2, 3))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, `num_classes`, 2) of each class, as in the data and mirrored, from `features`."""
        return self.head(features).unflatten(1, (-1, 2))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits, as returned by `classify`, of `pixels`, as for `feature_maps`."""
        return self.classify(self.features(pixels))

    @torch.no_grad()
    def class_and_flip(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The most probable class of each image, and the more probable orientation of that class.

        Args:
            pixels: Images (batch, 3, `sample_size`, `sample_size`) in [-1, 1].

        Returns:
            labels: Class labels (batch,), int64.
            flips: Orientations (batch,), int64; 0 is as in the data, 1 is mirrored. They mean little for classes that
                are nearly symmetric.
        """
        logits = self(pixels)
        labels = logits.logsumexp(2).argmax(1)
        flips = logits[torch.arange(len(labels), device=labels.device), labels].argmax(1)
        return labels, flips


def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        *_convolution(in_channels, out_channels), *_convolution(out_channels, out_channels), nn.MaxPool2d(2)
    )


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()
