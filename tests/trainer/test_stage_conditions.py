"""Runs whose stages have other data and other kinds of condition."""

import contextlib
import copy
import io
import json
import signal
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from improved_ldm.models.family import DENOISERS
from improved_ldm.places import resolve
from improved_ldm.settings import parse_config
from improved_ldm.trainer import denoiser_task, train_stages
from improved_ldm.trainer.checkpoints import checkpoint_path, read_weights
from improved_ldm.trainer.config import RunConfig
from improved_ldm.trainer.stages import list_stages
from improved_ldm.transfer import change_conditions
from tests.scripts import launch, wait_for
from tests.trainer.conftest import NUM_IMAGES, ROOT, load_script, make_arguments
from tests.trainer.test_runs import assert_same_weights

CONFIGS = ROOT / "training" / "configs"
CLASSES_THEN_TEXT = "[{resolution: 32, steps: 3}, {resolution: 32, steps: 3, condition: text, max_tokens: 16}]"
TEXT_THEN_CLASSES = "[{resolution: 32, steps: 3}, {resolution: 32, steps: 3, condition: class}]"
FEWER = ["Sneaker", "Bag", "Coat"]


def record_of(folder):
    (record,) = DiffusionPipeline.from_pretrained(folder).config.lineage
    return record


def run_and_watch(script, argv):
    """What each stage of a run starts from, and what is printed."""
    starts, printed, train = [], io.StringIO(), train_stages.train

    def watched(run, start, *rest):
        starts.append(copy.deepcopy(start))
        return train(run, start, *rest)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train_stages, "train", watched)
        load_script(script).main(argv)
    return starts, printed.getvalue()


@pytest.fixture(scope="module")
def fewer(tmp_path_factory):
    """A parquet file with the images of three of the classes, in another order."""
    folder = tmp_path_factory.mktemp("fewer")
    embedded = ROOT / "improved_ldm" / "assets" / "fashion-mnist" / "train.parquet"
    rows = datasets.Dataset.from_parquet(str(embedded), cache_dir=str(folder / "cache")).select(range(3 * NUM_IMAGES))
    names = rows.features["label"].names
    rows = rows.filter(lambda row: names[row["label"]] in FEWER)
    renamed = rows.features | {"label": datasets.ClassLabel(names=FEWER)}
    rows = rows.map(lambda row: {"label": FEWER.index(names[row["label"]])}, features=datasets.Features(renamed))
    rows.to_parquet(folder / "fewer.parquet")
    rows.remove_columns("text").to_parquet(folder / "no_captions.parquet")
    rows.remove_columns("label").to_parquet(folder / "no_labels.parquet")
    plain = datasets.Features(rows.features | {"label": datasets.Value("int64")})
    rows.cast(plain).to_parquet(folder / "unnamed.parquet")
    return folder


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run from classes to text: its folder, what its stages start from, and what it prints."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = make_arguments(images, folder / "run", **{"stages": CLASSES_THEN_TEXT, "denoiser.name": "pixart"})
    starts, printed = run_and_watch("train_class_conditional", arguments)
    return SimpleNamespace(folder=folder / "run", starts=starts, printed=printed)


def test_each_stage_leaves_a_pipeline_of_its_own_kind(whole):
    first, second = (DiffusionPipeline.from_pretrained(path) for path in (whole.folder / "stage-1-32", whole.folder))
    assert (first.takes_text, second.takes_text) == (False, True)
    assert len(first.config.class_names) == 10 and second.config.class_names is None
    assert first.tokenizer is None and second.config.max_text_tokens == 16
    for pipeline, call in ((first, {"class_labels": "Bag"}), (second, {"prompt": "a photo of a bag"})):
        assert pipeline(**call, num_inference_steps=2, output_type="np").images[0].shape == (32, 32, 3)
    cards = [(path / "README.md").read_text(encoding="utf-8") for path in (whole.folder / "stage-1-32", whole.folder)]
    assert "the class says what" in cards[0] and "text encoder" not in cards[0]
    assert "the prompt says what" in cards[1] and "| text encoder | `embedded:clip`, 16 tokens" in cards[1]
    metrics = json.loads((whole.folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["images_seen"] == 2 * 3 * 8


def test_what_is_kept_and_what_begins_anew_is_listed_once(whole):
    record, printed = record_of(whole.folder), whole.printed.splitlines()
    card = (whole.folder / "README.md").read_text(encoding="utf-8")
    assert record["conditions"] == ["10 classes", "text of embedded:clip"]
    lines = [
        "conditions: 10 classes to text of embedded:clip",
        f"kept parameters: {sum(record['parameters']['kept'].values()):,} (",
        f"moments of the optimizer: kept for {record['moments']['kept']:,} parameters, new for",
        f"averages of the weights: kept for {record['averages']['kept']:,} parameters, new for",
    ]
    for line in lines:
        assert sum(text.startswith(line) for text in printed) == 1, line
        assert card.count(line) == 1, line

    before, after = (DiffusionPipeline.from_pretrained(path) for path in (whole.folder / "stage-1-32", whole.folder))
    old, new = (dict(pipeline.denoiser.named_parameters()) for pipeline in (before, after))
    total = sum(value.numel() for value in new.values())
    parts = {part: sum(groups.values()) for part, groups in record["parameters"].items()}
    assert parts["kept"] + parts["changed"] + parts["new"] == total
    assert parts["dropped"] == sum(value.numel() for name, value in old.items() if name not in new)
    assert set(record["parameters"]["new"]) == {"trunk.text_projection", "trunk.null_text"}
    assert set(record["parameters"]["dropped"]) == {"trunk.class_tokens"}
    start = whole.starts[1].model.state_dict()
    fresh = {name for name in new if name not in old}
    zero = {name: start[name].numel() for name in fresh if not start[name].any()}
    assert parts["new"] == sum(new[name].numel() for name in fresh) and parts["zero"] == sum(zero.values()) > 0
    assert record["moments"] == {"kept": parts["kept"], "new": total - parts["kept"]}
    assert record["averages"] == {"kept": total - parts["new"], "new": parts["new"]}


def test_a_stage_starts_with_the_prediction_of_change_conditions(whole):
    low = DiffusionPipeline.from_pretrained(whole.folder / "stage-1-32").denoiser
    end = checkpoint_path(whole.folder / "stage-1-32" / "checkpoints", 3)
    low.load_state_dict(read_weights(end / "model.safetensors"))
    expected, changes = change_conditions(low, text_dim=96)
    begun = whole.starts[1].model
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 96, generator=generator)
    with torch.no_grad():
        for call in ({}, {"encoder_hidden_states": text}):
            predictions = [model(latents, torch.tensor([50, 800]), **call).sample for model in (begun, expected)]
            torch.testing.assert_close(*predictions, rtol=1e-5, atol=1e-6)
            assert predictions[0].any()
    assert all(torch.equal(begun.state_dict()[name], expected.state_dict()[name]) for name in changes.kept)


def test_moments_and_averages_follow_their_weights(whole):
    end = checkpoint_path(whole.folder / "stage-1-32" / "checkpoints", 3)
    state = torch.load(end / "optimizer.bin", weights_only=True)["state"]
    low = DiffusionPipeline.from_pretrained(whole.folder / "stage-1-32").denoiser
    names = [name for name, _ in DiffusionPipeline.from_pretrained(whole.folder).denoiser.named_parameters()]
    old = {name: state[place] for place, (name, _) in enumerate(low.named_parameters())}
    start = whole.starts[1]
    moments = {names[place]: values for place, values in start.optimizer_state["state"].items()}
    assert moments and moments.keys() == old.keys() & set(names)
    assert all(torch.equal(values["exp_avg"], old[name]["exp_avg"]) for name, values in moments.items())
    weights = start.model.state_dict()
    averages, average = read_weights(end / "ema.safetensors"), start.averaged.state_dict()
    assert all(torch.equal(average[name], averages[name]) for name in moments)
    fresh = set(names) - moments.keys()
    assert fresh and all(torch.equal(average[name], weights[name]) for name in fresh if "linear_2" not in name)


@pytest.mark.parametrize("stop_at", [2, 5], ids=["first", "second"])
def test_a_run_that_is_stopped_inside_a_stage_goes_on_to_the_same_weights(
    whole, arguments, tmp_path, monkeypatch, stop_at
):
    script, plain, calls = load_script("train_class_conditional"), denoiser_task.batch_loss, Counter()
    argv = arguments("broken", **{"stages": CLASSES_THEN_TEXT, "denoiser.name": "pixart"})

    def interrupted(*rest):
        calls["all"] += 1
        if calls["all"] == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return plain(*rest)

    monkeypatch.setattr(denoiser_task, "batch_loss", interrupted)
    with pytest.raises(SystemExit):
        script.main(argv)
    monkeypatch.setattr(denoiser_task, "batch_loss", plain)
    script.main(argv)
    for part in ("", "stage-1-32"):
        assert_same_weights(tmp_path / "broken" / part, whole.folder / part)
    assert record_of(tmp_path / "broken") == record_of(whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", [0, 1], ids=["first", "second"])
def test_a_run_that_is_killed_inside_a_stage_goes_on_to_the_same_weights(arguments, tmp_path, killed_in):
    folder = tmp_path / "killed" / ("" if killed_in else "stage-1-32") / "checkpoints"

    def argv(name, steps):
        stages = CLASSES_THEN_TEXT.split("}, {")
        stages[killed_in] = stages[killed_in].replace("steps: 3", f"steps: {steps}")
        return arguments(name, **{"stages": "}, {".join(stages), "denoiser.name": "pixart"})

    process = launch(argv("killed", 100_000), "train_class_conditional")
    wait_for(folder / "step-00000004", process)
    process.kill()
    process.wait()
    steps = 3 + max(int(path.name[5:]) for path in folder.glob("step-*"))
    for name in ("killed", "whole"):
        load_script("train_class_conditional").main(argv(name, steps))
    for part in ("", "stage-1-32"):
        assert_same_weights(tmp_path / "whole" / part, tmp_path / "killed" / part)
    assert record_of(tmp_path / "killed") == record_of(tmp_path / "whole")


def test_text_gives_way_to_classes_in_the_published_mode(arguments, tmp_path):
    settings = {"stages": TEXT_THEN_CLASSES, "denoiser.conditioning": "published"}
    load_script("train_t2i").main(arguments(**settings))
    first, second = (DiffusionPipeline.from_pretrained(tmp_path / "run" / part) for part in ("stage-1-32", ""))
    assert (first.takes_text, second.takes_text) == (True, False)
    assert second.config.class_names is not None and second.tokenizer is None
    assert second.config.lineage[0]["conditions"] == ["text of embedded:clip", "10 classes"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disentangled", "published"])
@pytest.mark.parametrize("name", DENOISERS)
def test_every_denoiser_goes_from_classes_to_text(arguments, tmp_path, name, mode):
    settings = {
        "stages": CLASSES_THEN_TEXT.replace("steps: 3", "steps: 2"),
        "denoiser.name": name,
        "denoiser.conditioning": mode,
    }
    (_, start), _ = run_and_watch("train_class_conditional", arguments(**settings))
    assert start.optimizer_state["state"] and start.changes["moments"]["kept"] > start.changes["moments"]["new"]
    assert DiffusionPipeline.from_pretrained(tmp_path / "run").takes_text


def test_another_text_encoder_takes_over(arguments, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:clip"))
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        eos_token_id=tokenizer.eos_token_id,
    )
    for part in (tokenizer, CLIPTextModel(config)):
        part.save_pretrained(tmp_path / "encoder")
    stages = f"[{{resolution: 32, steps: 2}}, {{resolution: 32, steps: 2, text_encoder: {tmp_path / 'encoder'}}}]"
    load_script("train_t2i").main(arguments(stages=stages))
    first, second = (DiffusionPipeline.from_pretrained(tmp_path / "run" / part) for part in ("stage-1-32", ""))
    assert [pipeline.text_encoder.config.hidden_size for pipeline in (first, second)] == [96, 32]
    (record,) = second.config.lineage
    assert record["conditions"] == ["text of embedded:clip", "text of .../encoder"]
    assert record["parameters"]["new"].keys() == {"trunk.text_projection", "trunk.null_text"}
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_classes_of_another_set_are_matched_by_name(arguments, tmp_path, fewer):
    stages = f"[{{resolution: 32, steps: 2}}, {{resolution: 32, steps: 2, source: {fewer / 'fewer.parquet'}}}]"
    (first, second), printed = run_and_watch("train_class_conditional", arguments(stages=stages))
    assert not first.changes
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.config.class_names == FEWER
    (record,) = pipeline.config.lineage
    assert record["data"] == [".../train.parquet", ".../fewer.parquet"]
    assert record["classes"] == {"matched": 3, "new": 0, "dropped": 7}
    assert record["parameters"]["changed"].keys() == {"trunk.class_tokens"} and not record["parameters"]["new"]
    end = checkpoint_path(tmp_path / "run" / "stage-1-32" / "checkpoints", 2)
    rows = read_weights(end / "model.safetensors")["trunk.class_tokens.weight"]
    names = DiffusionPipeline.from_pretrained(tmp_path / "run" / "stage-1-32").config.class_names
    kept = torch.tensor([*map(names.index, FEWER), 10])  # the last row is the null
    assert torch.equal(second.model.state_dict()["trunk.class_tokens.weight"], rows[kept])
    assert "classes: 3 matched, 0 new, 7 dropped" in printed


def test_the_kind_of_a_stage_is_its_own_or_that_of_the_stage_before():
    stages = "{resolution: 32, steps: 1}"
    config = parse_config(RunConfig, ["--stages", f"[{stages}, {stages[:-1]}, condition: text}}, {stages}]"])
    assert [stage.condition for stage in list_stages(config, "class")] == ["class", "text", "text"]
    origins = [stage.config.after.condition for stage in list_stages(config, "class")[1:]]
    assert origins == [("class", "text"), None]
    for name in ("imagenet_to_cc12m", "imagenet22k_256_512"):
        config = parse_config(RunConfig, ["--config", str(CONFIGS / f"{name}.yaml")])
        kinds = [stage.condition for stage in list_stages(config, "class")]
        assert kinds == [stage.condition for stage in list_stages(config, "text")]
        assert kinds[0] == "class" and ("text" in kinds) == (name == "imagenet_to_cc12m")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("source: no_captions.parquet, condition: text, max_tokens: 16", "stage 2 of 2: `data.caption_column`"),
        ("source: no_labels.parquet", "stage 2 of 2: `data.label_column` is 'label'"),
        ("caption_column: words, condition: text, max_tokens: 16", "`data.caption_column` is 'words'"),
        ("source: unnamed.parquet", "stage 2 of 2: column 'label' does not name its classes"),
        ("source: unnamed.parquet, num_classes: 10", "only one of them names its classes"),
        ("condition: text, max_tokens: 77", "`text.max_tokens` is 77; embedded:clip has 16 positions"),
        ("condition: text, max_tokens: 16, text_encoder: nowhere", "`text.pretrained` is 'nowhere'"),
        ("condition: text, num_classes: 3", "stage 2 of 2: `num_classes` would be ignored"),
        ("caption_column: text", "stage 2 of 2: `caption_column` would be ignored, because its condition is 'cla"),
    ],
)
def test_stages_that_cannot_begin_are_errors_before_the_first_does(arguments, tmp_path, fewer, second, message):
    second = second.replace("source: ", f"source: {fewer}/")
    stages = f"[{{resolution: 32, steps: 2}}, {{resolution: 32, steps: 2, {second}}}]"
    with pytest.raises(ValueError, match=message):
        load_script("train_class_conditional").main(arguments(stages=stages))
    assert not list((tmp_path / "run").rglob("checkpoints"))


def test_a_stage_that_began_from_another_kind_is_not_gone_on_with(whole, images):
    argv = make_arguments(images, whole.folder, **{"stages": CLASSES_THEN_TEXT, "denoiser.name": "pixart"})
    argv += ["--stages", CLASSES_THEN_TEXT.replace(", condition: text, max_tokens: 16", "")]
    with pytest.raises(ValueError, match=r"`after.condition` was \['class', 'text'\] and is None"):
        load_script("train_class_conditional").main(argv)
