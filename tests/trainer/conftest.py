import importlib.util
from pathlib import Path

import datasets
import pytest

from improved_ldm.models.family import DENOISERS

ROOT = Path(__file__).parents[2]
NUM_IMAGES, NUM_HELD_OUT = 96, 40
TRANSFORMER = "hidden_size: 48, num_layers: 2, num_attention_heads: 2"
UNET = (
    "block_out_channels: [16, 32], down_block_types: [DownBlock2D, CrossAttnDownBlock2D], "
    "up_block_types: [CrossAttnUpBlock2D, UpBlock2D], layers_per_block: 1, transformer_layers_per_block: [1, 1], "
    "num_attention_heads: [1, 2], norm_num_groups: 8"
)
OPTIONS = dict.fromkeys(DENOISERS, TRANSFORMER) | {
    "unet": UNET,
    "mdt": "hidden_size: 48, num_layers: 4, num_decoder_layers: 2, num_attention_heads: 2",
}


def load_script(name: str):
    """Imports a script of training/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "training" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder with a parquet file of a few real captioned images."""
    folder = tmp_path_factory.mktemp("images")
    embedded = ROOT / "improved_ldm" / "assets" / "fashion-mnist" / "train.parquet"
    rows = datasets.Dataset.from_parquet(str(embedded), cache_dir=str(folder / "cache"))
    rows.select(range(NUM_IMAGES)).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="session")
def split_images(tmp_path_factory) -> Path:
    """A folder of parquet files with the splits train and test."""
    folder, embedded = tmp_path_factory.mktemp("split"), ROOT / "improved_ldm" / "assets" / "fashion-mnist"
    for split, count in {"train": NUM_IMAGES, "test": NUM_HELD_OUT}.items():
        rows = datasets.Dataset.from_parquet(str(embedded / f"{split}.parquet"), cache_dir=str(folder / "cache"))
        (folder / "set").mkdir(exist_ok=True)
        rows.select(range(count)).to_parquet(folder / "set" / f"{split}.parquet")
    return folder / "set"


def make_arguments(images: Path, output: Path, **overrides) -> list[str]:
    """Command-line arguments of a run that takes seconds; later ones win."""
    values = {
        "output_dir": output,
        "data.source": images / "train.parquet",
        "data.shuffle_window": 32,
        "cache.passes": 1,
        "training.steps": 6,
        "training.batch_size": 8,
        "training.log_every": 2,
        "training.checkpoint_every": 2,
        "training.trackers": "[]",
        "training.cpu_threads": 1,
        "denoiser.options": f"{{{OPTIONS[overrides.get('denoiser.name', 'dit')]}}}",
        "sampling.num_inference_steps": 2,
        "evaluation.judge": "null",
    } | overrides
    if "stages" in values:  # each run has its own
        del values["training.steps"]
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture
def arguments(images, tmp_path):
    """`make_arguments` for runs in the folder of the test."""

    def make(output: str = "run", **overrides) -> list[str]:
        return make_arguments(images, tmp_path / output, **overrides)

    return make
