"""What is said of networks that lose what is in the data, before the first step."""

import io
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

from improved_ldm.data.latents import SampleEncoder
from improved_ldm.settings import parse_config
from improved_ldm.trainer.components import load_autoencoder, load_text_encoder
from improved_ldm.trainer.config import AdapterRunConfig, AutoencoderConfig, DataConfig, RunConfig, TextConfig
from improved_ldm.trainer.data import open_data
from improved_ldm.trainer.suitability import Suitability, measure_suitability
from tests.trainer.conftest import ROOT, load_script

COLOURS = {"crimson": (220, 20, 60), "turquoise": (64, 224, 208), "golden": (255, 215, 0), "violet": (138, 43, 226)}
THINGS = ("ellipse", "rectangle", "rounded_rectangle")
EMBEDDED = SampleEncoder(
    load_autoencoder(AutoencoderConfig()), *load_text_encoder(TextConfig(max_tokens=16)), max_tokens=16
)


def drawing(colour: str, thing: str, seed: int, side: int = 96) -> bytes:
    """A thing of a colour, somewhere on a white background."""
    image, shift = Image.new("RGB", (side, side), "white"), seed % 20
    getattr(ImageDraw.Draw(image), thing)((shift, 10, shift + 60, 70), fill=COLOURS[colour])
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def write_set(folder: Path, count: int = 24, caption="an unusual {colour} {thing} upon a plain background") -> Path:
    """A captioned set of coloured drawings."""
    folder.mkdir()
    chosen = [(list(COLOURS)[number % 4], THINGS[number % 3]) for number in range(count)]
    images = [{"bytes": drawing(*one, number), "path": None} for number, one in enumerate(chosen)]
    captions = [caption.format(colour=colour, thing=thing) for colour, thing in chosen]
    pq.write_table(pa.table({"image": images, "text": captions}), folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("drawings") / "set")


def measured(*arguments: str, encoder: SampleEncoder = EMBEDDED, file: str | None = None) -> Suitability:
    """What the embedded networks lose of the data of a configuration, or of its first stage."""
    config = parse_config(RunConfig, list(arguments), file and ROOT / "training" / "configs" / file)
    config = config.of_stage(0) if config.stages else config
    return measure_suitability(config, open_data(config.data, encoder.text_encoder is not None), encoder)


@pytest.mark.parametrize("file", ["emoji_64_128.yaml", "emoji_256_512.yaml"])
def test_coloured_captioned_drawings_need_other_networks_than_the_embedded_ones(drawings, file):
    embedded = ["--autoencoder.pretrained=embedded:autoencoder", "--text.pretrained=embedded:clip"]
    own = [f"--data.source={drawings}", "--data.caption_pattern=null", "--text.max_tokens=16"]
    found = measured(*own, *embedded, file=file)
    colour, cut, spelled = found.warnings
    assert "the autoencoder embedded:autoencoder loses colours" in colour
    assert "`autoencoder.pretrained`" in colour and "dB" in colour
    saturation, kept = found.reconstructions.saturations()
    assert f"mean saturation {saturation:.3f}, of their reconstructions {kept:.3f}" in colour
    assert kept < 0.05 < 0.2 < saturation
    assert "24 of 24 captions (100%) are cut" in cut and "`text.max_tokens` is 16" in cut
    assert "one that reads more than 16 tokens" in cut  # the embedded one has no more positions
    assert "the text encoder embedded:clip does not know the words" in spelled and "`text.pretrained`" in spelled


@pytest.mark.parametrize("file", ["quickstart.yaml", "fashion_16_32.yaml"])
def test_nothing_is_said_of_the_embedded_networks_on_fashion_mnist(file):
    found = measured(file=file)
    assert found.warnings == []
    assert found.reconstructions.mean_psnr() > 20
    assert len(found.reconstructions.images) == 64


def test_measuring_leaves_the_random_numbers_of_the_run_alone(drawings):
    before = torch.random.get_rng_state()
    first, second = (measured(f"--data.source={drawings}", "--transform.resolution=32") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.warnings == second.warnings
    assert all(map(torch.equal, first.reconstructions.decoded, second.reconstructions.decoded))


def test_classes_have_no_captions_to_cut(tmp_path):
    for colour in COLOURS:
        (tmp_path / colour).mkdir()
        (tmp_path / colour / "1.png").write_bytes(drawing(colour, "ellipse", 0))
    found = measured(f"--data.source={tmp_path}", "--transform.resolution=32", encoder=SampleEncoder(EMBEDDED.vae))
    (colour,) = found.warnings
    assert "loses colours" in colour and "4 images of 32 pixels" in colour


def test_an_adapter_is_told_to_choose_another_base(drawings):
    config = AdapterRunConfig(base="user/base", data=DataConfig(source=str(drawings)))
    found = measure_suitability(config, open_data(config.data, takes_text=True), EMBEDDED)
    assert len(found.warnings) == 3
    assert all(warning.endswith("choose another `base`, which decides it") for warning in found.warnings)


def test_images_of_several_sizes_are_measured(drawings):
    buckets = ("--transform.resolution=32", "--transform.buckets=true", "--transform.bucket_step=8")
    found = measured(f"--data.source={drawings}", *buckets)
    assert len(found.reconstructions.images) == len(found.reconstructions.decoded) == 24


def test_captions_that_become_the_same_tokens_are_refused(tmp_path):
    same = write_set(tmp_path / "set", caption="a photo of an unusual background, of a {colour} {thing}")
    with pytest.raises(ValueError, match=r"`text.max_tokens` is 16 .* 12 captions that differ become the same tokens"):
        measured(f"--data.source={same}", "--transform.resolution=32")


def test_an_autoencoder_that_makes_nan_is_refused(drawings):
    vae = load_autoencoder(AutoencoderConfig())
    vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"`autoencoder.pretrained` is 'embedded:autoencoder'; .* NaN"):
        measured(f"--data.source={drawings}", "--transform.resolution=32", encoder=replace(EMBEDDED, vae=vae))


def test_a_sample_without_a_row_that_is_used_is_not_measured(tmp_path):
    rare = write_set(tmp_path / "set", count=200)
    table = pq.read_table(rare / "train.parquet")
    captions = ["rare" if row == 9 else "a coat" for row in range(200)]
    pq.write_table(table.set_column(1, "text", pa.array(captions)), rare / "train.parquet")
    found = measured(f"--data.source={rare}", "--data.caption_pattern=rare", "--transform.resolution=32")
    assert found.reconstructions is None
    assert "none of 64 rows is used" in found.warnings[0]


def test_a_run_says_it_once_before_the_first_step(arguments, drawings, capsys):
    options = {"data.source": drawings, "cache.passes": 0, "training.steps": 2}
    load_script("train_t2i").main(arguments(**options))
    said = capsys.readouterr().out
    assert said.count("warning: ") == 3
    assert said.rindex("warning: ") < said.index("reading 1 file")
    load_script("train_t2i").main(arguments(**options | {"training.steps": 4}))
    assert "warning: " not in capsys.readouterr().out


def test_a_run_on_what_the_networks_serve_says_nothing(arguments, capsys):
    load_script("train_t2i").main(arguments(**{"training.steps": 2}))
    assert "warning: " not in capsys.readouterr().out
