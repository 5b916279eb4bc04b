import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.networks import MissingWeightsError
from improved_ldm.evaluation.request import EvaluateConfig
from improved_ldm.hub.card import write_card
from improved_ldm.picture_text import read_png_text
from improved_ldm.settings import ConfigError, parse_config
from improved_ldm.trainer.config import RunConfig
from tests import scripts
from tests.scripts import ScriptProcess
from training import evaluate

ROOT = Path(__file__).parents[2]
FEW = {
    "data": "embedded:fashion-mnist",
    "features": "embedded:judge",
    "num_reference_images": 40,
    "batch_size": 4,
    "scores": "{kid_subset_size: 8, kid_subsets: 5, inception_splits: 2, nearest_k: 3}",
    "cpu_threads": 1,
}
SWEPT = FEW | {"num_samples": 10}
DRAWN = SWEPT | {"obedience.judge": "null"}


@pytest.fixture
def classes(class_pipeline, tmp_path) -> Path:
    """The folder of a pipeline with 10 classes and 32 x 32 images."""
    class_pipeline(sample_size=16, num_classes=10).save_pretrained(tmp_path / "classes")
    return tmp_path / "classes"


@pytest.fixture
def texts(text_pipeline, tmp_path) -> Path:
    """The folder of a text pipeline with 32 x 32 images."""
    text_pipeline(sample_size=16, text_dim=96).save_pretrained(tmp_path / "texts")
    return tmp_path / "texts"


@pytest.fixture
def clip(clip_text, tmp_path) -> Path:
    """The folder of a tiny CLIP with random weights."""
    text = clip_text[1].config.to_dict() | {"num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 16})
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    clip_text[0].save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def arguments(output: Path, values: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in ({"output_dir": output} | values).items()]


def run(output: Path, values: dict) -> dict:
    evaluate.main(parse_config(EvaluateConfig, arguments(output, values)))
    name = "sweep.json" if "sweep" in values else "metrics.json"
    return json.loads((output / name).read_text(encoding="utf-8"))


def launch(output: Path, values: dict, processes: int = 1) -> ScriptProcess:
    return scripts.launch(arguments(output, values), "evaluate", processes)


def images(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "samples").glob("*.png")}


def test_a_number_states_what_it_depends_on(classes, tmp_path):
    values = DRAWN | {"pipeline": classes, "seed": 5, "control": "{flip: true}", "labels": "drawn"}
    metrics = run(tmp_path / "out", values)
    assert metrics["scores"]["fid"] > 0
    assert metrics["scores"].keys() >= {"kid", "inception_score", "precision", "recall", "density", "coverage"}
    samples = metrics["samples"]
    assert samples["images"] == 10
    made = read_png_text(tmp_path / "out" / "samples" / "000003.png")
    assert (json.loads(made["seed"]), json.loads(made["control"])) == (8, {"flip": True})
    assert json.loads(made["class_labels"]) in range(10) and "DiTDenoiser, sha256 " in made["model"]
    assert (samples["labels"], samples["seeds"], samples["control"]) == ("drawn", [5, 14], {"flip": True})
    assert (samples["num_inference_steps"], samples["guidance_scale"]) == (2, 2.0)
    assert (samples["control_guidance_scale"], samples["dtype"], samples["batch_size"]) == (1.0, "float32", 4)
    assert samples["sampler"] == "DDIMScheduler"
    reference = metrics["reference"]
    assert (reference["source"], reference["split"], reference["images"]) == ("embedded:fashion-mnist", "test", 40)
    assert len(reference["sha256"]) == len(metrics["features"]["sha256"]) == 64
    assert metrics["features"]["name"] == "embedded:judge"
    assert metrics["clip"] is None
    assert metrics["libraries"].keys() >= {"torch", "diffusers", "torchmetrics", "torch-fidelity", "improved_ldm"}
    assert metrics["device"].endswith(", 1 threads")
    assert metrics["processes"] == 1
    assert metrics["seconds"].keys() == {"sampling", "scoring"}
    lines = [
        json.loads(line)
        for line in (tmp_path / "out" / "samples" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert lines[3].keys() == {"file_name", "label", "seed", "flip"}


@pytest.mark.slow
def test_control_is_judged_where_the_judge_knows_the_data(trained, tmp_path):
    few = {"obedience.num_samples": 10, "obedience.num_coverage_samples": 8, "obedience.num_detail_samples": 5}
    call = {"num_inference_steps": 1, "control_guidance_scale": 1.5, "control": "{flip: true}"}
    metrics = run(tmp_path / "out", FEW | {"num_samples": 10, "pipeline": trained, **call, **few})
    assert metrics["judged_samples"] == {
        "num_inference_steps": 1,
        "guidance_scale": 2.0,
        "control_guidance_scale": 1.5,
        "seed": 0,
        "control": "set by each test; that of `samples` is not used",
    }
    assert metrics["obedience"]["real_class_accuracy"] > 0.85
    assert metrics["obedience"]["num_samples"] == 10
    assert metrics["disentanglement"]["flip_distance"] >= 0
    assert metrics["perceptual"]["name"] == "embedded:judge"
    assert metrics["samples"]["labels"] == "captions in turn"
    card = ModelCard.load(trained / "README.md")
    accuracy = metrics["obedience"]["class_accuracy"]
    assert (
        f"| class accuracy | {accuracy:.3f}, not meaningful: measured on 10 images, needs at least 50 |" in card.text
    )
    assert "| flip distance |" not in card.text and "flip distance; the class accuracy is" in card.text
    assert {"fid", "coverage", "class_accuracy", "flip_distance"} <= metrics["notes"].keys()
    assert not card.data.eval_results


@pytest.mark.slow
def test_a_killed_run_draws_what_is_missing(classes, tmp_path):
    many = DRAWN | {"pipeline": classes, "num_samples": 24, "num_inference_steps": 300}
    process = launch(tmp_path / "killed", many)
    scripts.wait_for(tmp_path / "killed" / "samples" / "000003.png", process)
    process.kill()
    process.wait()
    there = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed" / "samples").glob("*.png")}
    assert 4 <= len(there) < 24
    assert not (tmp_path / "killed" / "metrics.json").exists()
    resumed, whole = run(tmp_path / "killed", many), run(tmp_path / "whole", many)
    assert images(tmp_path / "killed") == images(tmp_path / "whole")
    assert all((tmp_path / "killed" / "samples" / name).stat().st_mtime_ns == then for name, then in there.items())
    assert resumed["scores"] == whole["scores"]


@pytest.mark.slow
def test_two_processes_give_the_same_images_and_numbers(texts, clip, tmp_path):
    """This is the slowest test of the file: two processes start on one core."""
    values = DRAWN | {"pipeline": texts, "clip": clip}
    process = launch(tmp_path / "two", values, processes=2)
    one = run(tmp_path / "one", values)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    two = json.loads((tmp_path / "two" / "metrics.json").read_text(encoding="utf-8"))
    assert images(tmp_path / "two") == images(tmp_path / "one")
    assert two["scores"] == one["scores"]
    assert two["reference"] == one["reference"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert 0 <= one["scores"]["clip_score"] <= 100


def test_a_folder_of_images_is_scored_without_a_pipeline(texts, clip, tmp_path):
    drawn = run(tmp_path / "drawn", DRAWN | {"pipeline": texts, "clip": clip})
    folder = tmp_path / "drawn" / "samples"
    scored = run(tmp_path / "scored", FEW | {"samples": folder, "clip": clip})
    assert scored["scores"] == drawn["scores"]
    assert scored["reference"] == drawn["reference"]
    assert scored["samples"] == {"images": 10, "folder": f".../{folder.name}"}


def test_a_sweep_writes_a_table_and_a_picture(classes, tmp_path):
    values = SWEPT | {"pipeline": classes, "sweep": "guidance_scale=1:3:1 control_guidance_scale=0:1:1"}
    sweep = run(tmp_path / "out", values)
    asked = [(point["guidance_scale"], point["control_guidance_scale"]) for point in sweep["points"]]
    assert asked == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert len({point["scores"]["fid"] for point in sweep["points"]}) == 6
    assert sweep["reference"]["images"] == 40
    with Image.open(tmp_path / "out" / "sweep.png") as image:
        assert min(image.size) > 300
    alone = run(tmp_path / "alone", DRAWN | {"pipeline": classes, "guidance_scale": 3.0})
    assert alone["scores"] == sweep["points"][-1]["scores"]
    folder = tmp_path / "out" / "sweep" / "guidance_scale_3-control_guidance_scale_1" / "samples"
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    assert run(tmp_path / "out", values)["points"][-1]["scores"] == sweep["points"][-1]["scores"]
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")} == times


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": None}, "give either `pipeline`, .*; neither was given"),
        ({"samples": "."}, "both was given"),
        ({"pipeline": "tests"}, "the folder holds no pipeline"),
        ({"split": "val"}, "`split` is 'val'; .* has train, test"),
        ({"num_samples": 7}, "there are 7 samples; `kid_subset_size` 8 needs at least 8"),
        ({"num_reference_images": 3}, "there are 3 reference images"),
        ({"reference_hash": "0ab"}, "`reference_hash` is for the reference set 0ab, but this set has the hash"),
        ({"clip": "embedded:clip"}, "`clip` is embedded:clip; .* the pipeline is class-conditional"),
        ({"control": "{zoom: [1, 1]}"}, "`control` has zoom"),
        ({"sweep": "guidance_scale=1:3"}, "`sweep` has 'guidance_scale=1:3'"),
        ({"sweep": "guidance_scale=1:3:1", "guidance_scale": 2}, "`guidance_scale` is given, but `sweep` varies it"),
        ({"features": "embedded:nothing"}, "'embedded:nothing' does not exist"),
        ({"num_inference_steps": 2000}, "`num_inference_steps` is 2000; DDIMScheduler refuses it"),
        ({"sweep": "guidance_scale=1:2:1"}, "`obedience` is given, but a `sweep` is neither judged"),
        ({"caption_column": "text"}, "`caption_column` is given, but the pipeline is class-conditional"),
        ({"label_column": "label"}, "`label_column` is given, but labels are read only if `labels` is 'drawn'"),
    ],
)
def test_bad_input_stops_before_anything_is_drawn(classes, tmp_path, changes, message):
    values = {key: value for key, value in (DRAWN | {"pipeline": classes} | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", values)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("guidance_scale", ".nan", "is nan: .* finite number"),
        ("control_guidance_scale", ".inf", "is inf: .* finite number"),
        ("obedience.num_samples", "1", "is 1: .* greater than or equal to 2"),  # half of them are flipped
        ("obedience.num_coverage_samples", "5", "is 5: .* greater than or equal to 6"),  # they have 5 neighbours
    ],
)
def test_numbers_that_cannot_be_are_refused(name, value, message):
    with pytest.raises(ConfigError, match=f"`{name}` {message}"):
        parse_config(EvaluateConfig, ["--data=embedded:fashion-mnist", f"--{name}={value}"])


@pytest.mark.parametrize("name", ["features", "perceptual"])
def test_a_judge_of_another_size_is_refused(trained, tmp_path, name):
    Judge(sample_size=16, widths=(8, 8)).save_pretrained(tmp_path / "judge")
    with pytest.raises(ValueError, match=rf"`{name}` is .*judge, which reads .* 16 x 16 pixels; these have 32 x 32"):
        run(tmp_path / "out", FEW | {"pipeline": trained, "num_samples": 10, name: tmp_path / "judge"})
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_trained_model_is_no_place_for_an_evaluation(trained):
    with pytest.raises(ValueError, match=r"`output_dir` is .*; its metrics.json is not from an evaluation"):
        run(trained, DRAWN | {"pipeline": trained})


def test_a_sweep_is_refused_before_it_begins_if_any_of_its_folders_is_of_other_samples(classes, tmp_path):
    values = SWEPT | {"pipeline": classes, "sweep": "guidance_scale=1:2:1"}
    run(tmp_path / "out", values)
    settings = tmp_path / "out" / "sweep" / "guidance_scale_2" / "samples" / "settings.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text(encoding="utf-8")) | {"vae_sha256": "0ab"}), encoding="utf-8"
    )
    first = tmp_path / "out" / "sweep" / "guidance_scale_1" / "samples"
    shutil.rmtree(first)
    with pytest.raises(ValueError, match="was sampled with `vae_sha256` 0ab, not"):
        run(tmp_path / "out", values)
    assert not first.exists()


def test_an_expected_error_is_one_line(tmp_path):
    output = launch(tmp_path / "out", DRAWN | {"pipeline": tmp_path}).communicate(timeout=240)[0]
    assert (
        output.strip().splitlines()[-1].startswith(f"not evaluated: `pipeline` is '{tmp_path}', which does not load: ")
    )
    assert "Traceback" not in output


def test_folders_that_cannot_be_scored_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must contain some images"):
        run(tmp_path / "out", FEW | {"samples": tmp_path / "empty"})
    with pytest.raises(ValueError, match="`num_samples` is given, but the images of `samples` exist already"):
        run(tmp_path / "out", FEW | {"samples": tmp_path / "empty", "num_samples": 5})
    Image.new("RGB", (32, 32)).save(tmp_path / "empty" / "a.png")
    with pytest.raises(ValueError, match="it needs a `text` for each image"):
        run(tmp_path / "out", FEW | {"samples": tmp_path / "empty", "clip": "embedded:clip"})


def test_a_text_pipeline_needs_captions(texts, tmp_path):
    with pytest.raises(ValueError, match="`caption_column` is 'caption'; the set has the columns"):
        run(tmp_path / "out", DRAWN | {"pipeline": texts, "caption_column": "caption"})
    with pytest.raises(ValueError, match="`labels` is 'drawn'; a text pipeline"):
        run(tmp_path / "out", DRAWN | {"pipeline": texts, "labels": "drawn"})


def test_missing_inception_weights_are_not_replaced(classes, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    missing = tmp_path / "inception.safetensors"
    with pytest.raises(MissingWeightsError, match="embedded:judge"):
        run(tmp_path / "out", DRAWN | {"pipeline": classes, "features": f"inception:{missing}"})
    assert not (tmp_path / "out").exists()


def test_numbers_of_one_folder_are_of_one_reference_set(classes, tmp_path):
    values = DRAWN | {"pipeline": classes}
    first = run(tmp_path / "out", values)
    with pytest.raises(ValueError, match=f"metrics.json is for the reference set {first['reference']['sha256']}"):
        run(tmp_path / "out", values | {"num_reference_images": 30})
    pinned = values | {"reference_hash": first["reference"]["sha256"]}
    assert run(tmp_path / "out", pinned)["scores"] == first["scores"]


def test_two_evaluations_of_one_name_go_to_two_folders(classes, tmp_path, monkeypatch, capsys):
    """Another pipeline, set or setting goes to another folder; the same command finds its folder again."""
    (tmp_path / "other").mkdir()
    other = shutil.copytree(classes, tmp_path / "other" / classes.name)
    monkeypatch.chdir(tmp_path)
    few, folders = {"num_samples": 8}, []
    for change in ({}, {"pipeline": other}, {"num_reference_images": 30}, {"seed": 1}, {}, {"cpu_threads": 2}):
        values = DRAWN | few | {"pipeline": classes} | change
        evaluate.main(parse_config(EvaluateConfig, [f"--{key}={value}" for key, value in values.items()]))
        printed = re.search(r"results are written to (runs/evaluation/classes-\w{8})/", capsys.readouterr().out)
        folders.append(Path(printed[1]))
        assert (folders[-1] / "metrics.json").is_file() and len(images(folders[-1])) == 8
    assert len(set(folders)) == 4 and folders[0] == folders[4] == folders[5]


def test_a_small_set_of_ones_own_is_scored_with_the_defaults(classes, tmp_path, capsys):
    drawn = run(tmp_path / "drawn", DRAWN | {"pipeline": classes, "num_samples": 30})
    assert drawn["score_settings"]["kid_subset_size"] == 8
    values = {"data": tmp_path / "drawn" / "samples", "features": "embedded:judge", "split": "train"}
    scored = run(tmp_path / "scored", values | {"samples": tmp_path / "drawn" / "samples", "cpu_threads": 1})
    assert scored["reference"]["images"] == 30 and scored["scores"]["fid"] == pytest.approx(0, abs=1e-3)
    assert scored["score_settings"]["kid_subset_size"] == 30
    assert "kid uses subsets of 30 images, as many as the smaller set has" in capsys.readouterr().out


@pytest.fixture
def trained(texts) -> Path:
    """A pipeline's folder with the files and the card that a training script saves."""
    pipeline = evaluate.load_pipeline(EvaluateConfig(pipeline=str(texts), data="embedded:fashion-mnist"))
    config = RunConfig().model_dump(mode="json")
    metrics = {"parameters": 1, "images_seen": 1, "device": "CPU", "command": "train", "obedience": {}}
    write_card(texts, pipeline, config, metrics, "a boot", "samples.png")
    (texts / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (texts / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return texts


def test_the_card_shows_the_numbers_of_the_metrics_file(trained, tmp_path):
    before = (trained / "README.md").read_text(encoding="utf-8")
    values = DRAWN | {"pipeline": trained}
    run(tmp_path / "unseen", values | {"update_card": "false"})
    assert (trained / "README.md").read_text(encoding="utf-8") == before
    for seed in (0, 100):  # the second evaluation replaces the first
        metrics = run(tmp_path / f"seed-{seed}", values | {"seed": seed})
    assert json.loads((trained / "evaluation.json").read_text(encoding="utf-8")) == metrics
    card = ModelCard.load(trained / "README.md")
    assert not card.data.eval_results  # results of ten samples are not published
    assert metrics["notes"].keys() == metrics["scores"].keys()
    for name in ("fid", "kid", "coverage"):
        assert (
            f"| {metrics['scores'][name]:.3f}, not meaningful: measured on 10 images, needs at least 500 |"
            in card.text
        )
    assert card.text.count("| Fréchet distance, embedded:judge |") == 1
    assert "Not measured." not in card.text
    (line,) = [line for line in card.text.splitlines() if line.startswith("Features embedded:judge")]
    for part in ("embedded:fashion-mnist` test, 40 images", "10 samples", "DDIMScheduler, 2 steps", "guidance 2.0"):
        assert part in line
    assert f"({metrics['reference']['sha256'][:12]})" in line
    assert "seeds 100 to 109, float32" in line
    text = before[before.index("# texts") : before.index("## Evaluation")]
    assert text in card.text
    assert card.text.endswith(before[before.index("## Limits") :])


def test_the_card_of_someone_else_is_left_alone(trained, tmp_path):
    own = "# My model\n\n## Evaluation\n\nWonderful.\n"
    (trained / "README.md").write_text(own, encoding="utf-8")
    run(tmp_path / "out", DRAWN | {"pipeline": trained})
    assert (trained / "README.md").read_text(encoding="utf-8") == own


def test_samples_are_drawn_in_the_asked_precision(classes, tmp_path):
    metrics = run(tmp_path / "out", DRAWN | {"pipeline": classes, "dtype": "bfloat16"})
    assert metrics["samples"]["dtype"] == "bfloat16"
    assert torch.isfinite(torch.tensor(list(metrics["scores"].values()))).all()
