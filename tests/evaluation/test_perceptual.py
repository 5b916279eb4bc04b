import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchvision.models import squeezenet1_1

from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.networks import MissingWeightsError
from improved_ldm.evaluation.perceptual import open_perceptual


@pytest.fixture(scope="module")
def judged():
    return open_perceptual("embedded:judge")


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_it_is_zero_for_equal_images_and_symmetric(judged, seed):
    a, b = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    distances = judged(a, b)
    assert distances.shape == (4,)
    assert (distances > 0).all()
    assert torch.equal(judged(a, a), torch.zeros(4))
    torch.testing.assert_close(judged(b, a), distances)


def test_the_distance_of_a_judge_sums_the_stages_with_equal_weights(tmp_path):
    judge = Judge(sample_size=8, widths=(4, 6)).eval()
    judge.save_pretrained(tmp_path)
    a, b = torch.rand(2, 5, 3, 8, 8) * 2 - 1
    expected = torch.zeros(5)
    with torch.no_grad():
        for stage in range(2):
            maps = [judge.feature_maps(pixels)[stage] for pixels in (a, b)]
            units = [values / values.norm(dim=1, keepdim=True).clamp(min=1e-12) for values in maps]
            expected += ((units[0] - units[1]) ** 2).sum(1).mean((1, 2))
    torch.testing.assert_close(open_perceptual(str(tmp_path))(a, b), expected)


def test_it_grows_with_noise_and_with_another_class(judged, real):
    pixels, labels = real.pixels[:100], real.labels[:100]
    noise = torch.randn_like(pixels)
    distances = [judged(pixels, (pixels + strength * noise).clamp(-1, 1)).mean() for strength in (0.03, 0.1, 0.3)]
    assert 0 < distances[0] < distances[1] < distances[2]
    others = real.pixels[100:200]
    to_others, same = judged(pixels, others), labels == real.labels[100:200]
    assert to_others[same].mean() < to_others[~same].mean()


def test_lpips_is_that_of_torchmetrics(no_downloads):
    torch.save(squeezenet1_1().state_dict(), no_downloads / "squeezenet1_1-b8a52dc0.pth")
    distance = open_perceptual("lpips:squeeze")
    a, b = torch.rand(2, 3, 3, 40, 40) * 2 - 1
    expected = learned_perceptual_image_patch_similarity(a, b, "squeeze", reduction="none")
    torch.testing.assert_close(distance(a, b), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(distance(b, a), expected, rtol=1e-4, atol=0)
    assert torch.equal(distance(a, a), torch.zeros(3))
    torch.testing.assert_close(distance(a[:1], b[:1]), expected[:1], rtol=1e-4, atol=0)
    assert distance.name == "lpips:squeeze"
    assert len(distance.sha256) == 64


def test_lpips_without_its_backbone_names_the_other_places(no_downloads):
    with pytest.raises(MissingWeightsError, match=r"'lpips:alex' are not available.*torchvision.*'embedded:judge'"):
        open_perceptual("lpips:alex")


@pytest.mark.parametrize("place", ["lpips:resnet", "embedded:clip", "nobody/nothing"])
def test_places_that_are_no_distance_are_refused(place):
    with pytest.raises(ValueError, match=place):
        open_perceptual(place)


def test_pairs_have_one_shape(judged):
    with pytest.raises(ValueError, match=r"`a` is \(2, 3, 32, 32\) and `b` \(1, 3, 32, 32\)"):
        judged(torch.zeros(2, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="`b` has absolute values up to 3"):
        judged(torch.zeros(2, 3, 32, 32), torch.full((2, 3, 32, 32), 3.0))
