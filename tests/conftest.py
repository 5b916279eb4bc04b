"""Tiny real components shared by the tests."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# calls to other machines fail at once
os.environ |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import AutoencoderKL
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import improved_ldm
from improved_ldm import ImprovedLDMPipeline
from improved_ldm.diffusion.schedules import variance_preserving_scheduler
from improved_ldm.models.family import denoiser_class

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))  # because two test workers share the cores
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")

ASSETS = Path(improved_ldm.__file__).parent / "assets"
WORDS = ("a", "the", "red", "blue", "white", "boot", "coat", "bag", "with")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Gives every test a new accelerator."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def _randomize(model, seed=0, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def randomize():
    """Sets every parameter of a model to random values from N(0, std); untrained blocks are the identity."""
    return _randomize


@pytest.fixture(scope="session")
def autoencoder():
    """An autoencoder with downsampling factor 2, 4 latent channels, and its own scale and shift."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
        mid_block_add_attention=False,
    ).eval()


def _word_tokenizer(special, template, **names):
    vocabulary = {token: index for index, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=names["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in special]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), len(vocabulary)


@pytest.fixture(scope="session")
def clip_text():
    """The tokenizer and CLIP text encoder that ship with the package; 16 tokens of 96 channels."""
    return AutoTokenizer.from_pretrained(ASSETS / "clip"), CLIPTextModel.from_pretrained(ASSETS / "clip").eval()


@pytest.fixture(scope="session")
def t5_text():
    """A random T5 encoder, which has no pooled output, and a word tokenizer."""
    tokenizer, size = _word_tokenizer(
        ["<pad>", "</s>", "<unk>"], "$A </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = T5Config(vocab_size=size, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()


@pytest.fixture(scope="session")
def bert_text():
    """A random BERT encoder and a word tokenizer."""
    tokenizer, size = _word_tokenizer(
        ["[PAD]", "[CLS]", "[SEP]", "[UNK]"],
        "[CLS] $A [SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return tokenizer, BertModel(config).eval()


TRANSFORMER_SIZES = {"sample_size": 4, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
TINY_SIZES = {
    "unet": {
        "sample_size": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1),
        "num_attention_heads": (1, 2),
        "norm_num_groups": 8,
        "published": {"size_features": 8},
    },
    "dit": TRANSFORMER_SIZES,
    "mdt": TRANSFORMER_SIZES | {"num_layers": 4, "num_decoder_layers": 2},
    "pixart": TRANSFORMER_SIZES,
    "mmdit": TRANSFORMER_SIZES,
}


@pytest.fixture(scope="session")
def fresh_denoiser():
    """Builds an untrained denoiser of 4 x 4 latents, with patch size 2 if it has patches."""

    def build(name="dit", **config):
        return denoiser_class(name)(**{**TINY_SIZES[name], **config})

    return build


@pytest.fixture(scope="session")
def tiny_denoiser(fresh_denoiser):
    """Builds a denoiser with random weights."""

    def build(name="dit", **config):
        return _randomize(fresh_denoiser(name, **config))

    return build


@pytest.fixture
def class_pipeline(autoencoder, tiny_denoiser):
    """A pipeline with 3 classes and 8 x 8 images."""

    def build(scheduler=None, vae=autoencoder, name="dit", **denoiser_config):
        pipe = ImprovedLDMPipeline(
            vae=vae,
            **{denoiser_class(name).component: tiny_denoiser(name, **{"num_classes": 3, **denoiser_config})},
            scheduler=scheduler or variance_preserving_scheduler("epsilon"),
            default_guidance_scale=2.0,
            default_num_inference_steps=2,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


@pytest.fixture
def text_pipeline(autoencoder, tiny_denoiser, clip_text):
    """A text pipeline with 8 x 8 images."""

    def build(text=clip_text, text_padding="noisy_replicate", max_text_tokens=16, name="dit", **denoiser_config):
        tokenizer, text_encoder = text
        text_config = denoiser_config or {"text_dim": text_encoder.config.hidden_size}
        pipe = ImprovedLDMPipeline(
            vae=autoencoder,
            **{denoiser_class(name).component: tiny_denoiser(name, **text_config)},
            scheduler=variance_preserving_scheduler("epsilon"),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_padding=text_padding,
            text_noise_scale=0.5,
            max_text_tokens=max_text_tokens,
            default_guidance_scale=2.0,
            default_num_inference_steps=2,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build
