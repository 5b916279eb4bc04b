"""Published runs with local data, a local autoencoder and a local base reveal nothing about the machine."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from improved_ldm.hub.local_folders import check_names_no_folders, rewrite_records
from improved_ldm.places import local_folders
from tests.conftest import ASSETS
from tests.hub.conftest import PUBLISH
from tests.scripts import ROOT
from tests.trainer.conftest import images, make_arguments  # noqa: F401  a fixture

STAGES = "[{resolution: 16, steps: 2}, {resolution: 32, steps: 2}]"


def told(hub, name: str, *local: Path) -> list[tuple[str, str]]:
    """The files of all versions of a model that name this machine or one of its folders, with the name."""
    repository = hub.repository(name)
    words = [str(folder) for folder in (*local, *local_folders())] + [ROOT.name + "/tests"]
    words = [re.escape(word) for word in words if word.count("/") != 1]  # not a top-level folder such as /tmp
    words += [re.escape(f"{folder}/") for folder in local_folders()] + [rf"\b{re.escape(socket.gethostname())}\b"]
    return [
        (path, word)
        for revision in (*repository.branches, *repository.tags)
        for path, blob in repository.resolve(revision).files.items()
        for word in words
        if re.search(word.encode(), readable(path, hub.store.contents[blob.etag]))
    ]


def readable(path: str, content: bytes) -> bytes:
    """The readable texts of a file: its content, the header of weights, or the metadata of a picture."""
    if path.endswith(".safetensors"):
        return content[8 : 8 + int.from_bytes(content[:8], "little")]
    if path.endswith(".png"):
        return b"".join(chunk for chunk in chunks(content) if chunk[:4] != b"IDAT")
    return content


def chunks(png: bytes) -> list[bytes]:
    place, found = 8, []
    while place < len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        found.append(png[place + 4 : place + 8 + length])
        place += 12 + length
    return found


@pytest.mark.slow
def test_a_published_repository_tells_nothing_of_the_machine(hub, clients, images, tmp_path):  # noqa: F811
    home = tmp_path / "home" / "somebody"
    models = {"autoencoder.pretrained": "autoencoder", "text.pretrained": "clip"}
    for key, name in models.items():
        models[key] = home / "models" / name
        shutil.copytree(ASSETS / name, models[key])
    data, run, adapter = home / "photos", home / "runs" / "base", home / "runs" / "adapter"
    data.mkdir()
    shutil.copy(images / "train.parquet", data)
    environment = {"HOME": str(home), "ACCELERATE_USE_CPU": "1"}

    options = {"stages": STAGES, "data.source": data, "cache.folder": home / "cache", "sampling.every": 2, **models}
    words = make_arguments(images, run, **options)
    clients.run(ROOT / "training" / "train_t2i.py", *words, **environment)
    publish = ["--repo", "user/base", "--version", "v0.1", "--variant", "fp16"]
    clients.run(PUBLISH, "--pipeline", str(run), *publish, **environment)
    assert told(hub, "user/base", home, tmp_path) == []
    assert len(hub.repository("user/base").tags) == 2

    options = {"data.source": data, "cache.passes": 0, "lora.text_encoder": "true", "base": run}
    words = [
        word for word in make_arguments(images, adapter, **options) if not word.startswith(("--denoiser", "--samp"))
    ]
    clients.run(ROOT / "training" / "train_lora.py", *words, **environment)
    publish = ["--repo", "user/adapter", "--version", "v0.1", "--base", "user/base"]
    clients.run(PUBLISH, "--pipeline", str(adapter), *publish, **environment)
    assert told(hub, "user/adapter", home, tmp_path) == []

    # the replacement still states what to repeat
    config = yaml.safe_load(hub.file("user/base", "v0.1", "config.yaml"))
    assert (config["data"]["source"], config["output_dir"]) == (".../photos", ".../base")
    assert config["autoencoder"]["pretrained"] == ".../autoencoder"
    command = json.loads(hub.file("user/base", "v0.1", "metrics.json"))["command"]
    assert "--data.source=.../photos" in command and "train_t2i.py" in command
    assert yaml.safe_load(hub.file("user/adapter", "v0.1", "config.yaml"))["base"] == "user/base"


def test_folders_of_older_runs_are_rewritten(tmp_path):
    files = {
        "vae/config.json": {"_name_or_path": f"{tmp_path}/vae", "latent_channels": 4},
        "text_encoder/config.json": {"hidden_size": 4},
        "metrics.json": {"command": f"python {tmp_path}/train.py --data '{tmp_path}/a b'", "loss": 1.5},
    }
    content = {}
    for path, record in files.items():
        content[path] = tmp_path / path
        content[path].parent.mkdir(exist_ok=True)
        content[path].write_text(json.dumps(record), encoding="utf-8")
    content["config.yaml"] = yaml.safe_dump({"data": {"source": "/mnt/set"}, "output_dir": f"{tmp_path}/run"}).encode()
    content["README.md"] = f"Loads `{tmp_path}/run`, and ({tmp_path}/run/stage-1).".encode()
    changed = rewrite_records(content)
    assert changed.keys() == content.keys() - {"text_encoder/config.json"}
    assert json.loads(changed["vae/config.json"]) == {"latent_channels": 4}
    assert changed["README.md"] == b"Loads `.../run`, and (.../stage-1)."
    assert yaml.safe_load(changed["config.yaml"]) == {"data": {"source": ".../set"}, "output_dir": ".../run"}
    assert not any(str(tmp_path).encode() in source for source in changed.values())
    check_names_no_folders(content | changed)


@pytest.mark.parametrize("kind", ["text", "picture", "weights"])
def test_a_file_of_the_users_that_names_a_folder_is_refused(tmp_path, kind):
    file = tmp_path / {"text": "notes.txt", "picture": "a.png", "weights": "a.safetensors"}[kind]
    place = tmp_path / "photos"
    if kind == "text":
        file.write_text(f"from {place}, by hand", encoding="utf-8")
    elif kind == "picture":
        notes = PngInfo()
        notes.add_text("Source", str(place), zip=True)
        Image.new("RGB", (4, 4)).save(file, pnginfo=notes)
    else:
        save_file({"a": torch.zeros(2)}, file, metadata={"config": json.dumps({"path": str(place)})})
    with pytest.raises(ValueError, match=rf"{file.name} names a path on this machine, '{place}'; remove it"):
        check_names_no_folders({file.name: file})


def test_the_pipelines_own_methods_push_no_folders(hub, clients, class_pipeline, tmp_path):
    class_pipeline().save_pretrained(tmp_path / "mine")
    clients.call("save_and_push", folder=str(tmp_path / "mine"), to=str(tmp_path / "again"), name="user/mine")
    for name, title in (("user/mine", "saved"), ("user/mine-too", "pushed")):
        commits = hub.repository(name).commits.values()
        files = {path: blob for commit in commits for path, blob in commit.files.items()}
        texts = [hub.store.contents[files[path].etag] for path in files if path.endswith((".json", ".md"))]
        assert title in {commit.title for commit in commits} and "model_index.json" in files
        assert not any(str(tmp_path).encode() in text or b"name_or_path" in text for text in texts)
