"""`training/publish.py` with the real clients and a double of the Hub."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image

from improved_ldm.hub.publish import publish
from improved_ldm.hub.repository import HubError
from tests.hub.conftest import PUBLISH, STRANGERS_TOKEN, TOKEN, publishing
from tests.hub.minihub import Fault
from tests.scripts import ROOT, SECONDS
from tests.trainer.conftest import images  # noqa: F401  a fixture

WEIGHTS = f"transformer/{SAFETENSORS_WEIGHTS_NAME}"
CONTENT = {
    ".gitattributes",
    "README.md",
    "config.yaml",
    "metrics.json",
    "model_index.json",
    "samples.png",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    WEIGHTS,
}


def titles(hub, revision="main"):
    return [commit.title for commit in reversed(hub.repository("user/model").history(revision))]


def error_of(output: str) -> str:
    """The single output line of a command that was refused."""
    (line,) = output.splitlines()
    assert line.startswith("not published: ")
    return line


def test_versions_are_loaded_bit_equal_by_their_tags(hub, clients, trained_folder):
    first, second = trained_folder("first"), trained_folder("second", seed=1)
    output = clients.publish(first, "v0.1")
    assert 'DiffusionPipeline.from_pretrained("user/model", revision="v0.1")' in output
    assert hub.repository("user/model").resolve("v0.1").files.keys() == CONTENT
    assert len(hub.uploads()) == 3  # two models and the samples
    output += clients.publish(second, "v0.2")
    assert len(hub.uploads()) == 5  # the autoencoder is already uploaded
    assert titles(hub) == ["initial commit", "Publish v0.1", "Publish v0.2"]

    drawings = []
    for folder, version in ((first, "v0.1"), (second, "v0.2")):
        drawn, _ = clients.drawing("user/model", revision=version)
        np.testing.assert_array_equal(drawn, clients.drawing(folder)[0])
        drawings.append(drawn)
        card = hub.file("user/model", version, "README.md").decode()
        assert f'from_pretrained("user/model", revision="{version}")' in card and str(folder) not in card
    assert not np.array_equal(*drawings)
    assert TOKEN not in output
    assert not any(TOKEN.encode() in content for content in hub.store.contents.values())


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", "float16"), ("ema", "float32")])
def test_a_variant_stands_beside_the_plain_weights(hub, clients, trained_folder, variant, dtype):
    folder = trained_folder()
    clients.publish(folder, "v0.1", "--variant", variant)
    files = hub.repository("user/model").resolve("v0.1").files
    added = {f"{part}/diffusion_pytorch_model.{variant}.safetensors" for part in ("transformer", "vae")}
    assert files.keys() == CONTENT | added
    assert len(set(hub.uploads())) == (5 if variant == "fp16" else 3)  # the averaged weights are the plain ones
    drawn, _ = clients.drawing("user/model", revision="v0.1", variant=variant, dtype=dtype)
    np.testing.assert_array_equal(drawn, clients.drawing(folder, dtype=dtype)[0])


def test_a_killed_upload_is_finished_without_uploading_anything_twice(hub, clients, trained_folder):
    folder = trained_folder()
    hub.stall_uploads(after=1)
    process = clients.start(PUBLISH, *publishing(folder, "v0.1"))
    assert hub.stalled.wait(SECONDS)
    while not hub.uploads():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(hub.uploads()) == 1 and titles(hub) == ["initial commit"]
    hub.stall_uploads(after=None)
    clients.publish(folder, "v0.1")
    assert len(hub.uploads()) == len(set(hub.uploads())) == 3
    assert titles(hub, "v0.1") == ["initial commit", "Publish v0.1"]


def test_a_commit_that_lacks_its_tag_is_found_and_tagged(hub, clients, trained_folder):
    first, second = trained_folder("first"), trained_folder("second", seed=1)
    hub.faults = [Fault("POST", "/tag/", 403)]
    clients.publish(first, "v0.1", code=1)
    clients.publish(second, "v0.2")
    history, uploads = titles(hub), hub.uploads()
    clients.publish(first, "v0.1")
    assert (titles(hub), hub.uploads()) == (history, uploads)
    repository = hub.repository("user/model")
    assert repository.resolve("v0.2").parent == repository.tags["v0.1"]


def test_a_busy_hub_is_asked_again(hub, clients, trained_folder):
    hub.faults = [
        Fault("POST", "/repos/create", 429, headers={"Retry-After": "2"}),
        Fault("PUT", "/lfs/", 429, headers={"Retry-After": "0"}),
        Fault("PUT", "/lfs/", 503),
        Fault("POST", "/commit/", 500, lost_answer=True),
        Fault("GET", "/commits/", 502),
        Fault("POST", "/tag/", 504, lost_answer=True),
    ]
    output = clients.publish(trained_folder(), "v0.1")
    assert "the Hub is busy (429); trying again in 2 s" in output
    assert not any(fault.times for fault in hub.faults)
    assert titles(hub, "v0.1") == ["initial commit", "Publish v0.1"]
    assert len(hub.uploads()) == 3


def test_a_version_that_is_there_already_is_not_published_twice(hub, clients, trained_folder):
    folder = trained_folder()
    clients.publish(folder, "v0.1", "--variant", "fp16")
    history = titles(hub)
    assert "user/model: v0.1 is already published" in clients.publish(folder, "v0.1", "--variant", "fp16")
    assert "with other files" in error_of(clients.publish(folder, "v0.1", code=1))
    assert titles(hub) == history


def test_a_tag_is_never_moved(hub, clients, trained_folder):
    first, second = trained_folder("first"), trained_folder("second", seed=1)
    clients.publish(first, "v0.1")
    log = len(hub.log)
    for folder in (first, second):
        (folder / WEIGHTS).write_bytes(b"not read for a variant before the tag is looked for")
        line = error_of(clients.publish(folder, "v0.1", "--variant", "fp16", code=1))
        assert "`version` is 'v0.1'; user/model already has this tag with other files: choose another" in line
    assert not any(line.method == "PUT" or "/commit/" in line.path for line in hub.log[log:])


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_" + "Wrong1" * 6, "the Hub does not accept the access token: sign in with `hf auth login`"),
        ("", "there is no access token: sign in with `hf auth login`"),
        (STRANGERS_TOKEN, "the access token cannot write to user/model"),
    ],
    ids=["wrong", "missing", "of another user"],
)
def test_a_token_that_may_not_write_is_an_error_that_says_what_to_do(clients, trained_folder, token, message):
    output = clients.publish(trained_folder(), "v0.1", token=token, code=1)
    assert message in error_of(output)
    assert not token or token not in output


def test_a_private_repository_is_private(hub, clients, trained_folder):
    folder = trained_folder()
    clients.publish(folder, "v0.1", "--private", "true")
    assert hub.repository("user/model").private
    clients.publish(folder, "v0.2")
    assert hub.repository("user/model").private
    hub.repository("user/model").private = False
    output = clients.publish(folder, "v0.3", "--private", "true", code=1)
    assert "`private` is true, but user/model is public" in error_of(output)


def test_the_stages_of_a_run_become_versions_with_lineage(hub, clients, trained_folder, tmp_path):
    source = (tmp_path / "run" / "stage-1-8").as_posix()
    low = trained_folder("run/stage-1-8")
    record = {"source": source, "steps": 3, "resolution": [8, 16]}
    run = trained_folder("run", seed=1, lineage=[record], sample_size=8)
    versions = ["v0.1-stage-1-8", "v0.1"]
    output = clients.publish(run, "v0.1")
    assert [line for line in output.splitlines() if line.startswith("DiffusionPipeline")] == [
        f'DiffusionPipeline.from_pretrained("user/model", revision="{version}")' for version in versions
    ]
    assert titles(hub) == ["initial commit", "Publish v0.1"]  # `main` never has a stage
    for folder, version in zip((low, run), versions, strict=True):
        assert hub.repository("user/model").resolve(version).files.keys() == CONTENT
        drawn, lineage = clients.drawing("user/model", revision=version)
        np.testing.assert_array_equal(drawn, clients.drawing(folder)[0])
    assert lineage == [record | {"source": "user/model@v0.1-stage-1-8"}]
    card = hub.file("user/model", "v0.1", "README.md").decode()
    assert "`user/model@v0.1-stage-1-8`, pixels 8 to 16, steps 3" in card

    del hub.repository("user/model").tags["v0.1"]  # the first stage is skipped
    clients.publish(run, "v0.1")
    assert hub.repository("user/model").tags.keys() == set(versions) and len(titles(hub)) == 2


def test_a_trained_adapter_is_published_for_a_published_base(hub, clients, trained_folder, images, tmp_path):  # noqa: F811
    base, folder = trained_folder("base", num_classes=10), tmp_path / "adapter"
    settings = {"base": base, "output_dir": folder, "data": images, "training.steps": 2, "training.batch_size": 4}
    settings |= {"training.trackers": "[]", "training.cpu_threads": 1, "evaluation.judge": "null", "lora.rank": 2}
    clients.run(ROOT / "training" / "train_lora.py", *(f"--{key}={value}" for key, value in settings.items()))
    line = error_of(clients.publish(folder, "v0.1", code=1))
    assert (
        "'.../base', is only on this machine; publish it first, then pass its repository as `--base user/name`" in line
    )
    line = error_of(clients.publish(folder, "v0.1", "--variant", "fp16", code=1))
    assert "`variant` is 'fp16'; an adapter has no variants" in line
    assert not hub.log

    line = error_of(clients.publish(folder, "0.10", "--base", "user/base", code=1))
    assert "`base` is 'user/base', which does not exist on the Hub or is not visible to this token" in line
    other = trained_folder("other", num_classes=10, hidden_size=48)
    clients.run(PUBLISH, "--pipeline", str(other), "--repo", "user/other", "--version", "v0.1")
    line = error_of(clients.publish(folder, "0.10", "--base", "user/other", code=1))
    assert "`base` is 'user/other': the adapter does not fit this pipeline" in line
    assert ("model", "user/model") not in hub.store.repositories  # nothing was sent

    clients.run(PUBLISH, "--pipeline", str(base), "--repo", "user/base", "--version", "v0.1")
    output = clients.publish(folder, "0.10", "--base", "user/base")
    printed = output.partition("pipe = ")
    assert printed[1:] == (
        "pipe = ",
        'DiffusionPipeline.from_pretrained("user/base")\npipe.load_lora_weights("user/model", revision="0.10")\n',
    )
    clients.call("execute", code="".join(printed[1:]))
    files = hub.repository("user/model").resolve("0.10").files
    expected = {"pytorch_lora_weights.safetensors", "README.md", "config.yaml", "metrics.json", "history.jsonl"}
    pictures = {"samples.png", "reconstructions.png", "loss.png"}
    assert files.keys() == expected | pictures | {".gitattributes"}
    card = ModelCard(hub.file("user/model", "0.10", "README.md").decode())
    assert card.data.base_model == "user/base"
    assert "| base | `user/base` |" in card.text and f'("{base}")' not in card.text
    clients.call("follow", card=str(card), file=str(tmp_path / "image.png"))
    assert Image.open(tmp_path / "image.png").size == (8, 8)


def test_only_an_adapter_has_a_base(trained_folder):
    with pytest.raises(ValueError, match="`base` is 'user/base'; only an adapter has one"):
        publish(trained_folder(), "user/model", "v0.1", base="user/base")


def test_an_adapter_is_no_base(hub, clients, trained_folder, tmp_path):
    """The repository of a base must contain a pipeline of the family."""
    adapter, pipeline = tmp_path / "adapter", DiffusionPipeline.from_pretrained(trained_folder())
    pipeline.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipeline.save_lora_weights(adapter, **pipeline.lora_layers())
    hub.store.create("model", "user/notes", private=False)
    clients.call(
        "check_base", folder=str(adapter), base="user/notes", message="it contains no pipeline; it must contain"
    )


def test_files_of_others_stay_on_the_branch_of_stages_too(hub, clients, trained_folder, tmp_path):
    trained_folder("run/stage-1-8")
    record = {"source": (tmp_path / "run" / "stage-1-8").as_posix(), "steps": 3, "resolution": [8, 16]}
    run = trained_folder("run", seed=1, lineage=[record])
    hub.store.create("model", "user/model", private=False)
    repository = hub.repository("user/model")
    repository.branches["stages"] = repository.branches["main"]
    hub.write("user/model", {"mine.txt": b"mine"}, "stages")
    line = error_of(clients.publish(run, "v0.1", code=1))
    assert "and would be replaced or removed: mine.txt of the branch stages. Choose another `--repo`" in line
    output = clients.publish(run, "v0.1", "--replace", "true")
    assert "these files are replaced or removed: mine.txt of the branch stages" in output
    clients.publish(trained_folder("run", seed=2, lineage=[record]), "v0.2")  # replaces stages of an earlier version


def test_files_of_others_are_not_replaced_without_asking(hub, clients, trained_folder):
    folder = trained_folder()
    hub.store.create("model", "user/model", private=False)
    hub.write("user/model", {"notes.md": b"mine", "README.md": b"by hand"})
    line = error_of(clients.publish(folder, "v0.1", code=1))
    assert "`repo` is 'user/model', which contains files that were not published by this command and would " in line
    assert line.endswith("README.md, notes.md. Choose another `--repo`, or allow it with `--replace true`.")
    assert not any(request.method == "PUT" or "/commit/" in request.path for request in hub.log)
    output = clients.publish(folder, "v0.1", "--replace", "true")
    assert "user/model: `replace` is true, these files are replaced or removed: README.md, notes.md" in output
    assert hub.repository("user/model").resolve("main").files.keys() == CONTENT

    clients.publish(trained_folder("second", seed=1), "v0.2")  # files of an earlier version can be replaced
    hub.write("user/model", {"README.md": b"edited on the Hub"})
    line = error_of(clients.publish(trained_folder("third", seed=2), "v0.3", code=1))
    assert "would be replaced or removed: README.md." in line


@pytest.mark.parametrize(
    ("config", "message"),
    [("a: [", "config.yaml is not YAML"), ("seed: 0", "has no `output_dir`"), ("", "has no `output_dir`")],
    ids=["broken", "incomplete", "empty"],
)
def test_a_configuration_that_is_none_is_refused_in_a_line(clients, trained_folder, config, message):
    folder = trained_folder()
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    assert message in error_of(clients.publish(folder, "v0.1", code=1))


def test_a_commit_tells_what_it_removes(hub, clients, trained_folder):
    first, second = trained_folder("first"), trained_folder("second", seed=1)
    (first / "notes.md").write_text("kept by hand", encoding="utf-8")
    assert "removes" not in clients.publish(first, "v0.1")
    assert "user/model: the commit removes notes.md from main" in clients.publish(second, "v0.2")


def test_the_double_takes_ids_only(hub, clients, tmp_path):
    for key in ("base_model", "datasets"):
        card = tmp_path / "README.md"
        card.write_text(f"---\n{key}: {tmp_path}\n---\n", encoding="utf-8")
        with pytest.raises(AssertionError, match=f'"{key}" must be an id on the Hub'):
            clients.call("validate", card=str(card))


@pytest.mark.slow
def test_the_command_uploads_with_xet_in_one_commit(environment, hub, clients, trained_folder):
    folder = trained_folder()
    command = [sys.executable, str(PUBLISH), *publishing(folder, "v0.1")]
    result = subprocess.run(command, env=environment[1] | {"HF_TOKEN": TOKEN}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not hub.uploads() and any("xet-write-token" in line.path for line in hub.log)
    assert titles(hub, "v0.1") == ["initial commit", "Publish v0.1"]
    np.testing.assert_array_equal(clients.drawing("user/model", revision="v0.1")[0], clients.drawing(folder)[0])
    assert TOKEN not in result.stdout + result.stderr


@pytest.mark.parametrize("version", ["", "v 0.1", "../main", "main", "v0.1.", "v0..1", "x.lock", "0123abc", "v0.1\n"])
def test_a_version_must_be_the_name_of_a_tag(tmp_path, version):
    with pytest.raises(ValueError, match="it must be the name of a tag"):
        publish(tmp_path, "user/model", version)


@pytest.mark.parametrize("path", ["README.md", "metrics.json", "model_index.json", WEIGHTS, "vae"])
def test_a_folder_that_lacks_something_is_refused(trained_folder, path):
    folder = trained_folder()
    (folder / path).rename(folder.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match=path.replace(SAFETENSORS_WEIGHTS_NAME, r"\*.safetensors")):
        publish(folder, "user/model", "v0.1")


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("transformer/weights.pt", b"", "transformer/weights.pt is a pickle"),
        ("pytorch_model.BIN", b"", "pytorch_model.BIN is a pickle"),
        ("notes/a.txt", b"one\ntoken: hf_" + b"a1B2" * 9, "notes/a.txt, line 2, seems to contain an access token"),
        ("key", b"-----BEGIN OPENSSH PRIVATE KEY-----", "key, line 1, seems to contain"),
        ("in_use.md", b"my-token-of-an-unknown-kind", "in_use.md, line 1, seems to contain"),
    ],
)
def test_pickles_and_secrets_are_never_uploaded(trained_folder, monkeypatch, path, content, message):
    monkeypatch.setenv("HF_TOKEN", "my-token-of-an-unknown-kind")
    folder = trained_folder()
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        publish(folder, "user/model", "v0.1")
    assert not content or content.decode() not in str(error.value)


def test_a_repository_has_an_owner(trained_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("model", "a/b/c"):
        with pytest.raises(ValueError, match="repo"):
            publish(trained_folder(name.replace("/", "-")), name, "v0.1")


def test_a_machine_without_a_network_is_told_so(trained_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # the tests' own process is offline
    with pytest.raises(HubError, match=r"cannot be reached: .*offline mode is enabled"):
        publish(trained_folder(), "user/model", "v0.1")
