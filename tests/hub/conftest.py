import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from improved_ldm.hub.card import write_card
from improved_ldm.trainer.config import RunConfig
from tests.hub.minihub import MiniHub
from tests.scripts import ROOT, ForkServer, ScriptProcess

PUBLISH = ROOT / "training" / "publish.py"
TOKEN, STRANGERS_TOKEN = "hf_" + "Abc123" * 6, "hf_" + "Xyz789" * 6


class Clients:
    """Runs scripts with the real clients of the Hub. Each has its own process, which uses the double as the Hub.

    Args:
        server: Process that is forked for each script.
        folder: Folder for files of the scripts.
    """

    def __init__(self, server: ForkServer, folder: Path):
        self.server, self.folder = server, folder

    def start(self, script: Path, *arguments: str, token: str = TOKEN, **environment: str) -> ScriptProcess:
        """Start a script."""
        return self.server.start([script, *arguments], environment={"HF_TOKEN": token, **environment})

    def run(self, script: Path, *arguments: str, token: str = TOKEN, code: int = 0, **environment: str) -> str:
        """Run a script, check its exit code and return its output."""
        process = self.start(script, *arguments, token=token, **environment)
        output = process.communicate()[0]
        assert process.returncode == code, output
        return output

    def publish(self, folder: Path, version: str, *more: str, token: str = TOKEN, code: int = 0) -> str:
        return self.run(PUBLISH, *publishing(folder, version), *more, token=token, code=code)

    def call(self, function: str, **arguments):
        """Call a function of `clients.py`."""
        self.run(ROOT / "tests" / "hub" / "clients.py", function, json.dumps(arguments))

    def drawing(self, source: str | Path, **options) -> tuple[np.ndarray, list | None]:
        """An image sampled from a pipeline, and the pipeline's lineage."""
        file = self.folder / "drawing.npz"
        self.call("draw", source=str(source), file=str(file), **options)
        kept = np.load(file)
        assert np.isfinite(kept["image"]).all()
        return kept["image"], json.loads(str(kept["lineage"]))


def publishing(folder: Path, version: str) -> list[str]:
    """The command-line arguments to publish a folder."""
    return ["--pipeline", str(folder), "--repo", "user/model", "--version", version]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The double of the Hub, and the environment variables with which a process uses it."""
    home = tmp_path_factory.mktemp("home")
    with MiniHub({TOKEN: "user", STRANGERS_TOKEN: "stranger"}, tmp_path_factory.mktemp("xet")) as server:
        variables = os.environ | {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # otherwise, `datasets` contacts another host
        }
        yield server, {key: value for key, value in variables.items() if key != "HF_HUB_OFFLINE"}


@pytest.fixture(scope="session")
def fork_server(environment):
    server = ForkServer(environment[1] | {"HF_HUB_DISABLE_XET": "1"})
    yield server
    server.process.kill()


@pytest.fixture
def hub(environment):
    """The double of the Hub, without repositories."""
    server, _ = environment
    server.clear()
    return server


@pytest.fixture
def clients(hub, fork_server, tmp_path) -> Clients:
    return Clients(fork_server, tmp_path)


@pytest.fixture
def trained_folder(class_pipeline, tmp_path):
    """Makes the folder of a finished run from a tiny pipeline; another seed gives other weights of the denoiser."""

    def make(name: str = "run", seed: int = 0, lineage=None, **denoiser) -> Path:
        folder, pipeline = tmp_path / name, class_pipeline(**denoiser)
        for parameter in pipeline.denoiser.parameters():
            parameter.data += 0.01 * seed
        pipeline.register_to_config(lineage=lineage)
        pipeline.save_pretrained(folder)
        config = RunConfig(output_dir=folder.as_posix()).model_dump(mode="json")
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        Image.effect_noise((64, 64), seed + 10).save(folder / "samples.png")
        numbers = {"parameters": 1, "images_seen": 1, "device": "CPU", "command": "train", "obedience": {}}
        write_card(folder, pipeline, config, numbers, 1, "samples.png")
        (folder / "metrics.json").write_text(json.dumps(numbers), encoding="utf-8")
        for path in ("checkpoints/step-00000001/optimizer.bin", "cache/a.safetensors", "logs/events", ".hidden"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(TOKEN, encoding="utf-8")
        return folder

    return make
