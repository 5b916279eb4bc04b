import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures"
OFFICIAL = {
    "official_dit": "facebookresearch/DiT",
    "official_mdtv2": "sail-sg/MDT",
    "official_pixart": "PixArt-alpha/PixArt-alpha",
    "official_sd3_mmdit_pure": "Stability-AI/sd3",
    "official_sd35_mmditx": "Stability-AI/sd3.5",
}


@dataclass(frozen=True)
class Published:
    """Weights of an official implementation and the arguments of its constructor."""

    source: str
    folder: Path
    config: dict
    state_dict: dict[str, torch.Tensor]

    @classmethod
    def load(cls, name: str) -> "Published":
        folder = FIXTURES / name
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["constructor_kwargs"]
        return cls(OFFICIAL[name], folder, config, load_file(folder / "state_dict.safetensors"))


@pytest.fixture(params=OFFICIAL)
def published(request) -> Published:
    return Published.load(request.param)


@pytest.fixture
def load_published():
    return Published.load
