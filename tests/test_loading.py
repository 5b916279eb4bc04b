"""Folders that a user saves, shares and loads."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, AutoPipelineForText2Image, DiffusionPipeline
from safetensors.torch import load_file
from torch.testing import assert_close

import improved_ldm
from improved_ldm import DiTDenoiser, ImprovedLDMPipeline
from improved_ldm.models.family import DENOISERS
from improved_ldm.trainer.components import build_denoiser, load_autoencoder, load_text_encoder
from improved_ldm.trainer.config import AutoencoderConfig, RunConfig

CALLS = {"class": {"class_labels": [0, 2]}, "text": {"prompt": ["a red coat", ""]}}


def sample(pipe, call):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images


def exactly(first, second):
    assert_close(first, second, rtol=0, atol=0)


@pytest.fixture(params=["class", "text"])
def saved(request, class_pipeline, text_pipeline, tmp_path):
    """A pipeline, the folder that it is saved to, and arguments of a call."""
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
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
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
    first, second = (
        json.loads((path / "model_index.json").read_text(encoding="utf-8")) for path in (folder, tmp_path / "again")
    )
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


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.fixture
def class_folder(class_pipeline, tmp_path):
    class_pipeline().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
def test_configs_record_the_version_that_wrote_them(class_folder, file):
    config = json.loads((class_folder / file).read_text(encoding="utf-8"))
    assert config["_improved_ldm_version"] == improved_ldm.__version__


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
def test_what_a_newer_version_added_is_an_error(class_folder, file):
    edit(class_folder / file, _improved_ldm_version="99.1.0", gamma=2, foo=None)
    known = f"improved_ldm 99.1.0 and has `foo`, `gamma`, which {improved_ldm.__version__} does not know; pip install"
    with pytest.raises(ValueError, match=known):
        DiffusionPipeline.from_pretrained(class_folder)
    if file != "model_index.json":
        with pytest.raises(ValueError, match=known):
            DiTDenoiser.from_pretrained(class_folder, subfolder="transformer")


def test_a_class_that_a_newer_version_added_is_an_error(class_folder):
    entry = ["improved_ldm", "NextDenoiser"]
    edit(class_folder / "model_index.json", _improved_ldm_version="99.1.0", transformer=entry)
    with pytest.raises(ValueError, match=r"improved_ldm 99\.1\.0 and has `NextDenoiser`"):
        DiffusionPipeline.from_pretrained(class_folder)


def test_newer_configs_without_news_and_older_ones_load(class_folder):
    expected = sample(DiffusionPipeline.from_pretrained(class_folder), CALLS["class"])
    for values in ({"_improved_ldm_version": "99.1.0"}, {"_improved_ldm_version": "0.0.1", "foo": 1}):
        for file in ("model_index.json", "transformer/config.json"):
            edit(class_folder / file, **values)
        loaded = DiffusionPipeline.from_pretrained(class_folder)
        exactly(sample(loaded, CALLS["class"]), expected)
    loaded.save_pretrained(class_folder)
    config = json.loads((class_folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    assert config["_improved_ldm_version"] == improved_ldm.__version__


def test_a_config_without_a_version_loads(class_folder):
    expected = sample(DiffusionPipeline.from_pretrained(class_folder), CALLS["class"])
    for file in (class_folder / "model_index.json", class_folder / "transformer" / "config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        del config["_improved_ldm_version"]
        file.write_text(json.dumps(config), encoding="utf-8")
    exactly(sample(DiffusionPipeline.from_pretrained(class_folder), CALLS["class"]), expected)


PICKLES = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}


def add_pickle(folder, name, keep_safetensors=False):
    """Save a component's weights as a pickle, in addition to the safetensors or instead of them."""
    (weights,) = folder.glob("*.safetensors")
    torch.save(load_file(weights), folder / name)
    if not keep_safetensors:
        weights.unlink()


@pytest.fixture
def text_folder(text_pipeline, tmp_path):
    text_pipeline().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("loader", [DiffusionPipeline, ImprovedLDMPipeline])
@pytest.mark.parametrize("component", PICKLES)
def test_a_pickle_is_refused_before_it_is_read(text_folder, monkeypatch, loader, component):
    add_pickle(text_folder / component, f"{PICKLES[component]}.bin")
    read = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(args))
    with pytest.raises(
        ValueError, match=rf"{component}/{PICKLES[component]}\.bin: weights as a pickle, .* safetensors"
    ):
        loader.from_pretrained(text_folder)
    assert not read


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt", "pth", "pkl", "BIN"])
def test_every_kind_of_pickle_is_refused(class_folder, suffix):
    add_pickle(class_folder / "transformer", f"diffusion_pytorch_model.{suffix}")
    with pytest.raises(ValueError, match="weights as a pickle"):
        DiffusionPipeline.from_pretrained(class_folder)
    for loader in (AutoModel, DiTDenoiser):
        with pytest.raises(ValueError, match="weights as a pickle"):
            loader.from_pretrained(str(class_folder), subfolder="transformer")


def test_pickles_beside_their_safetensors_are_left_alone(text_folder):
    expected = sample(DiffusionPipeline.from_pretrained(text_folder), CALLS["text"])
    for component, name in PICKLES.items():
        torch.save({}, text_folder / component / f"{name}.bin")
        torch.save({}, text_folder / component / "training_args.bin")
    exactly(sample(DiffusionPipeline.from_pretrained(text_folder), CALLS["text"]), expected)


def index_of(*files):
    return json.dumps({"metadata": {}, "weight_map": {str(number): file for number, file in enumerate(files)}})


def bare(folder):
    """Remove the safetensors of one component and keep those of the others."""
    (folder / "model.safetensors").rename(folder / "other.safetensors")


def with_adapter(folder):
    """A text encoder that is only an adapter; its base is a pickle in another folder."""
    base = folder.parent.parent / "base"
    folder.rename(base)
    add_pickle(base, "pytorch_model.bin")
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def with_adapter_pickle(folder):
    add_pickle(folder, "adapter_model.bin", keep_safetensors=True)


def with_shards_alone(folder):
    """Shards without an index are not found, so that a pickle would be read."""
    add_pickle(folder, "pytorch_model.bin", keep_safetensors=True)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def with_misleading_index(folder):
    add_pickle(folder, "training_args.bin", keep_safetensors=True)
    bare(folder)
    (folder / "model.safetensors.index.json").write_text(index_of("training_args.bin"), encoding="utf-8")


def with_pickle_index(folder):
    add_pickle(folder, "training_args.bin", keep_safetensors=True)
    bare(folder)
    (folder / "pytorch_model.bin.index.json").write_text(index_of("training_args.bin"), encoding="utf-8")


def with_config_that_names_it(folder):
    add_pickle(folder, "training_args.bin", keep_safetensors=True)
    edit(folder / "config.json", transformers_weights="training_args.bin")


DETOURS = {
    with_adapter: "adapter_config.json",
    with_adapter_pickle: "adapter_model.bin",
    with_shards_alone: "pytorch_model.bin",
    with_misleading_index: "model.safetensors.index.json",
    with_pickle_index: "pytorch_model.bin.index.json",
    with_config_that_names_it: "config.json",
}


@pytest.mark.parametrize(("detour", "named"), DETOURS.items(), ids=[detour.__name__ for detour in DETOURS])
def test_no_detour_leads_to_a_pickle(text_folder, monkeypatch, detour, named):
    detour(text_folder / "text_encoder")
    read = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(args))
    with pytest.raises(ValueError, match=rf"text_encoder/{re.escape(named)}: .*not loaded"):
        DiffusionPipeline.from_pretrained(text_folder)
    assert not read


def test_an_index_of_pickles_beside_safetensors_is_left_alone(text_folder):
    expected = sample(DiffusionPipeline.from_pretrained(text_folder), CALLS["text"])
    index = text_folder / "text_encoder" / "pytorch_model.bin.index.json"
    index.write_text(index_of("pytorch_model-00001-of-00001.bin"), encoding="utf-8")
    add_pickle(index.parent, "pytorch_model-00001-of-00001.bin", keep_safetensors=True)
    exactly(sample(DiffusionPipeline.from_pretrained(text_folder), CALLS["text"]), expected)


def test_a_variant_that_is_a_pickle_is_refused(class_folder):
    add_pickle(class_folder / "vae", "diffusion_pytorch_model.ema.bin", keep_safetensors=True)
    with pytest.raises(ValueError, match=r"vae/diffusion_pytorch_model\.ema\.bin"):
        DiffusionPipeline.from_pretrained(class_folder, variant="ema")


def test_a_pickle_is_refused_where_the_denoiser_is_given(class_folder, tiny_denoiser):
    add_pickle(class_folder / "vae", "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="weights as a pickle"):
        DiffusionPipeline.from_pretrained(class_folder, transformer=tiny_denoiser(num_classes=3))


def test_pickles_cannot_be_asked_for(class_folder):
    for loader in (DiffusionPipeline, ImprovedLDMPipeline):
        with pytest.raises(ValueError, match="`use_safetensors` is False"):
            loader.from_pretrained(class_folder, use_safetensors=False)


def test_shards_and_a_stray_folder_load(class_pipeline, tmp_path):
    pipe = class_pipeline()
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    (tmp_path / "unet").mkdir()
    exactly(sample(DiffusionPipeline.from_pretrained(tmp_path), CALLS["class"]), sample(pipe, CALLS["class"]))


def test_given_components_are_taken(class_folder, autoencoder):
    loaded = DiffusionPipeline.from_pretrained(class_folder, vae=autoencoder)
    assert loaded.vae is autoencoder and isinstance(loaded.vae, AutoencoderKL)


def test_an_index_with_two_denoisers_is_refused(class_folder):
    edit(class_folder / "model_index.json", unet=["improved_ldm", "UNetDenoiser"])
    with pytest.raises(ValueError, match="both a `transformer` and a `unet`"):
        DiffusionPipeline.from_pretrained(class_folder)


@pytest.mark.parametrize("component", PICKLES)
def test_training_begins_with_safetensors_only(text_folder, autoencoder, component):
    shutil.copytree(text_folder / "tokenizer", text_folder / "text_encoder", dirs_exist_ok=True)
    load = {
        "transformer": lambda: build_denoiser(begins_with(text_folder), autoencoder, num_classes=None),
        "vae": lambda: load_autoencoder(AutoencoderConfig(pretrained=str(text_folder / "vae"))),
        "text_encoder": lambda: load_text_encoder(begins_with(text_folder).text),
    }[component]
    load()
    add_pickle(text_folder / component, f"{PICKLES[component]}.bin")
    with pytest.raises((OSError, ValueError), match="safetensors"):
        load()


def begins_with(folder):
    return RunConfig(
        transform={"resolution": 8},
        text={"pretrained": str(folder / "text_encoder"), "max_tokens": 8},
        denoiser={"pretrained": str(folder), "subfolder": "transformer"},
    )
