"""Folders that a user saves, sends and loads."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoModel, AutoPipelineForText2Image, DiffusionPipeline
from safetensors.torch import load_file
from torch.testing import assert_close

from improved_ldm import DiTDenoiser, ImprovedLDMPipeline
from improved_ldm.models.presets import DENOISERS

CALLS = {"class": {"class_labels": [0, 2]}, "text": {"prompt": ["a red coat", ""]}}


def sample(pipe, call):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images


def exactly(first, second):
    assert_close(first, second, rtol=0, atol=0)


@pytest.fixture(params=["class", "text"])
def saved(request, class_pipeline, text_pipeline, tmp_path):
    """A pipeline, the folder that it is saved to, and the arguments of a call."""
    pipe = class_pipeline() if request.param == "class" else text_pipeline()
    pipe.register_to_config(default_original_size=64, class_names=["boot", "coat", "bag"])
    pipe.save_pretrained(tmp_path / "saved")
    return pipe, tmp_path / "saved", CALLS[request.param]


@pytest.mark.parametrize("loader", [DiffusionPipeline, AutoPipelineForText2Image, ImprovedLDMPipeline])
def test_a_saved_pipeline_loads_and_samples_bit_for_bit(saved, loader):
    pipe, folder, call = saved
    loaded = loader.from_pretrained(folder)
    assert type(loaded) is ImprovedLDMPipeline
    exactly(sample(loaded, call), sample(pipe, call))
    assert loaded.config.class_names == ["boot", "coat", "bag"]
    assert loaded.config.default_original_size == 64


@pytest.mark.parametrize("conditioning", ["disentangled", "published"])
@pytest.mark.parametrize("name", DENOISERS)
def test_every_backbone_loads_and_samples_bit_for_bit(text_pipeline, tmp_path, name, conditioning):
    dims = dict.fromkeys(DENOISERS[name].text_arguments(conditioning), 96)
    pipe = text_pipeline(name=name, conditioning=conditioning, **dims)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    used, unused = ("unet", "transformer") if name == "unet" else ("transformer", "unet")
    assert index[used] == ["improved_ldm", DENOISERS[name].__name__]
    assert index[unused] == [None, None] and not (tmp_path / unused).exists()
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.denoiser) is DENOISERS[name]
    exactly(loaded.denoiser.state_dict(), pipe.denoiser.state_dict())
    exactly(sample(loaded, CALLS["text"]), sample(pipe, CALLS["text"]))
    alone = AutoModel.from_pretrained(str(tmp_path), subfolder=used)
    exactly(alone.state_dict(), pipe.denoiser.state_dict())


def test_saving_again_writes_the_same_index(saved, tmp_path):
    _, folder, _ = saved
    DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    first, second = (json.loads((path / "model_index.json").read_text()) for path in (folder, tmp_path / "again"))
    second.pop("_name_or_path", None)
    assert first == second
    assert first["transformer"] == ["improved_ldm", "DiTDenoiser"]
    assert first["_class_name"] == "ImprovedLDMPipeline"


def test_no_pickle_is_written(saved):
    _, folder, _ = saved
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".jinja"}
    assert ".safetensors" in suffixes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_loads_in_half_precision(saved, dtype):
    pipe, folder, call = saved
    loaded = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    half, single = sample(loaded, call), sample(pipe, call)
    assert loaded.denoiser.dtype == loaded.vae.dtype == half.dtype == dtype
    assert half.isfinite().all()
    images = loaded(**call, output_type="np").images
    assert images.shape == (2, 8, 8, 3) and images.max() <= 1
    assert single.dtype == torch.float32


def test_the_denoiser_alone_loads(saved):
    pipe, folder, _ = saved
    loaded = AutoModel.from_pretrained(str(folder), subfolder="transformer")
    assert type(loaded) is DiTDenoiser
    exactly(loaded.state_dict(), pipe.denoiser.state_dict())


def test_components_make_another_pipeline(saved):
    pipe, _, call = saved
    exactly(sample(ImprovedLDMPipeline(**pipe.components, **call_defaults(pipe)), call), sample(pipe, call))


def call_defaults(pipe):
    names = ("text_noise_scale", "max_text_tokens", "default_original_size")
    names += ("default_guidance_scale", "default_num_inference_steps")
    return {name: pipe.config[name] for name in names}


def test_a_fresh_process_needs_the_import_only(text_pipeline, tmp_path):
    pipe, folder, call = text_pipeline(), tmp_path / "saved", CALLS["text"]
    pipe.save_pretrained(folder)
    program = """
import json, sys
import improved_ldm
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
images = pipe(**json.loads(sys.argv[2]), generator=torch.Generator().manual_seed(0), output_type="latent").images
save_file({"images": images}, sys.argv[3])
"""
    out = tmp_path / "images.safetensors"
    subprocess.run([sys.executable, "-c", program, folder, json.dumps(call), out], check=True, capture_output=True)
    exactly(load_file(out)["images"], sample(pipe, call))
