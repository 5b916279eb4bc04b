"""Training of adapters: complete small runs of the script on real images."""

import json
import runpy
import sys

import datasets
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.diffusion.objectives import make_objective
from improved_ldm.hub.repository import HubError
from improved_ldm.models.family import DENOISERS, denoiser_class
from improved_ldm.settings import ConfigError, parse_config
from improved_ldm.trainer.adapters import fill_from_base
from improved_ldm.trainer.config import AdapterRunConfig
from tests.conftest import ASSETS
from tests.scripts import launch, wait_for
from tests.trainer.conftest import ROOT, load_script

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of a few real captioned images."""
    folder = tmp_path_factory.mktemp("images")
    file = ASSETS / "fashion-mnist" / "train.parquet"
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(folder / "cache"))
    (folder / "set").mkdir()
    rows.select(range(64)).to_parquet(folder / "set" / "train.parquet")
    return folder / "set"


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_denoiser, clip_text):
    """Folders of pipelines with the package's autoencoder and text encoder and a random denoiser."""
    made = {}

    def make(name="dit", semantic="text", prediction="flow", learned_variance=False):
        key = f"{name}-{semantic}-{prediction}-{learned_variance}"
        if key not in made:
            reads = {"text_dim": 96} if semantic == "text" else {"num_classes": 10}
            if learned_variance:
                reads["out_channels"] = 8
            objective = make_objective(prediction, learned_variance=learned_variance)
            tokenizer, text_encoder = clip_text if semantic == "text" else (None, None)
            pipe = ImprovedLDMPipeline(
                vae=AutoencoderKL.from_pretrained(ASSETS / "autoencoder"),
                scheduler=objective.sampling_scheduler(),
                **{denoiser_class(name).component: tiny_denoiser(name, sample_size=8, **reads)},
                text_encoder=text_encoder,
                tokenizer=tokenizer,
                text_padding="zero",
                max_text_tokens=12,
                default_original_size=28,
                default_guidance_scale=2.0,
                default_num_inference_steps=2,
                class_names=None if semantic == "text" else CLASSES,
            )
            made[key] = tmp_path_factory.mktemp(key)
            pipe.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture
def arguments(images, base, tmp_path):
    """Command-line arguments of a run that takes seconds; later ones win."""

    def make(output="run", place=None, **overrides):
        values = {
            "output_dir": tmp_path / output,
            "base": place or base(),
            "data": images,
            "cache.passes": 1,
            "lora.rank": 3,
            "lora.alpha": 5,
            "training.steps": 4,
            "training.batch_size": 8,
            "training.checkpoint_every": 2,
            "training.trackers": "[]",
            "training.cpu_threads": 1,
            "evaluation.judge": "null",
        } | overrides
        return [word for key, value in values.items() for word in (f"--{key}", str(value))]

    return make


def train(arguments):
    load_script("train_lora").main(arguments)


def draw(pipe):
    semantic = {"prompt": "a photo of a bag"} if pipe.takes_text else {"class_labels": 8}
    generator = torch.Generator().manual_seed(3)
    return pipe(**semantic, generator=generator, output_type="pt").images


def averaged(checkpoint):
    """The averaged adapter of a checkpoint, with the names of a saved adapter."""
    tensors = load_file(checkpoint / "ema.safetensors")
    return {
        name.removeprefix("module.").replace(".default.", "."): value
        for name, value in tensors.items()
        if ".lora_" in name
    }


def assert_same_adapter(one, other):
    torch.testing.assert_close(load_file(one / ADAPTER), load_file(other / ADAPTER), rtol=0, atol=0)


@pytest.mark.parametrize("semantic", ["text", "classes"])
@pytest.mark.parametrize("name", DENOISERS)
def test_a_run_leaves_an_adapter_that_loads_on_its_base(arguments, base, tmp_path, name, semantic):
    place = base(name, semantic)
    train(arguments(place=place))
    folder = tmp_path / "run"
    for file in (ADAPTER, "samples.png", "metrics.json", "loss.png", "README.md", "config.yaml"):
        assert (folder / file).stat().st_size > 0, file
    assert not (folder / "model_index.json").exists()
    pipe = DiffusionPipeline.from_pretrained(place)
    plain = draw(pipe)
    pipe.load_lora_weights(folder)
    assert draw(pipe).isfinite().all()
    pipe.set_adapters(
        "default_0", 1e4
    )  # four steps change little; the change is amplified to be visible on any machine
    assert (draw(pipe) - plain).abs().max() > 1e-3
    settings = pipe.denoiser.peft_config["default_0"]
    assert (settings.r, settings.lora_alpha) == (3, 5)
    tensors = load_file(folder / ADAPTER)
    prefix = f"{pipe.denoiser.component}."
    saved = {name.removeprefix(prefix): value for name, value in tensors.items()}
    torch.testing.assert_close(saved, averaged(folder / "checkpoints" / "step-00000004"), rtol=0, atol=0)
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["parameters"] == sum(
        value.numel() for value in tensors.values()
    )
    adapted = {name.partition(".lora_")[0].rpartition("attn")[2].partition(".")[2] for name in tensors}
    assert {"to_q", "to_k", "to_v", "to_out.0"} <= adapted


def test_the_card_names_base_and_use(arguments, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)  # the card names the folders from here
    train(arguments(**{"lora.dora": True, "lora.rslora": True}))
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"| base | `{base().name}` |" in card and "base_model" not in card  # it is a folder
    assert "- lora" in card
    assert "rank-stabilised DoRA, rank 3, alpha 5" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    scope = {}
    exec(code.replace('image.save("image.png")', ""), scope)
    assert scope["image"].size == (32, 32)
    assert scope["pipe"].get_active_adapters() == ["default_0"]


@pytest.mark.parametrize(
    "options",
    [{}, {"cache.passes": 0}, {"lora.dora": True}, {"cache.passes": 0, "lora.text_encoder": True}],
    ids=["cached", "streamed", "dora", "text"],
)
def test_a_run_in_two_parts_is_the_same_run(arguments, tmp_path, options):
    train(arguments("whole", **options))
    train(arguments("parts", **options, **{"training.steps": 3}))
    train(arguments("parts", **options))
    assert_same_adapter(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(arguments, tmp_path):
    process = launch(arguments("killed", **{"training.steps": 100_000}), "train_lora")
    wait_for(tmp_path / "killed" / "checkpoints" / "step-00000004", process)
    process.kill()
    process.wait()
    reached = max(int(path.name[5:]) for path in (tmp_path / "killed" / "checkpoints").glob("step-*"))
    for name in ("killed", "whole"):
        train(arguments(name, **{"training.steps": reached + 3}))
    assert_same_adapter(tmp_path / "whole", tmp_path / "killed")


def test_checkpoints_hold_the_adapter_alone(arguments, tmp_path):
    train(arguments())
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    for name in ("model", "ema"):
        others = [key for key in load_file(checkpoint / f"{name}.safetensors") if ".lora_" not in key]
        assert all(key.endswith(("positions", "n_averaged")) for key in others), others


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_the_base_decides_what_is_predicted(arguments, base, tmp_path, prediction):
    place = base("dit", "classes", prediction)
    train(arguments(place=place))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    config = (checkpoint / "config.yaml").read_text(encoding="utf-8")
    assert f"prediction: {prediction}" in config
    assert "resolution: 32" in config
    assert "padding: zero" in config
    assert f"pretrained: {place}/vae" in config
    other = "flow" if prediction == "epsilon" else "epsilon"
    with pytest.raises(ValueError, match=rf"`objective.prediction` is '{other}'; it must be .*, as in the base"):
        train(arguments("other", place, **{"objective.prediction": other}))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.num_classes": 10}, "`data.num_classes` is 10; it must be None, as in the base"),
        (
            {"lora.targets": "[norm_cross]"},
            "'norm_cross', the name of a LayerNorm; it must be that of a Linear or Conv2d",
        ),
        ({"base": "nowhere"}, "`base` is 'nowhere', which does not load: "),
        ({"data": "nowhere.parquet"}, "nowhere.parquet"),
        ({"text.padding": "mask"}, "`text.padding` is 'mask'; it must be 'zero', as in the base"),
        ({"transform.resolution": 64}, "`transform.resolution` is 64; it must be 32, as in the base"),
        ({"lora.targets": "[to_q, to_x]"}, "`lora.targets` has 'to_x'; no layer of a DiTDenoiser has this name"),
        ({"lora.text_encoder": True}, "`cache.passes` is 1; with `lora.text_encoder` it must be 0"),
        ({"data.caption_column": "caption"}, "the set has the columns image, label, text"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_starts(arguments, tmp_path, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(arguments(**overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"denoiser.name": "dit"}, "`denoiser` is not a key"),
        ({"lora.rank": 0}, "`lora.rank` is 0: Input should be greater than or equal to 1"),
        ({"base": "null"}, "`base` is None: Input should be a valid string"),
    ],
)
def test_bad_arguments_are_named(arguments, overrides, message):
    with pytest.raises(SystemExit, match=message):
        train(arguments(**overrides))


def test_a_base_must_be_given():
    with pytest.raises(ConfigError, match="`base` is not given; give `--base`"):
        parse_config(AdapterRunConfig, ["--data", "images"])


def test_chosen_targets_alone_are_trained(arguments, tmp_path):
    train(arguments(**{"lora.targets": "[attn2.to_v]", "training.steps": 2}))
    names = {name.partition(".lora_")[0] for name in load_file(tmp_path / "run" / ADAPTER)}
    assert names == {f"transformer.transformer_blocks.{block}.attn2.to_v" for block in range(2)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.num_classes": 7}, "`data.num_classes` is 7; it must be 10, as in the base"),
        ({"sampling.prompts": "[a bag]"}, "`sampling.prompts` is given, but the base is class-conditional"),
        ({"lora.text_encoder": True}, "`lora.text_encoder` is true, but the base is class-conditional"),
    ],
)
def test_a_class_base_refuses_what_it_would_ignore(arguments, base, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(arguments(place=base("dit", "classes"), **overrides))
    assert not (tmp_path / "run").exists()


def test_an_output_folder_with_a_pipeline_is_refused(arguments, base, tmp_path):
    (tmp_path / "link").symlink_to(base())
    before = sorted(path.name for path in base().iterdir())
    with pytest.raises(ValueError, match=r"`output_dir` is '.*link', which holds a pipeline"):
        train(arguments("link"))
    assert sorted(path.name for path in base().iterdir()) == before


def test_the_script_ends_with_one_line(arguments, monkeypatch):
    script = str(ROOT / "training" / "train_lora.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments(base="nowhere")])
    with pytest.raises(SystemExit, match=r"^not trained: `base` is 'nowhere', which does not load: "):
        runpy.run_path(script, run_name="__main__")


def test_a_repository_that_cannot_be_had_is_noticed_before_the_cache_is_encoded(arguments, tmp_path):
    with pytest.raises(HubError):  # the tests are offline
        train(arguments(**{"hub.push_every": 2, "hub.repo": "user/name"}))
    assert not (tmp_path / "run" / "cache").exists()


def test_a_base_on_the_hub_is_written_as_it_is_found(base):
    pipe = ImprovedLDMPipeline.from_pretrained(base())
    config = fill_from_base(parse_config(AdapterRunConfig, ["--base", "user/base"]), pipe)
    assert (config.autoencoder.pretrained, config.autoencoder.subfolder) == ("user/base", "vae")
    assert config.text.pretrained == "user/base"


def test_a_base_that_asks_for_the_size_of_its_output_is_adapted(arguments, base, tmp_path):
    pipe = ImprovedLDMPipeline.from_pretrained(base("dit", "classes"))
    pipe.register_to_config(default_original_size=None, class_names=None)
    pipe.save_pretrained(tmp_path / "base")
    train(
        arguments(place=tmp_path / "base", **{"sampling.every": 4})
    )  # the data set names its classes, but the base does not
    assert (tmp_path / "run" / "samples" / "step-0000004.png").stat().st_size > 0
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Writes a data set with other class names, or without names; the row `at` has the label 10."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = datasets.Dataset.from_parquet(
        str(ASSETS / "fashion-mnist" / "train.parquet"), cache_dir=str(folder / "cache")
    ).select(range(300))

    def write(names=None, at=None):
        feature = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        labels = [10 if row == at else label for row, label in enumerate(rows["label"])]
        changed = rows.remove_columns("label").add_column("label", labels, feature=feature)
        changed.to_parquet(folder / "train.parquet")
        return folder / "train.parquet"

    return write


def test_classes_of_another_set_are_refused(arguments, base, labelled):
    with pytest.raises(ValueError, match="a label must mean the same in both"):
        train(arguments(place=base("dit", "classes"), data=labelled(names=sorted(CLASSES))))


@pytest.mark.parametrize("at", [5, 299])
def test_a_label_that_the_base_does_not_know_is_skipped_and_counted(arguments, base, labelled, tmp_path, at):
    train(arguments(place=base("dit", "classes"), data=labelled(at=at)))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["skipped_rows"] == {"label is not below 10": 1}


@pytest.mark.parametrize("padding", ["zero", "noisy_replicate"])
def test_the_text_encoder_is_trained_too(arguments, base, tmp_path, padding):
    place = base()
    if padding != "zero":
        pipe = ImprovedLDMPipeline.from_pretrained(place)
        pipe.register_to_config(text_padding=padding)
        place = tmp_path / "base"
        pipe.save_pretrained(place)
    train(arguments(place=place, **{"lora.text_encoder": True, "cache.passes": 0, "sampling.every": 2}))
    moved = [value for name, value in load_file(tmp_path / "run" / ADAPTER).items() if "lora_B" in name]
    assert all(value.isfinite().all() and value.abs().max() > 0 for value in moved)
    pipe = DiffusionPipeline.from_pretrained(place)
    before = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    pipe.load_lora_weights(tmp_path / "run")
    assert pipe.get_list_adapters() == {"transformer": ["default_0"], "text_encoder": ["default_0"]}
    adapted = draw(pipe)
    pipe.set_adapters("default_0", adapter_weights={"transformer": 1.0, "text_encoder": 0.0})
    assert (draw(pipe) - adapted).abs().max() > 0
    pipe.unload_lora_weights()
    torch.testing.assert_close(pipe.text_encoder.state_dict(), before, rtol=0, atol=0)


def test_samples_are_drawn_while_it_trains(arguments, tmp_path):
    train(arguments(**{"sampling.every": 2}))
    assert [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())] == [
        "step-0000002.png",
        "step-0000004.png",
    ]


def test_an_adapter_trains_the_learned_variance_of_its_base(arguments, base, tmp_path):
    place = base(prediction="epsilon", learned_variance=True)
    train(arguments(place=place))
    pipe = DiffusionPipeline.from_pretrained(place)
    before = draw(pipe)
    pipe.load_lora_weights(tmp_path / "run")
    assert draw(pipe).isfinite().all() and not torch.equal(draw(pipe), before)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert config["objective"]["learned_variance"] is True


@pytest.mark.parametrize("key", ["objective.beta_schedule=linear", "sampling.sampler=ddim"])
def test_the_schedule_of_a_base_is_not_changed(arguments, base, key):
    name, _, value = key.partition("=")
    with pytest.raises((SystemExit, ValueError), match=f"`{name}` is given, but the base's scheduler decides it"):
        train(arguments(place=base(prediction="epsilon"), **{name: value}))
