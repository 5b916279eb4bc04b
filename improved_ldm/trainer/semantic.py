"""What a model samples, by prompt or by class: everything in which the two kinds of run differ."""

from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.sources import Rows
from improved_ldm.trainer.batches import Survey
from improved_ldm.trainer.components import load_text_encoder, text_dims
from improved_ldm.trainer.config import DataConfig, RunConfig
from improved_ldm.trainer.grids import diverse_prompts

PROMPT_ROWS, CLASS_ROWS = 8, 10  # rows of a grid of samples


class ClassSemantic:
    """Classes, from the labels of the data.

    Args:
        config: configuration of the whole run.
        data: the opened sets of its stages.

    Raises:
        ValueError: if the number of classes is not known, or the sets do not agree on their classes.
    """

    takes_text = False

    def __init__(self, config: RunConfig, data: list[Rows]):
        self.num_classes, self.class_names = _agreed_classes(config.data, data)

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
        config: configuration of the whole run.
        data: the opened sets of its stages.
    """

    takes_text = True

    def __init__(self, config: RunConfig, data: list[Rows]):
        self.config = config

    def load_encoder(self, vae: ModelMixin) -> SampleEncoder:
        """An encoder of the images and captions of a batch, on the device of the autoencoder."""
        tokenizer, text_encoder = load_text_encoder(self.config.text)
        return SampleEncoder(vae, tokenizer, text_encoder.to(vae.device), self.config.text.max_tokens)

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


def prompt_rows(prompts: tuple[str, ...] | None, encoder: SampleEncoder, survey: Survey) -> list[str]:
    """The given prompts or, if there are none, those captions of the first rows that differ most."""
    return list(prompts or ()) or diverse_prompts(survey.captions, encoder.text(survey.captions).pooled, PROMPT_ROWS)


def class_rows(num_classes: int) -> list[int]:
    """The first labels."""
    return list(range(min(CLASS_ROWS, num_classes)))


def _agreed_classes(config: DataConfig, data: list[Rows]) -> tuple[int, list[str] | None]:
    """The number and the names of the classes, the same for the sets of all stages."""
    counts = {len(rows.class_names or ()) or config.num_classes for rows in data}
    if counts == {None}:
        raise ValueError(f"column {config.label_column!r} does not name its classes: give `--data.num_classes`.")
    if len(counts) > 1:
        raise ValueError(f"the stages' sets have {', '.join(map(str, counts))} classes; the numbers must be equal.")
    if any(rows.class_names != data[0].class_names for rows in data):
        raise ValueError("the stages' sets name their classes differently; a label must mean the same in all of them.")
    return counts.pop(), data[0].class_names
