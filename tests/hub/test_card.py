"""Model cards: what they state, and that they state nothing else."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image

from improved_ldm.conditioning.control import CONTROL_PARTS, VARIABLES
from improved_ldm.hub.adapter_card import name_base_on_hub, write_adapter_card
from improved_ldm.hub.card import EVALUATION_FILE, EVALUATION_PART, update_card, write_card
from improved_ldm.hub.content import folder_content, name_places_on_hub
from improved_ldm.places import shareable_place
from improved_ldm.trainer.config import AdapterRunConfig, RunConfig
from improved_ldm.trainer.grids import control_views, sample_control_grid
from tests.hub.conftest import TOKEN
from tests.scripts import ROOT

METRICS = json.loads((ROOT / "training" / "results" / "quickstart" / "metrics.json").read_text(encoding="utf-8"))
EVALUATION = {
    "scores": {"fid": 12.3456789, "kid": -0.00021, "kid_std": 0.00117, "coverage": 0.51234},
    "samples": {
        "images": 4000,
        "labels": "balanced",
        "seeds": [5, 4004],
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
        "images": 12345,
        "sha256": "0123456789abcdef" * 4,
        "resolution": [48, 64],
    },
    "features": {"name": "inception", "sha256": "fedcba9876543210" * 4},
    "clip": None,
}
OBEDIENCE = {
    "obedience": {"class_accuracy": 0.87654, "real_class_accuracy": 0.91999, "num_samples": 400},
    "disentanglement": {"flip_distance": 0.03456},
}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture
def card_of(class_pipeline, tmp_path):
    """Writes the card of a tiny trained folder with its metrics and configuration, and returns the file."""

    def make(pipeline=None, metrics=METRICS, control_picture=None, **config) -> Path:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        record = RunConfig.model_validate({"output_dir": folder.as_posix()} | config).model_dump(mode="json")
        (folder / "config.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        pipeline = pipeline or class_pipeline()
        return write_card(folder, pipeline, record, metrics, 1, "samples.png", control_picture)

    return make


def evaluated(file: Path, evaluation: dict):
    (file.parent / EVALUATION_FILE).write_text(json.dumps(evaluation), encoding="utf-8")
    assert update_card(file.parent)


def numbers_in(record) -> set[str]:
    """The numbers of a record, including those in its texts, in the formats of a card."""
    if isinstance(record, dict | list):
        values = [*record.keys(), *record.values()] if isinstance(record, dict) else record
        return set().union(*map(numbers_in, values))
    return {*NUMBER.findall(str(record)), *([f"{record:.3f}"] if isinstance(record, float) else [])}


def unfounded(card: ModelCard, *records: dict) -> set[str]:
    """The numbers in a card's evaluation section that are in no record."""
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
        assert f"`{shareable_place(source)}`" in card.text


def test_only_models_of_the_hub_are_linked(card_of, tmp_path):
    for start, linked in ((None, None), (str(tmp_path), None), ("user/base", "user/base")):
        assert ModelCard.load(card_of(denoiser={"pretrained": start})).data.base_model == linked


def test_licences_are_stated_as_far_as_they_are_known(card_of):
    card = ModelCard.load(card_of())
    assert card.data.license == "unknown"
    assert "| the weights | not stated |" in card.text
    assert "| the data, `embedded:fashion-mnist` | MIT, Copyright 2017 Zalando SE |" in card.text
    text = card_of(hub={"license": "mit"}, data={"source": "user/images"}).read_text(encoding="utf-8")
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


def test_scores_of_few_images_are_marked_and_claimed_nowhere(card_of):
    file, few = card_of(), {"samples": EVALUATION["samples"] | {"images": 60}}
    evaluated(file, EVALUATION | few)
    card = ModelCard.load(file)
    assert "| coverage | 0.512, not meaningful: measured on 60 images, needs at least 500 |" in card.text
    assert "| fid | 12.346, not meaningful: measured on 60 images, needs at least 2048 |" in card.text
    assert not {result.metric_type for result in card.data.eval_results} & {"fid", "kid", "kid_std"}
    assert not (file.parent / ".eval_results" / "scores.yaml").exists()
    evaluated(file, EVALUATION | {"samples": EVALUATION["samples"] | {"images": 600}})
    entries = parse_eval_result_entries(
        yaml.safe_load((file.parent / ".eval_results" / "scores.yaml").read_text(encoding="utf-8"))
    )
    assert {entry.task_id for entry in entries} == EVALUATION["scores"].keys() - {"fid"}


def test_what_a_judge_finds_in_noise_is_no_obedience(card_of):
    found = METRICS["obedience"] | {"class_accuracy": 0.11, "detail_class_kept": 1.0, "num_coverage_samples": 60}
    card = ModelCard.load(card_of(metrics=METRICS | {"obedience": found}))
    assert "| detail class kept" not in card.text and "| orientation accuracy" not in card.text
    reason = "the class accuracy is 0.110, on real images 0.916: the samples are not recognisable"
    names = "orientation accuracy, detail class kept, detail class kept by size"
    assert f"Left out because noise would reach them too: {names}; {reason}." in card.text
    coverage = f"{found['coverage']:.3f}"
    assert f"| coverage | {coverage}, not meaningful: measured on 60 images, needs at least 500 |" in card.text
    claimed = {result.metric_type for result in card.data.eval_results}
    assert claimed == {"class_accuracy", "crop_accuracy"}


def test_the_quickstart_claims_all_that_it_measured(card_of):
    card = ModelCard.load(card_of())
    assert "not meaningful" not in card.text
    floats = {name for name, value in METRICS["obedience"].items() if isinstance(value, float)}
    claimed = {result.metric_type for result in card.data.eval_results}
    named = {name.replace("judge_fid", "judge_frechet_distance") for name in floats}
    assert claimed == {name for name in named if not name.startswith("real_")}


def test_only_inceptions_distance_is_called_fid(card_of):
    file, judge = card_of(), {"features": {"name": "embedded:judge", "sha256": "ab" * 32}}
    evaluated(file, EVALUATION | judge)
    card = ModelCard.load(file)
    names = {result.metric_type: result.metric_name for result in card.data.eval_results}
    assert names["frechet_distance_embedded_judge"] == "Fréchet distance (embedded:judge, 4000 images)"
    assert not any("fid" in kind for kind in names) and "| fid |" not in card.text
    assert "| Fréchet distance, embedded:judge | 12.346 | lower | 4000 |" in card.text
    assert names["class_accuracy"] == "class accuracy (embedded:judge, 500 images)"
    evaluated(file, EVALUATION)
    card = ModelCard.load(file)
    names = {result.metric_type: result.metric_name for result in card.data.eval_results}
    assert names["fid"] == "fid (inception, 4000 images)"
    assert "| measure | value | better | images |" in card.text
    assert "| fid | 12.346 | lower | 4000 |" in card.text and "| coverage | 0.512 | higher | 4000 |" in card.text
    assert "| kid std | 0.001 | – | 4000 |" in card.text


def test_what_noise_gets_as_well_is_left_out(card_of):
    """With the judge's features, 600 images of noise reach a precision of 0.36 and a coverage of 0.007."""
    scores = EVALUATION["scores"] | {"precision": 0.8, "recall": 0.0, "density": 0.083, "coverage": 0.007}
    file = card_of()
    evaluated(file, EVALUATION | {"scores": scores})
    card = ModelCard.load(file)
    assert "| density" not in card.text and "0.800" not in card.text
    reason = "the coverage is 0.007, for equal sets 0.754: few real images have a sample nearby"
    assert f"Left out because noise would reach them too: precision, recall, density; {reason}." in card.text
    claimed = {result.metric_type for result in card.data.eval_results}
    assert "fid" in claimed and not claimed & {"precision", "recall", "density"}


@pytest.mark.parametrize(
    "source", [".../photos", "/data/photos", "data/photos/*.jpg", "embedded:photos", "user/photos"]
)
def test_a_data_set_is_called_by_no_local_path(card_of, source):
    file = card_of(data={"source": source})
    evaluated(file, EVALUATION | {"reference": EVALUATION["reference"] | {"source": source}})
    for result in ModelCard.load(file).data.eval_results:
        assert result.dataset_type in ("photos", "jpg", "user/photos")
        assert ("/" in result.dataset_type) == (source == "user/photos")


def test_skipped_steps_stand_in_the_card(card_of):
    assert "steps skipped" not in card_of().read_text(encoding="utf-8")
    text = card_of(metrics=METRICS | {"skipped_steps": 3}).read_text(encoding="utf-8")
    assert "| steps skipped | 3, whose loss or gradient was NaN or infinite |" in text


def test_a_card_without_a_picture_shows_none(class_pipeline, tmp_path):
    config = AdapterRunConfig(base="user/base").model_dump(mode="json")
    text = write_adapter_card(tmp_path, class_pipeline(), config, METRICS, 1, None).read_text(encoding="utf-8")
    assert "![Samples" not in text and "None" not in text


def test_scores_against_a_dataset_of_the_hub_become_its_entries(card_of):
    file = card_of()
    evaluated(file, EVALUATION)
    entries_file = file.parent / ".eval_results" / "scores.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(entries_file.read_text(encoding="utf-8")))
    assert {entry.task_id: entry.value for entry in entries} == EVALUATION["scores"]
    assert {entry.dataset_id for entry in entries} == {"user/images"}
    assert all("DDIMScheduler, 25 steps; guidance 2.5" in entry.notes for entry in entries)
    embedded = EVALUATION["reference"] | {"source": "embedded:fashion-mnist"}
    evaluated(file, EVALUATION | {"reference": embedded})  # replaces the earlier entries
    assert not entries_file.exists()


def test_the_card_says_with_what_the_numbers_compare(card_of):
    file = card_of()
    evaluated(file, EVALUATION)
    assert "compare" not in EVALUATION_PART.search(file.read_text(encoding="utf-8"))[0]
    line = "FID as the ADM suite computes it: 50,000 samples, labels uniform, reference VIRTUAL.npz."
    evaluated(file, EVALUATION | {"comparison": line})
    assert file.read_text(encoding="utf-8").splitlines().count(line) == 1
    judged = {"obedience": OBEDIENCE["obedience"] | {"judge_fid": 3.0, "num_coverage_samples": 4000}}
    own = {"features": {"name": "embedded:judge", "sha256": "ab" * 32}}
    for change, said in ((own, True), ({}, False)):
        evaluated(file, EVALUATION | OBEDIENCE | judged | change)
        text = file.read_text(encoding="utf-8")
        assert ("The two Fréchet distances are of different samples" in text) == said


def test_statistics_are_a_reference_of_the_distances_alone(card_of):
    file = card_of()
    statistics = {"source": "all.npz", "sha256": "ba" * 32, "images": None}
    mixed = EVALUATION | {"reference_statistics": statistics, "resizing": "clean", "cmmd": None}
    evaluated(file, mixed)
    card = ModelCard.load(file)
    assert not unfounded(card, mixed, METRICS)
    (line,) = [line for line in card.text.splitlines() if line.startswith("Features inception")]
    assert "clean resizing; statistics `all.npz` (babababababa) for fid;" in line
    assert "12345 images (0123456789ab), for the other scores, which do not compare with them;" in line
    shown = {result.metric_type: result for result in card.data.eval_results}
    assert (shown["fid"].dataset_type, shown["fid"].dataset_config) == ("all.npz", "statistics")
    assert (shown["kid"].dataset_type, shown["kid"].dataset_config) == ("user/images", "12345 images at 48x64")
    entries_file = file.parent / ".eval_results" / "scores.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(entries_file.read_text(encoding="utf-8")))
    assert {entry.task_id for entry in entries} == {"kid", "kid_std", "coverage"}
    alone = mixed | {"reference": None, "scores": {"fid": 12.3456789, "inception_score": 5.0}}
    evaluated(file, alone)
    card = ModelCard.load(file)
    assert "statistics `all.npz` (babababababa); 4000 samples" in card.text
    assert {result.metric_type for result in card.data.eval_results} >= {"fid", "inception_score"}
    assert not entries_file.exists()


def test_what_the_card_shows_is_published_with_it(card_of, class_pipeline):
    file = card_of()
    sample_control_grid(class_pipeline(), 1, 0, file.parent / "control.png")
    evaluated(file, EVALUATION)
    (file.parent / ".hidden").write_text("x", encoding="utf-8")
    (file.parent / ".eval_results" / ".hidden").write_text("x", encoding="utf-8")
    names = set(folder_content(file.parent))
    assert names >= {".eval_results/scores.yaml", "control.png", "README.md", EVALUATION_FILE}
    assert not any("hidden" in name for name in names)


def test_both_ways_of_use_name_the_published_version(card_of):
    folder = card_of().parent
    card = name_places_on_hub(folder, {}, "user/model", "v1.0", {})["README.md"].decode()
    loaded = re.findall(r"from_pretrained\((.*)\)", card)
    address = '"user/model", revision="v1.0"'
    assert loaded == [address, f'{address}, custom_pipeline="pipeline", trust_remote_code=True']


def test_the_lines_of_use_draw(card_of, class_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the card names the folder relative to here
    file, pipeline = card_of(), class_pipeline()
    pipeline.save_pretrained(file.parent)
    code = file.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    assert len(code.replace("\n\n", "\n").splitlines()) == 5
    scope = {}
    exec(code.replace('image.save("image.png")', ""), scope)
    assert scope["image"].size == (8, 8)


READ = {
    "all": ({}, {"original_size", "crop_size", "flip"}),
    "no flip": ({"control_parts": ("size", "crop")}, {"original_size", "crop_size"}),
    "every part": ({"control_parts": CONTROL_PARTS}, {row.name for row in VARIABLES if row.shown((8, 8))}),
    "published": ({"conditioning": "published", "control_parts": ()}, set()),
}


@pytest.mark.parametrize(("config", "read"), READ.values(), ids=READ)
def test_the_card_shows_the_control_that_the_model_reads(card_of, class_pipeline, tmp_path, config, read):
    pipeline = class_pipeline(**config)
    picture = sample_control_grid(pipeline, 1, 0, tmp_path / "control.png")
    card = card_of(pipeline, control_picture=picture and picture.name).read_text(encoding="utf-8")
    switches = {row.name for row in VARIABLES if row.is_switch}
    arguments = set().union(*control_views(pipeline).values()) | (switches & pipeline.denoiser.control_inputs)
    assert arguments - {"crops_coords_top_left"} == read
    assert (picture is not None) == ("](control.png)" in card) == bool(read)
    assert ("## Control inputs" in card) == bool(read)
    for row in VARIABLES:
        assert (f"| `{row.name}` | {row.help} |" in card) == (row.name in pipeline.denoiser.control_inputs)
    if picture:
        assert Image.open(picture).width > Image.open(picture).height


def test_the_command_and_the_lineage_stand_in_the_card(card_of, class_pipeline):
    pipeline = class_pipeline()
    pipeline.register_to_config(lineage=[{"source": "runs/first", "resolution": [8, 16], "steps": 3}])
    card = card_of(pipeline).read_text(encoding="utf-8")
    assert f"```bash\n{METRICS['command']}\n```" in card
    assert "| made from | `runs/first`, pixels 8 to 16, steps 3 |" in card


def test_no_token_reaches_the_card(card_of, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    file = card_of()
    evaluated(file, EVALUATION | OBEDIENCE)
    assert not any(TOKEN in path.read_text(encoding="utf-8") for path in file.parent.rglob("*") if path.is_file())


@pytest.mark.parametrize("local", [True, False])
def test_only_a_base_on_the_hub_is_linked(class_pipeline, tmp_path, local):
    base = tmp_path.as_posix() if local else "user/base"
    config = AdapterRunConfig(base=base).model_dump(mode="json")
    card = ModelCard.load(write_adapter_card(tmp_path, class_pipeline(), config, METRICS, 1, "samples.png"))
    assert card.data.base_model == (None if local else "user/base")
    base = shareable_place(base)
    assert f'from_pretrained("{base}")' in card.text
    placed = ModelCard(name_base_on_hub(str(card), base, "user/other"))
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
