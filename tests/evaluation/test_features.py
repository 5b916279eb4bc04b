import json
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchvision.transforms.functional import to_pil_image
from transformers import (
    BitImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from improved_ldm.data.transforms import pixel_values, to_pixels
from improved_ldm.evaluation.features import Features, open_features
from improved_ldm.evaluation.networks import MissingWeightsError, to_bytes
from improved_ldm.places import ASSETS
from tests.fixtures.published_scores.make import random_image

OPEN_CLIP = "ViT-S-32-alt"
PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published_scores"


@pytest.fixture(scope="module")
def open_clip_file(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("open_clip") / "weights.pt"
    torch.save(open_clip.create_model(OPEN_CLIP, pretrained=None).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A random DINOv2 and its processor, which resizes the shorter side to 32 and crops to 28 pixels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(image_size=28, patch_size=14, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = Dinov2Model(config).eval()
    model.save_pretrained(folder)
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return folder, model, processor


def images(count=3, height=32, width=32):
    """Smooth random images (count, 3, height, width) in [-1, 1]."""
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(small, size=(height, width), mode="bilinear")


def pil_images(pixels):
    return [to_pil_image(image) for image in to_bytes(pixels)]


@given(st.integers(0, 255), st.integers(0, 255))
def test_bytes_are_those_of_a_saved_image(low, high):
    values = torch.tensor([low, high], dtype=torch.uint8).repeat(6).view(3, 2, 2)
    assert torch.equal(to_bytes(pixel_values(to_pixels(to_pil_image(values))[None]))[0], values)


def test_inception_of_a_file_agrees_with_torch_fidelity(inception_file):
    pixels = images()
    network = open_features(f"inception:{inception_file}")
    features = network(pixels)
    own = FeatureExtractorInceptionV3("own", ["2048", "logits_unbiased"], str(inception_file))
    vectors, logits = own(to_bytes(pixels))
    assert features.vectors.shape == (3, network.num_features) == (3, 2048)
    assert features.vectors.std() > 0
    torch.testing.assert_close(features.vectors, vectors, rtol=1e-4, atol=0)
    torch.testing.assert_close(features.probabilities, logits.softmax(1), rtol=1e-4, atol=0)


def test_spatial_features_are_the_first_channels_of_the_convolution_of_tensorflows_mixed_6(inception_file):
    """TensorFlow orders them by height, width and channel."""
    own, maps = FeatureExtractorInceptionV3("own", ["2048"], str(inception_file)), []
    own.Mixed_6d.branch1x1.conv.register_forward_hook(lambda layer, inputs, output: maps.append(output))
    own(to_bytes(images()))
    network = open_features(f"inception:{inception_file}")
    spatial = network(images()).spatial
    assert spatial.shape == (3, network.num_spatial_features) == (3, 2023)
    expected = maps[0][:, :7].permute(0, 2, 3, 1)
    scale = expected.std()
    torch.testing.assert_close(spatial.view(3, 17, 17, 7) / scale, expected / scale, rtol=1e-4, atol=1e-4)


def test_clean_resizing_is_that_of_clean_fid(inception_file):
    published = json.loads((PUBLISHED / "numbers.json").read_text(encoding="utf-8"))["clean_fid"]["resized"]
    network, read = open_features(f"inception:{inception_file}", resizing="clean"), []
    network.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0]))
    image = torch.from_numpy(random_image()).permute(2, 0, 1)[None]
    features = network(image / 127.5 - 1)
    resized = 128 * read[0][0].permute(1, 2, 0) + 128
    assert list(resized.shape) == published["shape"]
    torch.testing.assert_close(resized[100, ::20], torch.tensor(published["row"]), rtol=1e-4, atol=1e-3)
    assert resized.mean().item() == pytest.approx(published["mean"], rel=1e-4)
    other = open_features(f"inception:{inception_file}")(image / 127.5 - 1)
    assert (features.vectors - other.vectors).norm() > 0.01 * other.vectors.norm()


def test_only_inception_is_given_clean_images():
    with pytest.raises(
        ValueError, match="`resizing` is 'clean'; it is for Inception only, and `features` is embedded"
    ):
        open_features("embedded:judge", resizing="clean")


def test_inception_takes_its_weights_from_the_cache_of_torch_hub(inception_file, no_downloads):
    (no_downloads / URL_INCEPTION_V3.rsplit("/", 1)[1]).symlink_to(inception_file)
    assert open_features("inception").sha256 == open_features(f"inception:{inception_file}").sha256


def test_inception_that_cannot_be_downloaded_says_what_was_tried_and_what_else_there_is(no_downloads):
    with pytest.raises(MissingWeightsError, match=r"'inception'.*weights-inception-2015.*'embedded:judge'"):
        open_features("inception")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(MissingWeightsError, match=r"Tried nowhere\.pth.*No such file.*'inception'"):
        open_features("inception:nowhere.pth")


def test_a_file_of_other_weights_is_refused(tmp_path):
    safetensors.torch.save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(MissingWeightsError, match=r"other\.safetensors.*state_dict"):
        open_features(f"inception:{tmp_path / 'other.safetensors'}")


def test_the_judge_gives_its_features_and_sums_the_orientations(judge, real):
    network = open_features("embedded:judge")
    features = network(real.pixels[:50])
    with torch.no_grad():
        assert torch.equal(features.vectors, judge.features(real.pixels[:50]))
    assert features.vectors.shape == (50, network.num_features)
    assert features.probabilities.shape == (50, 10)
    torch.testing.assert_close(features.probabilities.sum(1), torch.ones(50))
    mirrored = network(real.pixels[:50].flip(-1)).probabilities
    assert (features.probabilities.argmax(1) == mirrored.argmax(1)).float().mean() > 0.9


def test_the_judge_refuses_another_size():
    with pytest.raises(ValueError, match=r"the judge reads \(batch, 3, 32, 32\)"):
        open_features("embedded:judge")(images(height=28))


def test_a_folder_of_a_judge_has_the_name_of_the_folder_and_the_hash_of_its_weights(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    network = open_features(str(tmp_path))
    assert network.name == str(tmp_path)
    assert network.sha256 == open_features("embedded:judge").sha256


def test_another_weight_is_another_hash(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["head.bias"][0] += 1e-3
    safetensors.torch.save_file(tensors, file)
    hashes = {open_features(place).sha256 for place in ("embedded:judge", str(tmp_path), "embedded:clip")}
    assert len(hashes) == 3
    assert all(len(value) == 64 for value in hashes)


def test_open_clip_agrees_with_its_own_preprocessing(open_clip_file):
    network = open_features(f"open_clip:{OPEN_CLIP}:{open_clip_file}")
    model, preprocess = open_clip.create_model_from_pretrained(OPEN_CLIP, str(open_clip_file))
    pixels = images(2, height=40)
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack([preprocess(image) for image in pil_images(pixels)]))
    features = network(pixels)
    assert features.probabilities is None
    assert features.vectors.shape == (2, network.num_features)
    torch.testing.assert_close(features.vectors, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        (f"open_clip:{OPEN_CLIP}:nowhere.pt", MissingWeightsError, r"Tried open_clip .* nowhere\.pt.*'inception'"),
        ("open_clip:ViT-B-32", ValueError, r"names no weights; add ':' and .* laion2b_s34b_b79k"),
        ("open_clip:ViT-Q", ValueError, "open_clip has no model 'ViT-Q'"),
        ("open_clip:local-dir:nowhere", MissingWeightsError, "nowhere"),
        ("embedded:nothing", ValueError, "embedded:judge"),
        ("nobody/nothing", MissingWeightsError, r"folder or Hub id nobody/nothing.*'inception'"),
    ],
)
def test_places_that_are_not_there_are_named(place, error, message):
    with pytest.raises(error, match=message):
        open_features(place)


def test_dinov2_gives_the_class_token_of_processed_images(dinov2):
    folder, model, processor = dinov2
    network, pixels = open_features(str(folder)), images(height=48, width=40)
    inputs = processor(images=pil_images(pixels), return_tensors="pt")
    assert inputs.pixel_values.shape == (3, 3, 28, 28)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state[:, 0]
    features = network(pixels)
    assert features.vectors.shape == (3, network.num_features) == (3, 24)
    assert features.probabilities is None
    torch.testing.assert_close(features.vectors, expected, rtol=1e-4, atol=1e-5)


def test_weights_that_a_model_lacks_are_not_random(dinov2, tmp_path):
    _, model, processor = dinov2
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 3, "out_indices": None}), encoding="utf-8"
    )
    with pytest.raises(MissingWeightsError, match=r"encoder\.layer\.2.* would be random"):
        open_features(str(tmp_path))


def test_a_pooler_without_weights_is_left_out(tmp_path):
    config = ViTConfig(image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**processor(images=pil_images(images()), return_tensors="pt")).last_hidden_state[:, 0]
    torch.testing.assert_close(open_features(str(tmp_path))(images()).vectors, expected, rtol=1e-4, atol=1e-5)


def test_a_convolutional_network_gives_its_pooled_map(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).eval().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    network = open_features(str(tmp_path))
    assert network(images()).vectors.shape == (3, network.num_features) == (3, 16)


@torch.no_grad()
def test_clip_gives_its_image_embedding(real):
    network = open_features("embedded:clip")
    expected = CLIPModel.from_pretrained(ASSETS / "clip").eval().get_image_features(real.pixels[:5]).pooler_output
    assert network.num_features == 64
    torch.testing.assert_close(network(real.pixels[:5]).vectors, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 32, 32), r"`pixels` is \(3, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32), r"`pixels` is \(2, 1, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "uint8; it must be .* floats"),
        (torch.full((2, 3, 32, 32), 255.0), "`pixels` has absolute values up to 255; it must be in"),
        (torch.full((2, 3, 32, 32), torch.nan), "`pixels` has absolute values up to nan; it must be in"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        open_features("embedded:judge")(pixels)


def test_features_are_frozen():
    features = Features(torch.zeros(1, 2))
    with pytest.raises(AttributeError):
        features.vectors = torch.ones(1, 2)
