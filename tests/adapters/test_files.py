"""Places that adapters are read from and written to: folders, files and ids, including damaged ones."""

import json
import subprocess
import sys

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.models.adapters import attention_projections
from tests.adapters.test_checks import assert_as_before, state_of
from tests.test_lora import FILE, adapt, assert_drawn_alike, assert_same, draw


@pytest.fixture
def folder(class_pipeline, tmp_path):
    """The folder of an adapter."""
    pipe = class_pipeline()
    adapt(pipe.denoiser, init_lora_weights=False)
    pipe.save_lora_weights(tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_refused(pipe, error, match, *source, **arguments):
    before = state_of(pipe)
    with pytest.raises(error, match=match) as caught:
        pipe.load_lora_weights(*source, **arguments)
    assert "\n" not in str(caught.value)
    assert_as_before(pipe, before)


@pytest.mark.parametrize(
    "source", ["nowhere", "someone/nothing", "./no/such/folder", "/no/such/file.safetensors", "a b"]
)
@pytest.mark.parametrize("weight_name", [None, FILE])
def test_a_place_that_is_not_there(class_pipeline, source, weight_name):
    assert_refused(
        class_pipeline(), OSError, f"^'{source}' is no local folder or file", source, weight_name=weight_name
    )


def test_folders_without_the_file(class_pipeline, folder, tmp_path):
    pipe = class_pipeline()
    assert_refused(pipe, ValueError, "no .safetensors file to load an adapter from; it holds adapter", tmp_path)
    assert_refused(
        pipe, OSError, f"has no 'other.safetensors'; it holds {FILE}", folder, weight_name="other.safetensors"
    )
    assert_refused(pipe, OSError, "is no folder; `subfolder` must be one in", tmp_path, subfolder="other")
    assert_refused(pipe, TypeError, "`proxies` is no argument here", tmp_path, proxies={})
    pipe.load_lora_weights(tmp_path, subfolder="adapter")


def test_several_files_are_listed(class_pipeline, folder):
    save_file(load_file(folder / FILE), folder / "other.safetensors")
    save_file(load_file(folder / FILE), folder / "optimizer.safetensors")  # as saved by trainers
    pipe = class_pipeline()
    message = rf"holds 2 files of weights, other\.safetensors, {FILE}; give one as `weight_name`"
    assert_refused(pipe, ValueError, message, folder)
    pipe.load_lora_weights(folder, weight_name="other.safetensors")


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(file):
    file.write_bytes(file.read_bytes()[:50])


def settings(text):
    def write(file):
        save_file(load_file(file), file, metadata={"lora_adapter_metadata": text})

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "cannot be read"),
        (cut_header, "cannot be read"),
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (lambda file: file.write_bytes(b"PK" * 500), "cannot be read"),
        (lambda file: save_file({}, file), "0 of its 0 keys"),
        (settings("{"), "its `lora_adapter_metadata` is no JSON"),
        (settings("[1]"), "its `lora_adapter_metadata` is no dict"),
        (settings("3"), "its `lora_adapter_metadata` is no dict"),
        (settings('{"r": 4}'), "it has no settings for the transformer"),
    ],
    ids=["cut", "cut-header", "nothing", "other", "no-tensors", "no-json", "list", "number", "no-component"],
)
def test_damaged_files_are_refused(class_pipeline, folder, damage, message):
    damage(folder / FILE)
    assert_refused(class_pipeline(), ValueError, message, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "adapter_config.json with its settings must be next to it"),
        ("{", r"adapter_config\.json' cannot be read"),
        ("[]", r"adapter_config\.json' cannot be read"),
        (json.dumps({"peft_type": "LOHA", "target_modules": ["to_q"]}), "of the kind 'LOHA'"),
        (json.dumps({"peft_type": "NONE"}), r"adapter_config\.json' cannot be read"),
    ],
    ids=["missing", "no-json", "list", "kind", "unknown-kind"],
)
def test_damaged_settings_of_peft_are_refused(class_pipeline, tmp_path, text, message):
    denoiser = class_pipeline().denoiser
    get_peft_model(denoiser, LoraConfig(target_modules=attention_projections(denoiser))).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.unlink()
    if text is not None:
        config.write_text(text, encoding="utf-8")
    assert_refused(class_pipeline(), ValueError, message, tmp_path)


def test_a_dict_of_other_values_is_refused(class_pipeline):
    assert_refused(class_pipeline(), ValueError, "values that are not tensors", {"transformer.x.lora_A.weight": [1.0]})


def test_loaded_adapters_are_saved_by_name(class_pipeline, folder, tmp_path):
    pipe, fresh = class_pipeline(), class_pipeline()
    pipe.load_lora_weights(folder, adapter_name="one")
    pipe.save_lora_weights(tmp_path / "again")
    fresh.load_lora_weights(tmp_path / "again")
    assert_drawn_alike(draw(fresh), draw(pipe))
    pipe.load_lora_weights(folder, adapter_name="two")
    with pytest.raises(ValueError, match="'one', 'two' are loaded; give the one to save as `adapter_name`"):
        pipe.save_lora_weights(tmp_path / "new")
    with pytest.raises(ValueError, match="`adapter_names` has 'three'; loaded adapters: 'one', 'two'"):
        pipe.save_lora_weights(tmp_path / "new", adapter_name="three")
    with pytest.raises(ValueError, match="`adapter_name` is 'one' and layers are given"):
        pipe.save_lora_weights(tmp_path / "new", adapter_name="one", **pipe.lora_layers("two"))
    for name in ("x.bin", "a/b.safetensors"):
        with pytest.raises(ValueError, match=r"`weight_name` is .* ends in \.safetensors"):
            pipe.save_lora_weights(tmp_path / "new", adapter_name="one", weight_name=name)
    assert not (tmp_path / "new").exists()
    pipe.save_lora_weights(tmp_path / "new", adapter_name="one", weight_name="mine.safetensors")
    assert_same(load_file(tmp_path / "new" / "mine.safetensors"), load_file(folder / FILE))
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="no layers are given and no adapter is loaded"):
        pipe.save_lora_weights(tmp_path / "none")
    with pytest.raises(OSError, match="adapter"):
        ImprovedLDMPipeline.save_lora_weights(folder / FILE, **fresh.lora_layers("default_0"))


@pytest.mark.slow
def test_the_package_needs_no_pipeline_of_another_model():
    """diffusers can add or remove the mixins of its own pipelines."""
    program = (
        "import diffusers.loaders.lora_pipeline as module\n"
        "from diffusers.pipelines import auto_pipeline\n"
        "del module.CogVideoXLoraLoaderMixin, module.LoraBaseMixin._save_lora_weights\n"
        "from improved_ldm.lora import LoraLoaderMixin\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
