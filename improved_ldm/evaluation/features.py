"""Feature networks: images to the vectors that distances between sets are computed from."""

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
    OpenClip,
    check_pixels,
    load_judge,
    load_transformers,
    opening,
    process,
    to_bytes,
)

PLACES = (
    "'inception', 'inception:FILE', 'embedded:judge', 'open_clip:MODEL:PRETRAINED', "
    "or the folder or Hub id of a Judge or of a transformers vision model"
)


@dataclass(frozen=True)
class Features:
    """What a feature network says of a batch of images.

    Args:
        vectors: (batch, num_features) float32.
        probabilities: (batch, classes) float32 whose rows sum to 1, or None for a network that is no classifier.
    """

    vectors: torch.Tensor
    probabilities: torch.Tensor | None = None


class FeatureNetwork(MeasuringNetwork, ABC):
    """A frozen network that turns images into vectors, named with the hash of its weights.

    `name` is the place that it was opened from, `sha256` the hash of its weights, `num_features` the width of the
    vectors, `is_classifier` whether it tells probabilities.
    """

    num_features: int
    is_classifier = False

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Features:
        """Features of images.

        Args:
            pixels: (batch, 3, height, width) in [−1, 1]. All but a judge resize them, as their authors do.

        Returns:
            The features, on the network's device.

        Raises:
            ValueError: for another shape or range.
        """
        check_pixels(pixels)
        return self.extract(pixels.to(self.device, torch.float32))

    @abstractmethod
    def extract(self, pixels: torch.Tensor) -> Features:
        """Features of checked pixels on the network's device."""

    def _measure_width(self):
        self.num_features = self(torch.zeros(1, 3, 32, 32)).vectors.shape[1]


class InceptionFeatures(FeatureNetwork):
    """TensorFlow's Inception v3, the network of FID, KID and the Inception score, as torch-fidelity has it.

    Args:
        place: `inception` or `inception:FILE`.
        device: where it computes.

    Source: Szegedy et al. 2015; pool3 and the logits without their bias, as in Heusel et al. 2017 and Salimans
    et al. 2016.
    """

    num_features = 2048
    is_classifier = True

    def __init__(self, place: str, device: torch.device | str):
        _, _, file = place.partition(":")
        with opening(place, file or f"torch hub's cache in {torch.hub.get_dir()} and {URL_INCEPTION_V3}", PLACES):
            weights = io.BytesIO()  # torch-fidelity unpickles whatever it is given: give it tensors alone
            torch.save(_load_tensors(Path(file)) if file else _download_inception(), weights)
            weights.seek(0)
            network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights)
        super().__init__(place, network, device)

    def extract(self, pixels: torch.Tensor) -> Features:
        vectors, logits = self.network(to_bytes(pixels))
        return Features(vectors, logits.softmax(1))


class JudgeFeatures(FeatureNetwork):
    """What a judge knows of images; its classes are those of the judge, in either orientation.

    Args:
        place: `embedded:judge` or a folder.
        judge: what is there.
        device: where it computes.
    """

    is_classifier = True

    def __init__(self, place: str, judge: Judge, device: torch.device | str):
        super().__init__(place, judge, device)
        self.num_features = judge.head.in_features

    def extract(self, pixels: torch.Tensor) -> Features:
        vectors = self.network.features(pixels)
        logits = self.network.classify(vectors)  # (batch, classes, 2)
        return Features(vectors, logits.flatten(1).softmax(1).unflatten(1, (-1, 2)).sum(2))


class OpenClipFeatures(FeatureNetwork):
    """The embeddings of an open_clip image tower, not normalised.

    Args:
        place: as for `OpenClip`.
        device: where it computes.
    """

    def __init__(self, place: str, device: torch.device | str):
        self.towers = OpenClip(place, PLACES)
        super().__init__(place, self.towers.network, device)
        self._measure_width()

    def extract(self, pixels: torch.Tensor) -> Features:
        return Features(self.towers.encode_images(pixels).float())


class TransformersFeatures(FeatureNetwork):
    """A transformers vision model: a CLIP embedding, the pooler's output, or else the class token.

    Args:
        place: a folder, a Hub id or an `embedded:` name.
        device: where it computes.
    """

    def __init__(self, place: str, device: torch.device | str):
        network, self.processor = load_transformers(AutoModel, place, PLACES)
        super().__init__(place, network, device)
        self._measure_width()

    def extract(self, pixels: torch.Tensor) -> Features:
        encode = getattr(self.network, "get_image_features", self.network)
        output = encode(pixel_values=process(self.processor, pixels))
        pooled = output.last_hidden_state[:, 0] if output.pooler_output is None else output.pooler_output
        return Features(pooled.flatten(1).float())


def open_features(place: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Open a feature network.

    Args:
        place: `inception`, whose weights come from torch hub's cache or are downloaded; `inception:FILE`, a file of
            the same weights; `embedded:judge` or a folder of a `Judge`; `open_clip:MODEL:PRETRAINED` with a tag of
            open_clip or a weights file; or a folder or Hub id of a transformers vision model.
        device: where it computes.

    Raises:
        ValueError: for an embedded name or an open_clip model that does not exist.
        MissingWeightsError: if the weights cannot be had; nothing else takes their place.
    """
    if place == "inception" or place.startswith("inception:"):
        return InceptionFeatures(place, device)
    if place.startswith("open_clip:"):
        return OpenClipFeatures(place, device)
    judge = load_judge(place)
    return TransformersFeatures(place, device) if judge is None else JudgeFeatures(place, judge, device)


def _load_tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _download_inception() -> dict[str, torch.Tensor]:
    return torch.hub.load_state_dict_from_url(
        URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
    )
