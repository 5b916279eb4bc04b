"""Feature networks, which turn images into the vectors that distances between sets are computed from."""

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from transformers import AutoModel

from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.networks import (
    MeasuringNetwork,
    check_pixels,
    load_judge,
    load_transformers,
    opening,
    process,
    to_bytes,
)
from improved_ldm.evaluation.open_clip_towers import OpenClip

SOURCES = (
    "'inception', 'inception:FILE', 'embedded:judge', 'open_clip:MODEL:PRETRAINED', "
    "or the folder or Hub id of a Judge or of a transformers vision model"
)

Resizing = Literal["network", "clean"]


@dataclass(frozen=True)
class Features:
    """Output of a feature network for a batch of images.

    Args:
        vectors: Features (batch, num_features), float32.
        probabilities: Class probabilities (batch, classes), float32; each row sums to 1. None if the network is not a
            classifier.
        spatial: Features with positions (batch, num_spatial_features), float32. None if the network has none.
    """

    vectors: torch.Tensor
    probabilities: torch.Tensor | None = None
    spatial: torch.Tensor | None = None


class FeatureNetwork(MeasuringNetwork, ABC):
    """A frozen network that turns images into vectors.

    `name` is the source of the network, `sha256` is the hash of its weights, `num_features` is the length of the
    vectors, `num_spatial_features` is that of the spatial features (0 without them), `is_classifier` states whether it
    returns probabilities, and `resizing` how images are resized before they are read.
    """

    num_features: int
    num_spatial_features = 0
    is_classifier = False
    resizing: Resizing = "network"

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Features:
        """Compute the features of images.

        Args:
            pixels: Images (batch, 3, height, width) in [−1, 1]. Every network except a judge resizes them, as its
                authors do.

        Returns:
            The features, on the network's device.

        Raises:
            ValueError: If the shape or range is wrong.
        """
        check_pixels(pixels)
        return self.extract(pixels.to(self.device, torch.float32))

    @abstractmethod
    def extract(self, pixels: torch.Tensor) -> Features:
        """Features of pixels that are already checked and on the network's device."""

    def _measure_width(self):
        self.num_features = self(torch.zeros(1, 3, 32, 32)).vectors.shape[1]


class InceptionFeatures(FeatureNetwork):
    """TensorFlow's Inception v3, the network of FID, KID and the Inception score, with the layers of torch-fidelity.

    Args:
        source: `inception` or `inception:FILE`.
        device: Device to compute on.
        resizing: How images become 299 x 299 pixels: `network` is TensorFlow 1's bilinear resize inside the network,
            which does not smooth before it reduces; `clean` is Pillow's bicubic resize, which does.

    Source: Szegedy et al. 2015. The features are pool3 as in Heusel et al. 2017, and the logits without their bias as
    in Salimans et al. 2016. The spatial features are those of sFID, Nash et al. 2021, as Dhariwal and Nichol 2021
    compute them: the first 7 channels of the convolution mixed_6/conv before its normalisation, in the order height,
    width, channel. `clean` is from Parmar et al. 2022.
    """

    num_features = 2048
    num_spatial_features = 17 * 17 * 7
    is_classifier = True

    def __init__(self, source: str, device: torch.device | str, resizing: Resizing = "network"):
        _, _, file = source.partition(":")
        with opening(source, file or f"torch hub's cache in {torch.hub.get_dir()} and {URL_INCEPTION_V3}", SOURCES):
            weights = io.BytesIO()  # torch-fidelity unpickles any file, so pass it only tensors
            torch.save(_load_tensors(Path(file)) if file else _download_inception(), weights)
            weights.seek(0)
            network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights)
        super().__init__(source, network, device)
        self.resizing = resizing

    def extract(self, pixels: torch.Tensor) -> Features:
        resize = _resize_clean if self.resizing == "clean" else _resize_like_tensorflow
        maps = (resize(to_bytes(pixels)) - 128) / 128  # (batch, 3, 299, 299)
        *layers, (_, last) = self.network.named_children()
        for name, layer in layers:
            if name == "Mixed_6d":  # TensorFlow's mixed_6
                spatial = layer.branch1x1.conv(maps)[:, :7].permute(0, 2, 3, 1)  # (batch, 17, 17, 7)
            maps = layer(maps)
        vectors = maps.flatten(1)
        return Features(vectors, (vectors @ last.weight.T).softmax(1), spatial.flatten(1))


def _resize_like_tensorflow(images: torch.Tensor) -> torch.Tensor:
    """Images (batch, 3, height, width) of bytes as (batch, 3, 299, 299) in [0, 255], float32."""
    side = FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE
    return interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(side, side), align_corners=False)


def _resize_clean(images: torch.Tensor) -> torch.Tensor:
    """The same with Pillow's bicubic filter, channel by channel and without rounding to bytes."""
    side = FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE
    channels = images.flatten(0, 1).float().cpu().numpy()
    resized = [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in channels]
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in resized])).clamp(0, 255)
    return pixels.unflatten(0, images.shape[:2]).to(images.device)


class JudgeFeatures(FeatureNetwork):
    """Features and class probabilities of a judge, summed over both orientations of each class.

    Args:
        source: `embedded:judge` or a folder.
        judge: The judge at this source.
        device: Device to compute on.
    """

    is_classifier = True

    def __init__(self, source: str, judge: Judge, device: torch.device | str):
        super().__init__(source, judge, device)
        self.num_features = judge.head.in_features

    def extract(self, pixels: torch.Tensor) -> Features:
        vectors = self.network.features(pixels)
        logits = self.network.classify(vectors)  # (batch, classes, 2)
        return Features(vectors, logits.flatten(1).softmax(1).unflatten(1, (-1, 2)).sum(2))


class OpenClipFeatures(FeatureNetwork):
    """Embeddings of an open_clip image tower, not normalised.

    Args:
        source: Source as for `OpenClip`.
        device: Device to compute on.
    """

    def __init__(self, source: str, device: torch.device | str):
        self.towers = OpenClip(source, SOURCES)
        super().__init__(source, self.towers.network, device)
        self._measure_width()

    def extract(self, pixels: torch.Tensor) -> Features:
        return Features(self.towers.encode_images(pixels).float())


class TransformersFeatures(FeatureNetwork):
    """Features of a transformers vision model: the CLIP embedding, the pooler's output, or else the class token.

    Args:
        source: Folder, Hub id or `embedded:` name.
        device: Device to compute on.
    """

    def __init__(self, source: str, device: torch.device | str):
        network, self.processor = load_transformers(AutoModel, source, SOURCES)
        super().__init__(source, network, device)
        self._measure_width()

    def extract(self, pixels: torch.Tensor) -> Features:
        encode = getattr(self.network, "get_image_features", self.network)
        output = encode(pixel_values=process(self.processor, pixels))
        pooled = output.last_hidden_state[:, 0] if output.pooler_output is None else output.pooler_output
        return Features(pooled.flatten(1).float())


def open_features(source: str, device: torch.device | str = "cpu", resizing: Resizing = "network") -> FeatureNetwork:
    """Open a feature network.

    Args:
        source: `inception`, with weights from the torch hub cache or a download; `inception:FILE`, with the same
            weights from a file; `embedded:judge` or the folder of a `Judge`; `open_clip:MODEL:PRETRAINED`, where
            PRETRAINED is an open_clip tag or a weights file; or the folder or Hub id of a transformers vision model.
        device: Device to compute on.
        resizing: `network` resizes images as the authors of the network do; `clean` is for Inception only, with
            Pillow's bicubic filter.

    Raises:
        ValueError: If the embedded name or the open_clip model does not exist, or the network cannot be given images
            of `resizing`.
        MissingWeightsError: If the weights are not available. There is no fallback.
    """
    if source == "inception" or source.startswith("inception:"):
        return InceptionFeatures(source, device, resizing)
    if resizing != "network":
        raise ValueError(
            f"`resizing` is {resizing!r}; it is for Inception only, and `features` is {source}. Use 'network'."
        )
    if source.startswith("open_clip:"):
        return OpenClipFeatures(source, device)
    judge = load_judge(source)
    return TransformersFeatures(source, device) if judge is None else JudgeFeatures(source, judge, device)


def _load_tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _download_inception() -> dict[str, torch.Tensor]:
    return torch.hub.load_state_dict_from_url(
        URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
    )
