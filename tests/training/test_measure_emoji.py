"""The measures of the colour model, on real emoji in place of samples."""

import pytest
import torch

from improved_ldm.evaluation.judge import Judge
from measure_emoji import Emoji, NamedJudge, flipped_share, nearest_is_asked, one_sided, read_emoji


@pytest.fixture(scope="module")
def held_out() -> Emoji:
    return read_emoji("test", 32)


@pytest.fixture(scope="module")
def every(held_out) -> Emoji:
    seen = read_emoji("train", 32)
    return Emoji(torch.cat([seen.pixels, held_out.pixels]), seen.captions + held_out.captions)


@pytest.fixture(scope="module")
def judge(every) -> NamedJudge:
    """A judge with new weights: its features tell images apart, its classes mean nothing."""
    torch.manual_seed(0)
    names = sorted(set(every.things))
    return NamedJudge(Judge(len(names), 16, (8, 16)).eval(), names)


def test_each_held_out_thing_is_seen_in_its_other_styles(held_out, every):
    seen = set(every.captions) - set(held_out.captions)
    assert len(every.captions) == len(set(every.captions)) == 1152
    for thing, style in zip(held_out.things, held_out.styles, strict=True):
        styles = {caption.rsplit(", ", 1)[1] for caption in seen if caption.rsplit(", ", 1)[0] == thing}
        assert len(styles) == 3 and style not in styles


def test_real_images_are_what_was_asked_for(held_out, every, judge):
    assert nearest_is_asked(held_out.pixels, held_out, every, judge) == 1
    other = Emoji(held_out.pixels, held_out.captions[1:] + held_out.captions[:1])
    assert nearest_is_asked(held_out.pixels, other, every, judge) < 0.05


def test_mirrored_images_are_nearer_to_the_mirror_image(held_out):
    sided = held_out.pixels[one_sided(held_out.pixels)]
    assert 30 < len(sided) < len(held_out.pixels)
    assert flipped_share(sided, sided) == 0
    assert flipped_share(sided.flip(-1), sided) == 1


def test_chance_is_the_accuracy_of_new_weights(held_out, judge):
    right = judge.accuracy(held_out.pixels, held_out.things)
    among = judge.accuracy(held_out.pixels, held_out.things, among=len(judge.names))
    assert right < 0.1 and among == 1
