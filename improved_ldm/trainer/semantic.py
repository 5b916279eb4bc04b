"""The semantic condition of a stage, classes or prompts: everything in which the two kinds differ."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin

from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.mixture import Mixture
from improved_ldm.places import shareable_place
from improved_ldm.trainer.components import load_text_encoder, text_dims
from improved_ldm.trainer.config import Condition, RunConfig
from improved_ldm.trainer.data import Survey, count_classes

PROMPT_ROWS, CLASS_ROWS = 8, 10  # rows of a grid of samples


class ClassSemantic:
    """Classes, from the labels of the data.

    Args:
        config: configuration of the stage.
        mixture: its opened sets.

    Raises:
        ValueError: if the number of classes is not known.
    """

    takes_text = False

    def __init__(self, config: RunConfig, mixture: Mixture):
        self.config, self.class_names = config, mixture.class_names
        self.num_classes = count_classes(config.data, mixture)

    @property
    def described(self) -> str:
        """The condition in words."""
        return f"{self.num_classes:,} classes"

    def load_encoder(self, vae: ModelMixin) -> SampleEncoder:
        """An encoder of images that keeps the labels of a batch; a class needs no model."""
        return SampleEncoder(vae)

    def conditions(self, encoder: SampleEncoder) -> dict[str, int]:
        """What a denoiser is told of its conditions."""
        return {"num_classes": self.num_classes}

    def pipeline_parts(self, encoder: SampleEncoder) -> dict[str, Any]:
        """Arguments of the pipeline."""
        return {"class_names": self.class_names}

    def grid_rows(self, encoder: SampleEncoder, survey: Survey) -> list[int]:
        """The rows of a grid of samples: the first labels."""
        return class_rows(self.num_classes)


class TextSemantic:
    """Prompts, from the captions of the data.

    Args:
        config: configuration of the stage.
        mixture: its opened sets.
    """

    takes_text = True
    class_names = None

    def __init__(self, config: RunConfig, mixture: Mixture):
        self.config = config

    @property
    def described(self) -> str:
        """The condition in words."""
        return f"text of {shareable_place(self.config.text.pretrained)}"

    def load_encoder(self, vae: ModelMixin) -> SampleEncoder:
        """An encoder of the images and captions of a batch; `use_encoder` puts it on the device."""
        tokenizer, text_encoder = load_text_encoder(self.config.text)
        return SampleEncoder(vae, tokenizer, text_encoder, self.config.text.max_tokens)

    def conditions(self, encoder: SampleEncoder) -> dict[str, int]:
        """What a denoiser is told of its conditions."""
        return text_dims(self.config.denoiser, encoder)

    def pipeline_parts(self, encoder: SampleEncoder) -> dict[str, Any]:
        """Arguments of the pipeline."""
        text = self.config.text
        return {
            "text_encoder": encoder.text_encoder,
            "tokenizer": encoder.tokenizer,
            "text_padding": text.padding,
            "text_noise_scale": text.noise_scale,
            "max_text_tokens": text.max_tokens,
        }

    def grid_rows(self, encoder: SampleEncoder, survey: Survey) -> list[str]:
        """The rows of a grid of samples: the configured prompts, or captions of the data that differ most."""
        return prompt_rows(self.config.sampling.prompts, encoder, survey)


Semantic = ClassSemantic | TextSemantic
SEMANTICS: dict[Condition, type[Semantic]] = {"class": ClassSemantic, "text": TextSemantic}


def load_encoders(semantics: Sequence[Semantic], vae: ModelMixin) -> list[SampleEncoder]:
    """The encoder of each stage; stages with the same text encoder share one."""
    loaded = {}
    keys = [semantic.config.text if semantic.takes_text else None for semantic in semantics]
    for key, semantic in zip(keys, semantics, strict=True):
        if key not in loaded:
            loaded[key] = semantic.load_encoder(vae)
    return [loaded[key] for key in keys]


def use_encoder(encoders: Sequence[SampleEncoder], number: int, device: torch.device) -> SampleEncoder:
    """The encoder of a stage, with its text encoder on a device; those of other stages wait on the CPU."""
    for encoder in encoders:
        if encoder.text_encoder is not None:
            encoder.text_encoder.to(device if encoder is encoders[number] else "cpu")
    return encoders[number]


def prompt_rows(prompts: tuple[str, ...] | None, encoder: SampleEncoder, survey: Survey) -> list[str]:
    """The given prompts or, if there are none, those captions of the first rows that differ most."""
    return list(prompts or ()) or diverse_prompts(survey.captions, encoder.text(survey.captions).pooled, PROMPT_ROWS)


def diverse_prompts(captions: list[str], features: torch.Tensor, count: int) -> list[str]:
    """Captions that are far from each other, including the first given one.

    Args:
        captions: captions to choose from.
        features: (captions, dim), one vector per caption.
        count: largest number of captions to choose.

    Source: greedy farthest-point selection.
    """
    features = F.normalize(features.float().cpu(), dim=1)
    chosen, nearest = [0], torch.full((len(captions),), torch.inf)
    while len(chosen) < min(count, len(captions)):
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).norm(dim=1))
        chosen.append(int(nearest.argmax()))
    return [captions[number] for number in chosen]


def class_rows(num_classes: int) -> list[int]:
    """The first labels."""
    return list(range(min(CLASS_ROWS, num_classes)))
