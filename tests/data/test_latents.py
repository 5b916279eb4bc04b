import pytest
import torch
from diffusers import AutoencoderKL

from improved_ldm.conditioning.control import Control, control_tensor
from improved_ldm.data.latents import EncodingLoader, SampleEncoder
from improved_ldm.data.loader import make_loader
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.trainer.components import load_text_encoder
from improved_ldm.trainer.config import TextConfig

CAPTIONS = ("a photo of a bag", "a coat", "a photo of a bag", "a sneaker")


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    )
    tokenizer, text_encoder = load_text_encoder(TextConfig(max_tokens=12))
    return SampleEncoder(vae.eval(), tokenizer, text_encoder, 12)


def batches(sizes: tuple[int, ...]) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixels": torch.rand(size, 3, 8, 8, generator=generator) * 2 - 1,
            "control": control_tensor([Control.of_whole_image((8 + number, 8), (8, 8))] * size),
            "caption": [CAPTIONS[i % len(CAPTIONS)] for i in range(size)],
            "label": torch.arange(size),
            "seed": 10 * number + torch.arange(size),  # in order
        }
        for number, size in enumerate(sizes)
    ]


def test_the_latents_of_an_image_do_not_depend_on_its_batch(encoder):
    (batch,) = batches((5,))
    whole = encoder.latents(batch["pixels"], batch["seed"])
    alone = torch.cat([encoder.latents(batch["pixels"][i : i + 1], batch["seed"][i : i + 1]) for i in range(5)])
    torch.testing.assert_close(whole, alone)
    other = encoder.latents(batch["pixels"], batch["seed"] + 1)
    assert (whole - other).abs().mean() > 1e-3


def test_an_encoding_loader_resumes_at_the_next_batch(encoder):
    def open_loader() -> EncodingLoader:
        rows = open_rows("embedded:fashion-mnist", "test")
        loader = make_loader(rows, ImageTransform(8, flip_probability=0.5), batch_size=3, shuffle_window=16)
        return EncodingLoader(loader, encoder)

    loader = open_loader()
    iterator = iter(loader)
    next(iterator), next(iterator)
    resumed = open_loader()
    resumed.load_state_dict(loader.state_dict())
    expected, got = next(iterator), next(iter(resumed))
    torch.testing.assert_close(got.tensors(), expected.tensors(), rtol=0, atol=0, equal_nan=True)
