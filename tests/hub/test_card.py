"""Model cards: what they say, and that they say nothing else."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image

from improved_ldm.hub.adapter_card import place_base, write_adapter_card
from improved_ldm.hub.card import EVALUATION_FILE, EVALUATION_PART, update_card, write_card
from improved_ldm.hub.content import addressed, folder_content
from improved_ldm.trainer.config import AdapterRunConfig, RunConfig
from improved_ldm.trainer.grids import control_views, draw_control
from tests.hub.conftest import ROOT, TOKEN

METRICS = json.loads((ROOT / "training" / "results" / "quickstart" / "metrics.json").read_text())
EVALUATION = {
    "scores": {"fid": 12.3456789, "kid": -0.00021, "kid_std": 0.00117, "coverage": 0.51234},
    "samples": {
        "images": 40,
        "labels": "balanced",
        "seeds": [5, 44],
        "control": {"flip": True},
        "sampler": "DDIMScheduler",
        "num_inference_steps": 25,
        "guidance_scale": 2.5,
        "control_guidance_scale": 1.25,
        "dtype": "float32",
    },
    "reference": {
        "source": "user/images",
        "split": "validation",
        "images": 1234,
        "sha256": "0123456789abcdef" * 4,
        "resolution": [48, 64],
    },
    "features": {"name": "inception", "sha256": "fedcba9876543210" * 4},
    "clip": None,
}
OBEDIENCE = {
    "obedience": {"class_accuracy": 0.87654, "real_class_accuracy": 0.91999, "num_samples": 40},
    "disentanglement": {"flip_distance": 0.03456},
}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture
def card_of(class_pipeline, tmp_path):
    """Writes the card of a tiny trained folder, with its metrics and its configuration; returns the file."""

    def make(pipeline=None, metrics=METRICS, control_picture=None, **config) -> Path:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        record = RunConfig.model_validate({"output_dir": folder.as_posix()} | config).model_dump(mode="json")
        (folder / "config.yaml").write_text(yaml.safe_dump(record))
        (folder / "metrics.json").write_text(json.dumps(metrics))
        pipeline = pipeline or class_pipeline()
        return write_card(folder, pipeline, record, metrics, 1, "samples.png", control_picture)

    return make


def evaluated(file: Path, evaluation: dict):
    (file.parent / EVALUATION_FILE).write_text(json.dumps(evaluation))
    assert update_card(file.parent)


def numbers_in(record) -> set[str]:
    """The numbers of a record as a card may write them, those in its texts among them."""
    if isinstance(record, dict | list):
        values = [*record.keys(), *record.values()] if isinstance(record, dict) else record
        return set().union(*map(numbers_in, values))
    return {*NUMBER.findall(str(record)), *([f"{record:.3f}"] if isinstance(record, float) else [])}


def unfounded(card: ModelCard, *records: dict) -> set[str]:
    """The numbers of a card's evaluation part that no record holds."""
    text, hashes = EVALUATION_PART.search(card.text)[0], [record.get("sha256") for record in _dicts(records)]
    for prefix in re.findall(r"\(([0-9a-f]{12})\)", text):
        assert any(known and known.startswith(prefix) for known in hashes)
    text = re.sub(r"\([0-9a-f]{12}\)", "", text)
    return set(NUMBER.findall(text)) - set().union(*map(numbers_in, records))


def _dicts(records):
    return [part for record in records for part in (record, *(v for v in record.values() if isinstance(v, dict)))]


@pytest.mark.parametrize("semantic", ["class", "text"])
def test_the_front_matter_says_what_the_hub_asks(card_of, text_pipeline, semantic):
    pipeline = text_pipeline() if semantic == "text" else None
    card = ModelCard.load(card_of(pipeline, hub={"license": "cc-by-4.0"}, data={"source": "user/images"}))
    data = card.data.to_dict()
    assert data["license"] == "cc-by-4.0"
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == {"text": "text-to-image"}.get(semantic, "unconditional-image-generation")
    assert data["tags"] == ["improved_ldm", "disentangled-conditioning"]
    assert data["datasets"] == ["user/images"]
    assert ModelCardData(**data).to_dict() == data


def test_the_hub_takes_the_card(hub, clients, card_of):
    clients.call("validate", card=str(card_of()))
    assert [(line.path, line.status) for line in hub.log] == [("/api/validate-yaml", 200)]


def test_only_datasets_of_the_hub_are_linked(card_of, tmp_path):
    for source in ("embedded:fashion-mnist", str(tmp_path), "set.parquet"):
        card = ModelCard.load(card_of(data={"source": source}))
        assert card.data.datasets is None
        assert f"`{source}`" in card.text


def test_only_models_of_the_hub_are_linked(card_of, tmp_path):
    for start, linked in ((None, None), (str(tmp_path), None), ("user/base", "user/base")):
        assert ModelCard.load(card_of(denoiser={"pretrained": start})).data.base_model == linked


def test_licences_are_stated_as_far_as_they_are_known(card_of):
    card = ModelCard.load(card_of())
    assert card.data.license == "unknown"
    assert "| the weights | not stated by who trained them |" in card.text
    assert "| the data, `embedded:fashion-mnist` | MIT, Copyright 2017 Zalando SE |" in card.text
    text = card_of(hub={"license": "mit"}, data={"source": "user/images"}).read_text()
    assert "| the weights | mit |" in text
    assert "| the data, `user/images` | as stated by the data set |" in text


def test_the_model_index_holds_what_was_measured(card_of):
    file = card_of()
    evaluated(file, EVALUATION | OBEDIENCE)
    data = ModelCard.load(file).data
    shown = {result.metric_type: result.metric_value for result in data.eval_results}
    assert shown == EVALUATION["scores"] | {"class_accuracy": 0.87654, "flip_distance": 0.03456}
    assert {result.task_type for result in data.eval_results} == {data.pipeline_tag}
    name, results = model_index_to_eval_results(eval_results_to_model_index(data.model_name, data.eval_results))
    assert name == "run"
    assert sorted(results, key=str) == sorted(data.eval_results, key=str)


def test_every_number_of_the_evaluation_is_in_the_records(card_of):
    file = card_of()
    card = ModelCard.load(file)
    assert len(NUMBER.findall(EVALUATION_PART.search(card.text)[0])) > 10
    assert not unfounded(card, METRICS)
    assert unfounded(card, METRICS | {"obedience": {}})
    for evaluation in (EVALUATION, EVALUATION | OBEDIENCE):
        evaluated(file, evaluation)
        records = (evaluation,) if "obedience" in evaluation else (evaluation, METRICS)
        card = ModelCard.load(file)
        assert "| fid | 12.346 |" in card.text
        assert not unfounded(card, *records)
        assert unfounded(card, *({**record, "scores": {}} for record in records)) >= {"12.346"}


def test_a_run_that_was_not_judged_claims_nothing(card_of):
    card = ModelCard.load(card_of(metrics=METRICS | {"obedience": {}}))
    assert EVALUATION_PART.search(card.text)[0].strip() == "Not measured."
    assert card.data.eval_results is None


def test_scores_against_a_dataset_of_the_hub_become_its_entries(card_of):
    file = card_of()
    evaluated(file, EVALUATION)
    entries_file = file.parent / ".eval_results" / "scores.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(entries_file.read_text()))
    assert {entry.task_id: entry.value for entry in entries} == EVALUATION["scores"]
    assert {entry.dataset_id for entry in entries} == {"user/images"}
    assert all("DDIMScheduler, 25 steps; guidance 2.5" in entry.notes for entry in entries)
    embedded = EVALUATION["reference"] | {"source": "embedded:fashion-mnist"}
    evaluated(file, EVALUATION | {"reference": embedded})  # takes the place of what was there
    assert not entries_file.exists()


def test_what_the_card_shows_is_published_with_it(card_of, class_pipeline):
    file = card_of()
    draw_control(class_pipeline(), 1, 0, file.parent / "control.png")
    evaluated(file, EVALUATION)
    (file.parent / ".hidden").write_text("x")
    (file.parent / ".eval_results" / ".hidden").write_text("x")
    names = set(folder_content(file.parent))
    assert names >= {".eval_results/scores.yaml", "control.png", "README.md", EVALUATION_FILE}
    assert not any("hidden" in name for name in names)


def test_both_ways_of_use_name_the_published_version(card_of):
    folder = card_of().parent
    card = addressed(folder, {}, "user/model", "v1.0", {})["README.md"].decode()
    loaded = re.findall(r"from_pretrained\((.*)\)", card)
    address = '"user/model", revision="v1.0"'
    assert loaded == [address, f'{address}, custom_pipeline="pipeline", trust_remote_code=True']


def test_the_lines_of_use_draw(card_of, class_pipeline):
    file, pipeline = card_of(), class_pipeline()
    pipeline.save_pretrained(file.parent)
    code = file.read_text().partition("```python\n")[2].partition("```")[0]
    assert len(code.replace("\n\n", "\n").splitlines()) == 5
    scope = {}
    exec(code.replace('image.save("image.png")', ""), scope)
    assert scope["image"].size == (8, 8)


READ = {
    "all": ({}, {"original_size", "crop_size", "flip"}),
    "no flip": ({"control_parts": ("size", "crop")}, {"original_size", "crop_size"}),
    "published": ({"conditioning": "published", "control_parts": ()}, set()),
}


@pytest.mark.parametrize(("config", "read"), READ.values(), ids=READ)
def test_the_card_shows_the_control_that_the_model_reads(card_of, class_pipeline, tmp_path, config, read):
    pipeline = class_pipeline(**config)
    picture = draw_control(pipeline, 1, 0, tmp_path / "control.png")
    card = card_of(pipeline, control_picture=picture and picture.name).read_text()
    arguments = set().union(*control_views(pipeline).values()) | ({"flip"} & pipeline.denoiser.control_inputs)
    assert arguments - {"crops_coords_top_left"} == read
    assert (picture is not None) == ("](control.png)" in card) == bool(read)
    assert ("## Control inputs" in card) == bool(read)
    for name in ("original_size", "crop_size", "flip"):
        assert (f"`{name}`" in card) == (name in read)
    if picture:
        assert Image.open(picture).width > Image.open(picture).height


def test_the_command_and_the_lineage_stand_in_the_card(card_of, class_pipeline):
    pipeline = class_pipeline()
    pipeline.register_to_config(lineage=[{"source": "runs/first", "resolution": [8, 16], "steps": 3}])
    card = card_of(pipeline).read_text()
    assert f"```bash\n{METRICS['command']}\n```" in card
    assert "| made from | `runs/first`, pixels 8 to 16, steps 3 |" in card


def test_no_token_reaches_the_card(card_of, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    file = card_of()
    evaluated(file, EVALUATION | OBEDIENCE)
    assert not any(TOKEN in path.read_text() for path in file.parent.rglob("*") if path.is_file())


@pytest.mark.parametrize("local", [True, False])
def test_only_a_base_on_the_hub_is_linked(class_pipeline, tmp_path, local):
    base = tmp_path.as_posix() if local else "user/base"
    config = AdapterRunConfig(base=base).model_dump(mode="json")
    card = ModelCard.load(write_adapter_card(tmp_path, class_pipeline(), config, METRICS, 1, "samples.png"))
    assert card.data.base_model == (None if local else "user/base")
    assert f'from_pretrained("{base}")' in card.text
    placed = ModelCard(place_base(str(card), base, "user/other"))
    assert placed.data.base_model == "user/other" and f'from_pretrained("{base}")' not in placed.text


def test_an_adapter_has_a_card_of_the_same_parts(class_pipeline, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = AdapterRunConfig(base="user/base", hub={"license": "mit"}, lora={"rank": 4}).model_dump(mode="json")
    card = ModelCard.load(write_adapter_card(folder, class_pipeline(), config, METRICS, 1, "samples.png"))
    data = card.data.to_dict()
    assert (data["license"], data["base_model"], data["tags"]) == ("mit", "user/base", ["improved_ldm", "lora"])
    assert ModelCardData(**data).to_dict() == data
    assert "| adapter | LoRA, rank 4, alpha 4," in card.text
    assert 'pipe.load_lora_weights("' in card.text
    assert "that of its data\nMIT, Copyright 2017 Zalando SE;" in card.text
