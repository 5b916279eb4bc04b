"""The loss of held-out images, and which images are held out."""

import json
from random import Random

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from improved_ldm.conditioning.control import NUM_CONTROL
from improved_ldm.conditioning.text import TextTokens
from improved_ldm.data.latents import EncodedBatch
from improved_ldm.data.loader import first_batches
from improved_ldm.data.sources import RowStream, open_rows
from improved_ldm.data.spread import spread_if_possible
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.diffusion.objectives import make_objective
from improved_ldm.seeds import normal
from improved_ldm.trainer.config import RunConfig, TextConfig
from improved_ldm.trainer.data import open_data
from improved_ldm.trainer.held_out import LEVELS, level_losses, level_timesteps, measuring
from improved_ldm.trainer.held_out_data import open_held_out
from tests.data.sets import picture, write_parquet, write_shard
from tests.data.test_indexed import layouts

OBJECTIVES = {
    "flow": {"shift": 2.0},
    "epsilon": {},
    "v_prediction": {"loss_weighting": "min_snr"},
}
TEXT = TextConfig(max_tokens=6)


def images(count: int) -> tuple[EncodedBatch, torch.Tensor]:
    """Encoded captioned images and their seeds."""
    generator = torch.Generator().manual_seed(1)
    text = TextTokens(
        torch.randn(count, 6, 12, generator=generator),
        torch.arange(6) < torch.randint(1, 7, (count, 1), generator=generator),
        torch.randn(count, 12, generator=generator),
    )
    latents, control = torch.randn(count, 4, 4, 4, generator=generator), torch.full((count, NUM_CONTROL), 0.5)
    return EncodedBatch(latents, control, text), torch.randint(2**40, (count,), generator=generator)


def rows_of(batch: EncodedBatch, index: torch.Tensor) -> EncodedBatch:
    return EncodedBatch.from_tensors({name: value[index] for name, value in batch.tensors().items()})


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_the_loss_is_that_of_the_objective_with_noise_of_the_image_alone(fresh_denoiser, prediction):
    """A new denoiser predicts nothing, so its loss is the weighted square of the target."""
    objective = make_objective(prediction, **OBJECTIVES[prediction])
    batch, seeds = images(3)
    losses = level_losses(fresh_denoiser("dit", text_dim=12).eval(), objective, batch, seeds, TEXT)
    assert losses.shape == (3, LEVELS)
    for level in range(LEVELS):
        timestep = objective.timestep_quantile(torch.full((3,), (level + 0.5) / LEVELS))
        noise = normal(seeds, batch.latents.shape[1:], (level + 2) << 36)
        expected = objective.losses(torch.zeros_like(noise), batch.latents, noise, timestep)["mse"]
        torch.testing.assert_close(losses[:, level], expected)


def test_a_learned_variance_counts_as_in_training(tiny_denoiser):
    batch, seeds = images(2)
    denoiser = tiny_denoiser("dit", text_dim=12, out_channels=8)
    alone = level_losses(denoiser, make_objective("epsilon"), batch, seeds, TEXT)
    both = level_losses(denoiser, make_objective("epsilon", learned_variance=True), batch, seeds, TEXT)
    assert (both > alone).all()


@settings(max_examples=8)
@given(order=st.permutations(range(5)), cut=st.integers(1, 4))
def test_the_loss_of_an_image_does_not_depend_on_the_others(tiny_denoiser, order, cut):
    objective, denoiser = make_objective("flow"), tiny_denoiser("dit", text_dim=12)
    batch, seeds = images(5)
    together = level_losses(denoiser, objective, batch, seeds, TEXT)
    assert together.equal(level_losses(denoiser, objective, batch, seeds, TEXT))
    for part in torch.tensor(order).split(cut):
        alone = level_losses(denoiser, objective, rows_of(batch, part), seeds[part], TEXT)
        torch.testing.assert_close(alone, together[part])


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_timesteps_are_in_order_and_equally_likely_in_training(prediction):
    objective = make_objective(prediction, **OBJECTIVES[prediction])
    timesteps = level_timesteps(objective).double()
    assert (timesteps.diff() > 0).all()
    drawn = objective.timestep_quantile(torch.linspace(0, 1, 8001)[1:-1])
    shares = torch.stack([(drawn <= timestep).double().mean() for timestep in timesteps])
    torch.testing.assert_close(shares, (torch.arange(LEVELS).double() + 0.5) / LEVELS, atol=2e-3, rtol=0)


@given(modes=st.lists(st.booleans(), min_size=4, max_size=4), fails=st.booleans())
def test_measuring_restores_the_mode_of_every_layer(modes, fails):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout()))
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    try:
        with measuring(model, compiled=False):
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == modes


def config_of(data, **validation) -> RunConfig:
    data = {"sources": data} if isinstance(data, list) else {"source": str(data)}
    return RunConfig(data=data, validation=validation)


def opened(config: RunConfig, takes_text: bool = True):
    return open_held_out(config, open_data(config.data, takes_text))


@pytest.fixture
def split_set(tmp_path):
    """Parquet files of even and odd rows."""
    for split, indices in {"train": range(40), "validation": range(40, 60), "test": range(60, 80)}.items():
        write_parquet(tmp_path / f"{split}.parquet", indices)
    return tmp_path


@pytest.mark.parametrize(
    ("splits", "validation", "expected"),
    [
        (("train", "validation", "test"), {}, "validation"),
        (("train", "test"), {}, "test"),
        (("train", "validation", "test"), {"split": "test"}, "test"),
        (("train",), {}, None),
        (("train", "test"), {"every": 0}, None),
        (("train", "test"), {"every": 0, "samples_every": 5, "features": "embedded:clip"}, "test"),
    ],
)
def test_the_held_out_split_is_found(split_set, splits, validation, expected):
    for file in split_set.iterdir():
        if file.stem not in splits:
            file.unlink()
    held_out = opened(config_of(split_set, **validation))
    assert (held_out and held_out.config.split) == expected
    assert held_out is None or [*held_out.mixture.files] == [str(split_set / f"{expected}.parquet")]


@pytest.mark.parametrize("name", ["a file", "a folder without splits", "a folder with other files"])
def test_a_set_without_splits_holds_nothing_out(tmp_path, name):
    write_parquet(tmp_path / "train.parquet", range(20))
    if name == "a folder with other files":
        write_parquet(tmp_path / "test of this.parquet", range(20))
    elif name == "a folder without splits":
        (tmp_path / "train.parquet").rename(tmp_path / "0.parquet")
    source = tmp_path / "train.parquet" if name == "a file" else tmp_path
    assert opened(config_of(source)) is None


REFUSED = {
    "no such split": (
        lambda folder: config_of(folder, split="dev"),
        r"`validation\.split` is 'dev'; .* has train, validation, test",
    ),
    "no such source": (lambda folder: config_of(folder, source=str(folder / "x")), r"`validation\.source` is .*x"),
    "the split of the training": (
        lambda folder: config_of(folder, split="train"),
        r"reads 1 of the 1 files that the run trains on, such as .*train\.parquet; held-out images must be others",
    ),
    "the file of the training": (
        lambda folder: config_of(folder / "train.parquet", split="test"),
        r"reads 1 of the 1 files that the run trains on",
    ),
    "a folder with the file of the training": (
        lambda folder: config_of(folder / "train.parquet", source=str(folder), split="train"),
        r"reads 1 of the 1 files that the run trains on",
    ),
    "asked for without a split": (
        lambda folder: config_of(folder / "train.parquet", every=5),
        r"`validation\.every` is 5, but `data` has no local split validation or test; give",
    ),
    "distances without a split": (
        lambda folder: config_of(folder / "train.parquet", samples_every=5),
        r"`validation\.samples_every` is 5, but `data` has no",
    ),
    "a split of the Hub that is not given": (
        lambda folder: config_of(folder, source="user/name"),
        r"`validation\.source` is 'user/name', on the Hub; give its split as `validation\.split`",
    ),
    "a network for another size": (
        lambda folder: config_of(folder, samples_every=5, features="embedded:judge"),
        r"`validation\.features` is embedded:judge, which reads images of 32 x 32 pixels",
    ),
    "distances to several sets": (
        lambda folder: config_of([{"source": str(folder)}] * 2, samples_every=5),
        r"there are several held-out sets; give the one to compare with as `validation\.source`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_images_that_cannot_be_held_out_are_refused(split_set, name):
    make, message = REFUSED[name]
    with pytest.raises((OSError, ValueError), match=message):
        opened(make(split_set))


@pytest.mark.parametrize("content", ["empty", "without captions", "with empty captions"])
def test_held_out_images_that_cannot_be_used_are_refused(split_set, tmp_path, content):
    rows = datasets.Dataset.from_parquet(str(split_set / "test.parquet"), cache_dir=str(tmp_path / "cache"))
    if content == "without captions":
        rows = rows.remove_columns("text")
    elif content == "with empty captions":
        rows = rows.map(lambda row: {"text": ""})
    rows.select(range(0 if content == "empty" else 20)).to_parquet(split_set / "test.parquet")
    with pytest.raises(
        ValueError,
        match={"empty": "no rows", "without captions": "`data.caption_column` is"}.get(
            content, "`validation`: .*holds no caption"
        ),
    ):
        opened(config_of(split_set, split="test"))


def class_folders(folder, names):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{number}.png").write_bytes(picture(number))
    return folder


def test_labels_of_another_set_mean_the_same_classes(tmp_path):
    training = class_folders(tmp_path / "a", ["cat", "dog", "owl"])
    config = config_of(training, source=str(class_folders(tmp_path / "b", ["owl", "dog"])))
    held_out = opened(config, takes_text=False)
    (rows,) = held_out.mixture.rows
    assert [rows.class_names[row.label] for row in RowStream(rows, shuffle_window=1, repeat=False)] == ["dog", "owl"]
    assert rows.class_names == ["cat", "dog", "owl"]
    with pytest.raises(ValueError, match="`validation`: the held-out images have the class 'fox', which the training"):
        opened(config_of(training, source=str(class_folders(tmp_path / "c", ["owl", "fox"]))), takes_text=False)
    unnamed = tmp_path / "unnamed"
    unnamed.mkdir()
    (unnamed / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "label": 1}), encoding="utf-8")
    (unnamed / "0.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match="the training images name their classes, but the held-out ones do not"):
        opened(config_of(training, source=str(unnamed)), takes_text=False)


def test_sources_have_the_split_in_common(tmp_path, split_set):
    other = tmp_path / "other"
    for split in ("train", "test"):
        (other / split).mkdir(parents=True)
        write_shard(other / split / "0.tar", range(5), lambda i: {"txt": b"a shard", "cls": b"0"})
    sources = [{"source": str(split_set), "weight": 3}, {"source": str(other), "image_column": "image"}]
    held_out = opened(config_of(sources))
    assert {source.split for source in held_out.config.sources} == {"test"}
    assert held_out.mixture.shares == [0.75, 0.25]
    with pytest.raises(ValueError, match=r"`validation\.split` is 'validation'; .*other has train, test"):
        opened(config_of(sources, split="validation"))


@pytest.mark.parametrize("layout", ["parquet", "tar", "classes", "captioned"])
def test_images_are_spread_over_a_set_that_is_sorted_by_class(tmp_path, layout):
    rows = open_rows(layouts(tmp_path)[layout], caption_column=None)
    batches = list(first_batches(spread_if_possible(rows, 12), ImageTransform(4), 12, 5))
    numbers = torch.cat([batch["pixels"][:, 0, 0, 0] for batch in batches]).tolist()  # the images' colours
    assert len(numbers) == 12 and {number // 40 for number in numbers} == set(range(6))


def test_samples_are_centred_and_the_same_at_every_call(tmp_path):
    """The largest crop in the middle, whatever the training does at random."""
    wide = Image.new("RGB", (40, 20))
    wide.paste((255, 0, 0), (10, 0, 30, 20))
    transform = ImageTransform(
        10,
        "crop_then_resize",
        crop_position="random",
        min_crop=0.5,
        flip_probability=1,
        reduce_probability=1,
        min_original_size=5,
    ).centred()
    pixels, control = transform(wide, Random(0))
    assert (pixels == torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]).all()
    assert control.crop_size == (20, 20) and control.original_size == (20, 40) and not control.flip
    assert transform(wide, Random(1))[1] == control
