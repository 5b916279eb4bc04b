"""`python -m improved_ldm.convert`."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoModel, PixArtTransformer2DModel
from safetensors.torch import save_file
from torch.testing import assert_close

from improved_ldm.convert import to_published
from improved_ldm.convert.__main__ import main
from improved_ldm.convert.files import read_checkpoint
from improved_ldm.exits import exit_on_error
from tests.convert.test_diffusers_classes import PIXART


@pytest.fixture
def checkpoint(load_published, tmp_path):
    """A DiT checkpoint in the format of its training script, and its configuration."""
    published = load_published("official_dit")
    content = {"model": {}, "ema": published.state_dict, "opt": {"step": 1}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "0400000.pt")
    (tmp_path / "dit.json").write_text(json.dumps(published.config), encoding="utf-8")
    return published, tmp_path


def test_a_checkpoint_becomes_a_folder_that_loads(checkpoint):
    published, folder = checkpoint
    command = [sys.executable, "-m", "improved_ldm.convert", "facebookresearch/DiT"]
    command += [folder / "0400000.pt", folder / "dit", "--config", folder / "dit.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "DiTDenoiser, 64 channels, 2 blocks, patches of 2" in result.stdout
    denoiser = AutoModel.from_pretrained(str(folder / "dit"))
    back = to_published("facebookresearch/DiT", denoiser)
    assert all(torch.equal(back[name], tensor) for name, tensor in published.state_dict.items())


def test_a_disentangled_folder_is_made_on_request(checkpoint, caplog):
    _, folder = checkpoint
    options = ["--config", str(folder / "dit.json"), "--conditioning", "disentangled"]
    main(["facebookresearch/DiT", str(folder / "0400000.pt"), str(folder / "dit"), *options])
    assert AutoModel.from_pretrained(str(folder / "dit")).config.conditioning == "disentangled"
    assert "moved: trunk.class_embedding.weight as trunk.class_tokens.weight" in caplog.text


@pytest.mark.parametrize("shard", ["10GB", "300KB"])
def test_a_folder_of_diffusers_converts_with_its_own_configuration(randomize, tmp_path, shard):
    peer = randomize(PixArtTransformer2DModel(**PIXART["small"][0]))
    peer.save_pretrained(tmp_path / "peer", max_shard_size=shard)
    main(["diffusers", str(tmp_path / "peer"), str(tmp_path / "ours")])
    back = to_published("diffusers", AutoModel.from_pretrained(str(tmp_path / "ours")))
    assert all(torch.equal(back[name], tensor) for name, tensor in peer.state_dict().items())


def test_the_denoiser_is_taken_out_of_a_file_with_more(load_published, tmp_path):
    published = load_published("official_sd35_mmditx")
    content = {f"model.diffusion_model.{name}": tensor for name, tensor in published.state_dict.items()}
    save_file(content | {"first_stage_model.x": torch.ones(1)}, tmp_path / "sd3.5.safetensors")
    main(["Stability-AI/sd3.5", str(tmp_path / "sd3.5.safetensors"), str(tmp_path / "ours")])
    back = to_published("Stability-AI/sd3.5", AutoModel.from_pretrained(str(tmp_path / "ours")))
    assert back.keys() == published.state_dict.keys()


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_a_file_with_code_is_not_executed(tmp_path, capsys):
    torch.save({"model": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(ValueError, match="holds more than weights"):
        read_checkpoint(tmp_path / "harmful.pt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("list.pt", [1, 2], "holds no state dict"), ("text.safetensors", None, "cannot be read")],
)
def test_files_that_are_no_checkpoints_are_errors(tmp_path, name, content, message):
    file = tmp_path / name
    if content is None:
        file.write_text("no tensors", encoding="utf-8")
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(file)


def test_errors_come_without_a_traceback_and_write_nothing(checkpoint):
    _, folder = checkpoint
    for arguments, message in (
        (["facebookresearch/DiT", "0400000.pt", "out"], "keys are missing"),  # the defaults are those of XL/2
        (["facebookresearch/DiT", "absent.pt", "out"], "has 0 files of weights"),
        (["facebookresearch/DiT", "dit.json", "out"], "must end in .safetensors"),
        (["facebookresearch/DiT", "0400000.pt", "."], "exists already"),
        (["facebookresearch/dit", "0400000.pt", "out"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as stopped, exit_on_error("not converted"):
            main([arguments[0], *(str(folder / name) for name in arguments[1:])])
        assert message in stopped.value.code and "\n" not in stopped.value.code
        assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.{}", "diffusion_pytorch_model-00001-of-00001.{}"])
def test_safetensors_are_read_where_there_is_a_pickle_as_well(tmp_path, name):
    weights = {"weight": torch.arange(3.0)}
    save_file(weights, tmp_path / name.format("safetensors"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / name.format("bin"))
    for suffix in ("safetensors", "bin") if "of" in name else ():
        index = {"weight_map": {"weight": name.format(suffix)}}
        (tmp_path / f"diffusion_pytorch_model.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert_close(read_checkpoint(tmp_path)[0], weights)
