"""Comparing samples with the real image of their caption, on real emoji in place of samples and on a tiny pipeline."""

import pytest
import torch

from improved_ldm.data.sources import open_rows
from improved_ldm.evaluation.clip_score import open_clip_scorer
from improved_ldm.evaluation.counterparts import (
    Counterparts,
    evaluate_counterparts,
    load_counterparts,
    mirrored_share,
    own_is_nearer_share,
)
from improved_ldm.evaluation.judge import Judge
from training.measure_emoji import Namer, thing_and_style


@pytest.fixture(scope="module")
def held_out() -> Counterparts:
    return load_counterparts(open_rows("embedded:emoji", "test"), 32)


def test_each_held_out_thing_is_seen_in_its_other_styles(held_out):
    seen = {
        thing_and_style(caption) for caption in load_counterparts(open_rows("embedded:emoji", "train"), 8).captions
    }
    assert len(seen) + len({*held_out.captions}) == 1152
    for thing, style in map(thing_and_style, held_out.captions):
        styles = {other for name, other in seen if name == thing}
        assert len(styles) == 3 and style not in styles


def test_a_part_is_chosen_by_its_captions(held_out):
    chosen = held_out.matching("^(fox|duck), ")
    assert {thing for thing, _ in map(thing_and_style, chosen.captions)} == {"fox", "duck"}
    for place, caption in enumerate(chosen.captions):
        assert chosen.pixels[place].equal(held_out.pixels[held_out.captions.index(caption)])


def test_mirrored_images_are_nearer_to_the_mirror_image(held_out):
    sided = held_out.pixels[held_out.one_sided]
    assert 30 < len(sided) < len(held_out.pixels)
    assert mirrored_share(sided, sided) == 0
    assert mirrored_share(sided.flip(-1), sided) == 1


def test_the_own_image_is_the_nearest_of_all_and_noise_is_near_to_none(held_out):
    noisy = held_out.pixels + 0.1 * torch.randn_like(held_out.pixels)
    assert own_is_nearer_share(noisy, held_out.pixels) == 1
    noise = torch.randn_like(held_out.pixels).clamp(-1, 1)
    assert own_is_nearer_share(noise, held_out.pixels) == pytest.approx(0.5, abs=0.05)


def test_a_pipeline_is_measured_in_every_respect(text_pipeline):
    real = load_counterparts(open_rows("embedded:emoji", "test"), 8).part(list(range(12)))
    shares, samples = evaluate_counterparts(text_pipeline(), real, seed=3)
    assert samples.shape == (12, 3, 8, 8) and samples.isfinite().all()
    assert shares["num_samples"] == 12 and shares["num_one_sided"] == int(real.one_sided.sum())
    assert all(0 <= shares[name] <= 1 for name in shares if not name.startswith("num_"))
    again, _ = evaluate_counterparts(text_pipeline(), real, seed=3)
    assert again == shares


def test_networks_that_do_not_know_emoji_name_them_by_chance(held_out):
    torch.manual_seed(0)
    things, styles = (sorted(set(parts)) for parts in zip(*map(thing_and_style, held_out.captions), strict=True))
    namer = Namer(Judge(len(styles), 16, (8, 16)).eval(), styles, open_clip_scorer("embedded:clip"), things)
    shares = namer.shares_right(held_out.pixels, held_out.captions)
    assert 0 <= shares["style_right"] < 0.6
    assert shares["thing_right"] <= shares["thing_among_5"] < 0.3
