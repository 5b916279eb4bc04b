"""The scores of fixed features are those of the public implementations, to 1e-4."""

import json
from pathlib import Path

import pytest
import torch

from improved_ldm.evaluation.adm_scores import adm_inception_score, adm_precision_recall
from improved_ldm.evaluation.gaussian import Gaussian
from improved_ldm.evaluation.scores import (
    clip_discrepancy,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold_scores,
)
from tests.fixtures.published_scores.make import logits, two_sets, unit

FILE = Path(__file__).parents[1] / "fixtures" / "published_scores" / "numbers.json"
NUMBERS = json.loads(FILE.read_text(encoding="utf-8"))


def sets(scale=1.0):
    return [torch.from_numpy(features) for features in two_sets(scale=scale)]


def near(value):
    return pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("library", ["adm", "fidelity", "clean_fid"])
def test_frechet_distance(library):
    real, fake = sets()
    assert frechet_distance(real, fake) == near(NUMBERS[library]["frechet distance"])
    assert Gaussian.of(fake).distance(Gaussian.of(real)) == near(NUMBERS[library]["frechet distance"])


def test_kernel_distance():
    real, fake = sets()
    found = kernel_distance(real, fake, num_subsets=50, subset_size=200, seed=3)
    assert found == near(tuple(NUMBERS["fidelity"]["kid, 50 subsets of 200, seed 3"]))
    whole, _ = kernel_distance(real[:600], fake, num_subsets=1, subset_size=600)
    assert whole == near(NUMBERS["clean_fid"]["kid of 600 of each"])


def test_inception_score():
    probabilities = torch.from_numpy(logits()).softmax(1)
    shuffled = inception_score(probabilities, num_splits=10, seed=3)
    assert shuffled == near(tuple(NUMBERS["fidelity"]["inception score, 10 splits, seed 3"]))
    assert adm_inception_score(probabilities) == near(NUMBERS["adm"]["inception score"])


@pytest.mark.parametrize(("scale", "name"), [(1.0, "rounded to float16"), (100.0, "beyond float16")])
def test_precision_and_recall_of_adm(scale, name):
    found = adm_precision_recall(*sets(scale), nearest_k=3)
    assert list(found.values()) == NUMBERS["adm"][f"precision and recall, {name}"]


def test_precision_and_recall_of_adm_do_not_depend_on_blocks_where_nothing_overflows(monkeypatch):
    generator = torch.Generator().manual_seed(0)  # sums of small integers are exact in any order
    real, fake = (torch.randint(0, 5, (count, 12), generator=generator).float() for count in (300, 200))
    whole = adm_precision_recall(real, fake)
    assert min(whole.values()) > 0 and max(whole.values()) < 1
    exact = manifold_scores(real, fake, nearest_k=3)
    assert list(whole.values()) == [exact["precision"], exact["recall"]]
    monkeypatch.setattr("improved_ldm.evaluation.adm_scores.BLOCK", 64)
    assert adm_precision_recall(real, fake) == whole


def test_precision_and_recall_without_rounding():
    found = manifold_scores(*sets(), nearest_k=3)
    assert [found["precision"], found["recall"]] == near(NUMBERS["fidelity"]["precision and recall"])


def test_more_neighbours_than_samples_are_refused():
    with pytest.raises(ValueError, match="`nearest_k` is 3; with 9 real and 3 fake samples it must be smaller"):
        adm_precision_recall(torch.rand(9, 4), torch.rand(3, 4))


def test_cmmd(monkeypatch):
    real, fake = (torch.from_numpy(unit(features)) for features in two_sets())
    assert clip_discrepancy(real, fake) == near(NUMBERS["cmmd"]["cmmd"])
    monkeypatch.setattr("improved_ldm.evaluation.scores.MAX_DISTANCES", 1000)
    assert clip_discrepancy(real, fake) == near(NUMBERS["cmmd"]["cmmd"])
