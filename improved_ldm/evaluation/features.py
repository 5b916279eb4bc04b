"""Feature networks, which turn images into the vectors that distances between sets are computed from."""

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
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


@dataclass(frozen=True)
class Features:
    """Output of a feature network for a batch of images.

    Args:
        vectors: Features (batch, num_features), float32.
        probabilities: Class probabilities (batch, classes), float32; each row sums to 1. None if the network is not a
            classifier.
    """

    vectors: torch.Tensor
    probabilities: torch.Tensor | None = None


class FeatureNetwork(MeasuringNetwork, ABC):
    """A frozen network that turns images into vectors.

    `name` is the source of the network, `sha256` is the hash of its weights, `num_features` is the length of the
    vectors, and `is_classifier` states whether it returns probabilities.
    """

    num_features: int
    is_classifier = False

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
    """TensorFlow's Inception v3, the network of FID, KID and the Inception score, as implemented by torch-fidelity.

    Args:
        source: `inception` or `inception:FILE`.
        device: Device to compute on.

    Source: Szegedy et al. 2015. The features are pool3 as in Heusel et al. 2017, and the logits without their bias as
    in Salimans et al. 2016.
    """

    num_features = 2048
    is_classifier = True

    def __init__(self, source: str, device: torch.device | str):
        _, _, file = source.partition(":")
        with opening(source, file or f"torch hub's cache in {torch.hub.get_dir()} and {URL_INCEPTION_V3}", SOURCES):
            weights = io.BytesIO()  # torch-fidelity unpickles any file, so pass it only tensors
            torch.save(_load_tensors(Path(file)) if file else _download_inception(), weights)
            weights.seek(0)
            network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights)
        super().__init__(source, network, device)

    def extract(self, pixels: torch.Tensor) -> Features:
        vectors, logits = self.network(to_bytes(pixels))
        return Features(vectors, logits.softmax(1))


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


def open_features(source: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Open a feature network.

    Args:
        source: `inception`, with weights from the torch hub cache or a download; `inception:FILE`, with the same
            weights from a file; `embedded:judge` or the folder of a `Judge`; `open_clip:MODEL:PRETRAINED`, where
            PRETRAINED is an open_clip tag or a weights file; or the folder or Hub id of a transformers vision model.
        device: Device to compute on.

    Raises:
        ValueError: If the embedded name or the open_clip model does not exist.
        MissingWeightsError: If the weights are not available. There is no fallback.
    """
    if source == "inception" or source.startswith("inception:"):
        return InceptionFeatures(source, device)
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
