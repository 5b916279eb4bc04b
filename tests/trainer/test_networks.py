"""Runs of the networks around a denoiser: autoencoders of both classes, a CLIP pair and a judge."""

import json
import random
import signal
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel

from improved_ldm.autoencoder import decode_latents, encode_images, latent_channels, spatial_factor
from improved_ldm.evaluation.judge import Judge
from improved_ldm.trainer import network_run
from improved_ldm.trainer.clip_task import ClipTask
from improved_ldm.trainer.config import DataConfig
from improved_ldm.trainer.data import open_images
from improved_ldm.trainer.judge_task import JudgeTask
from improved_ldm.trainer.network_run import whole_images
from tests.scripts import launch
from tests.trainer.conftest import ROOT, load_script
from tests.trainer.test_kills import history, kill

FASHION = ROOT / "improved_ldm" / "assets" / "fashion-mnist"
COUNT = 48  # images per split
SHARED = {
    "transform.resolution": 16,
    "training.steps": 6,
    "training.batch_size": 8,
    "training.log_every": 2,
    "training.checkpoint_every": 2,
    "training.trackers": "[]",
    "training.cpu_threads": 1,
    "optimizer.warmup_steps": 2,
}
SMALL = {"autoencoder.block_out_channels": "[8, 16, 16]", "autoencoder.latent_channels": 4}
NETWORKS = {  # script and settings of a tiny one
    "dc": ("train_autoencoder", SMALL | {"autoencoder.layers_per_block": 1}),
    "kl": ("train_autoencoder", SMALL | {"autoencoder.type": "kl", "autoencoder.norm_num_groups": 4}),
    "clip": ("train_clip", {"clip.width": 16, "clip.text_layers": 1, "clip.vision_layers": 1}),
    "judge": ("train_judge", {"judge.widths": "[4, 8]", "data.num_classes": 10, "judge.one_sided": "[5, 7, 9]"}),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder with a few real images, captions and labels in two splits."""
    folder = tmp_path_factory.mktemp("pictures")
    for split in ("train", "test"):
        rows = datasets.Dataset.from_parquet(str(FASHION / f"{split}.parquet"), cache_dir=str(folder / ".cache"))
        rows.select(range(COUNT)).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def words(pictures, tmp_path):
    """The command-line arguments of a tiny run of a network."""

    def make(name: str, output: str = "run", **changes) -> list[str]:
        values = {"output_dir": tmp_path / output, "data.source": pictures} | SHARED | NETWORKS[name][1] | changes
        return [f"--{key}={value}" for key, value in values.items()]

    return make


def run(name: str, words: list[str]):
    load_script(NETWORKS[name][0]).main(words)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_network(one: Path, other: Path):
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    assert history(one) == history(other)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_leaves_a_network_with_its_numbers(words, tmp_path, capsys, name):
    run(name, words(name))
    folder, said = tmp_path / "run", capsys.readouterr().out
    for file in ("config.yaml", "history.jsonl", "loss.png", "metrics.json"):
        assert (folder / file).stat().st_size > 0, file
    assert "held-out images: .../pictures" in said and "split 'test'" in said
    assert "step 2: " in said and "step 4: " in said
    record = metrics(folder)
    assert record["images_seen"] == 48 and record["seconds"] > 0 and "split 'test'" in record["measured_on"]
    assert not list(folder.glob("run.lock*"))


@pytest.mark.parametrize("name", ["dc", "kl"])
def test_an_autoencoder_gets_clearer_and_its_latents_have_variance_1(words, pictures, tmp_path, name):
    psnr = {}
    for steps in (1, 40):
        settings = {"training.steps": steps, "training.checkpoint_every": 40, "optimizer.warmup_steps": 0}
        run(name, words(name, str(steps), **settings))
        psnr[steps] = metrics(tmp_path / str(steps))["psnr"]
    assert psnr[40] > psnr[1] + 1
    record = metrics(tmp_path / "40")
    assert record["hue_right"] is None  # the images are grey
    assert record["latent_std"] == pytest.approx(1, abs=0.2)
    with Image.open(tmp_path / "40" / "reconstructions.png") as picture:
        assert picture.size == (8 * 16, 2 * 16)

    vae = AutoModel.from_pretrained(str(tmp_path / "40"))
    assert (spatial_factor(vae), latent_channels(vae)) == (4, 4)
    batch = next(whole_images(open_images(DataConfig(source=str(pictures))), COUNT, 16))
    latents = encode_images(vae, batch["pixels"] / 127.5 - 1, seeds=batch["seed"])
    assert latents.std((0, 2, 3)).sub(1).abs().max() < 0.2
    assert decode_latents(vae, latents).shape == (COUNT, 3, 16, 16)


@pytest.mark.parametrize("match", ["caption", "label"])
def test_a_clip_pair_learns_which_caption_belongs_to_an_image(words, tmp_path, capsys, match):
    settings = {"training.steps": 60, "training.checkpoint_every": 60, "clip.match": match, "training.batch_size": 16}
    run("clip", words("clip", **settings))
    folder, said = tmp_path / "run", capsys.readouterr().out
    record = metrics(folder)
    chance = 0.1 if match == "label" else 1 / record["captions"]
    assert record["accuracy"] > 1.5 * chance and record["accuracy_of_5"] >= record["accuracy"]
    assert "captions, whose median is" in said and "are cut" in said
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    positions = model.config.text_config.max_position_embeddings
    assert f"--text.max_tokens {positions}" in said
    assert tokenizer.model_max_length == positions
    assert tokenizer.decode(tokenizer("a photo of a bag")["input_ids"], skip_special_tokens=True) == "a photo of a bag"


def test_captions_without_labels_train_a_clip_pair(words, pictures, tmp_path):
    table = pq.read_table(pictures / "train.parquet").drop_columns("label")
    pq.write_table(table, tmp_path / "captioned.parquet")
    run("clip", words("clip", **{"data.source": tmp_path / "captioned.parquet", "training.steps": 2}))
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_judge_learns_classes_and_which_way_images_face(words, pictures, tmp_path):
    settings = {"data.source": pictures / "train.parquet", "training.steps": 80, "training.checkpoint_every": 80}
    run("judge", words("judge", **settings))
    record = metrics(tmp_path / "run")
    assert record["class_accuracy"] > 0.25 and record["orientation_accuracy"] > 0.6
    judge = Judge.from_pretrained(tmp_path / "run")
    assert judge.config.one_sided == [5, 7, 9] and judge.config.sample_size == 16


def test_images_of_the_training_are_measured_if_no_others_are_there(words, pictures, tmp_path, capsys):
    run("judge", words("judge", **{"data.source": pictures / "train.parquet", "training.steps": 2}))
    assert "measured on up to 2000 images of the training, because" in capsys.readouterr().out
    assert metrics(tmp_path / "run")["measured_on"] == "images of the training: .../train.parquet"


def killed_and_resumed(name: str, words, tmp_path: Path, **settings):
    """Kill a run at a random moment after its first checkpoint, and compare it with one that was not."""
    settings = {"training.steps": 40, "training.checkpoint_every": 3, "optimizer.ema_decay": 0.9} | settings
    process = launch(words(name, "killed", **settings), NETWORKS[name][0])
    try:
        while not list(tmp_path.glob("killed/checkpoints/step-*")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        time.sleep(random.Random(time.time_ns()).uniform(0, 1))
    finally:
        kill(process)
    process.communicate()
    for output in ("killed", "whole"):
        run(name, words(name, output, **settings))
    assert_same_network(tmp_path / "killed", tmp_path / "whole")


def test_an_autoencoder_that_is_killed_ends_as_an_unbroken_one(words, tmp_path):
    killed_and_resumed("dc", words, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["kl", "clip", "judge"])
def test_a_network_that_is_killed_ends_as_an_unbroken_one(words, tmp_path, name, workers):
    changes = {"data.num_workers": workers, "training.gradient_accumulation_steps": 2, "training.batch_size": 4}
    killed_and_resumed(name, words, tmp_path, **changes)


@pytest.mark.parametrize("name, task", [("clip", ClipTask), ("judge", JudgeTask)])
def test_ctrl_c_saves_and_the_same_command_goes_on(words, tmp_path, monkeypatch, name, task):
    run(name, words(name, "whole"))
    plain, calls = task.loss, []

    def interrupted(self, *rest):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return plain(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(task, "loss", interrupted)
        with pytest.raises(SystemExit, match="stopped after step 3 of 6; the same command resumes from there"):
            run(name, words(name, "broken"))
    assert not (tmp_path / "broken" / "metrics.json").exists()
    run(name, words(name, "broken"))
    assert_same_network(tmp_path / "broken", tmp_path / "whole")


def test_a_resumed_clip_pair_keeps_its_words_if_the_captions_change(words, pictures, tmp_path):
    data = tmp_path / "data.parquet"
    table = pq.read_table(pictures / "train.parquet")
    pq.write_table(table, data)
    settings = {"data.source": data, "optimizer.schedule": "constant"}
    run("clip", words("clip", **settings, **{"training.steps": 2}))
    before = AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab()
    pq.write_table(table.slice(0, 20), data)
    run("clip", words("clip", **settings, **{"training.steps": 4, "data.accept_changes": "true"}))
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == before


@pytest.mark.parametrize("size", [16, (16, 32), 600])
def test_images_are_measured_in_batches_of_bounded_memory(pictures, size):
    mixture = open_images(DataConfig(source=str(pictures)))
    pixels = [batch["pixels"] for batch in whole_images(mixture, 5, size)]
    assert sum(map(len, pixels)) == 5
    assert all(part[:, 0].numel() <= network_run.BATCH_PIXELS or len(part) == 1 for part in pixels)


@pytest.mark.parametrize("name", ["kl", "clip", "judge"])
def test_numbers_do_not_depend_on_the_batches_of_the_measurement(words, tmp_path, monkeypatch, name):
    run(name, words(name, "whole"))
    monkeypatch.setattr(network_run, "BATCH_PIXELS", 7 * 16 * 16)
    run(name, words(name, "parts"))
    whole, parts = (metrics(tmp_path / output) for output in ("whole", "parts"))
    for key, value in whole.items():
        if isinstance(value, float) and key not in ("seconds", "peak_memory_gb"):
            assert parts[key] == pytest.approx(value, rel=1e-4), key
