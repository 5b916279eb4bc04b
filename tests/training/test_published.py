import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file

import published
from improved_ldm.evaluation.request import EvaluateConfig
from improved_ldm.settings import parse_config
from training import evaluate

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
FEW = {
    "num_samples": 6,
    "batch_size": 4,
    "features": "embedded:judge",
    "num_inference_steps": 3,
    "cpu_threads": 1,
    "scores": "{kid_subset_size: 4, kid_subsets: 2, inception_splits: 2, nearest_k: 2}",
}


@pytest.fixture
def vae(autoencoder, tmp_path) -> Path:
    """The folder of an autoencoder with 32 x 32 images for 16 x 16 latents."""
    autoencoder.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def statistics(tmp_path) -> Path:
    """Statistics of real images."""
    values = {"data": "embedded:fashion-mnist", "num_reference_images": 40, "features": "embedded:judge"}
    values |= {"write_statistics": tmp_path / "reference.npz", "resolution": 32, "cpu_threads": 1}
    evaluate.main(parse_config(EvaluateConfig, [f"--{key}={value}" for key, value in values.items()]))
    return tmp_path / "reference.npz"


@pytest.fixture
def checkpoints(tmp_path) -> dict[str, Path]:
    """Tiny checkpoints in the layout of the published files: pickled tensors next to the constructor's arguments."""
    files = {}
    for name in ("official_dit", "official_mdtv2"):
        folder = tmp_path / name
        folder.mkdir()
        torch.save(load_file(FIXTURES / name / "state_dict.safetensors"), folder / "model.pt")
        config = json.loads((FIXTURES / name / "config.json").read_text(encoding="utf-8"))["constructor_kwargs"]
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        files[name] = folder / "model.pt"
    return files


def measure(model, output: Path, **values):
    values = FEW | {"model": model, "output_dir": output} | values
    published.main(parse_config(published.PublishedConfig, [f"--{key}={value}" for key, value in values.items()]))


@pytest.mark.parametrize(
    "name, entry, options",
    [
        ("official_dit", "DiT-XL/2-256", {"channels": 3}),
        ("official_mdtv2", "MDTv2-XL/2-256", {"channels": 3, "schedule": "power_cosine", "power": 4.0}),
    ],
)
def test_a_checkpoint_in_the_published_layout_becomes_a_table(
    checkpoints, vae, statistics, tmp_path, capsys, name, entry, options
):
    given = {"compare_with": entry, "autoencoder": vae, "reference_statistics": statistics}
    measure(checkpoints[name], tmp_path / "out", **given)
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    stated, measured = published.load_entries()[entry].numbers["fid"], record["scores"]["fid"]
    (row,) = [line for line in text.splitlines() if line.split()[:2] == ["fid", f"{stated:.2f}"]]
    assert row.split()[2:4] == [f"{measured:.2f}", "–"] and "not meaningful: measured on 6 images" in row
    assert "steps: 3, not 250" in text and "autoencoder: " in text and "parameters, 6 images" in text
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert found["measured"]["scores"]["fid"] == measured and found["published"]["scores"]["fid"] == stated
    assert found["differences"]["steps"] == {"published": 250, "measured": 3}
    assert "Does not compare with numbers of the ADM suite" in text and "6 samples, not 50,000" in text
    assert "MFLOP per evaluation, 6 evaluations per image, 6 images" in text and "less than 0.01 GPU hours" in text
    assert record["samples"]["labels"] == "uniform"
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert isinstance(pipe.scheduler, DDPMScheduler) and pipe.scheduler.config.variance_type == "learned_range"
    assert pipe.scheduler.config.timestep_spacing == "linspace" and pipe.scheduler.config.beta_schedule == "linear"
    assert pipe.config.default_num_inference_steps == 250 and pipe.config.guidance_options == options


def test_the_same_command_resumes_and_other_weights_are_refused(checkpoints, vae, statistics, tmp_path):
    given = {"compare_with": "DiT-XL/2-256", "autoencoder": vae, "reference_statistics": statistics}
    measure(checkpoints["official_dit"], tmp_path / "out", **given)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.safetensors")}
    measure(checkpoints["official_dit"], tmp_path / "out", **given)
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.safetensors")}
    state_dict = {
        name: 2 * value for name, value in load_file(FIXTURES / "official_dit" / "state_dict.safetensors").items()
    }
    torch.save(state_dict, checkpoints["official_dit"])
    with pytest.raises(ValueError, match="which holds other weights or another recipe"):
        measure(checkpoints["official_dit"], tmp_path / "out", **given)
    with pytest.raises(ValueError, match="which holds other weights or another recipe"):
        measure(checkpoints["official_dit"], tmp_path / "out", **given | {"compare_with": "DiT-XL/2-256-unguided"})


def test_a_checkpoint_of_another_size_needs_its_arguments(checkpoints, vae, statistics, tmp_path):
    (checkpoints["official_dit"].parent / "config.json").rename(tmp_path / "arguments.json")
    given = {"compare_with": "DiT-XL/2-256", "autoencoder": vae, "reference_statistics": statistics}
    with pytest.raises(ValueError, match=r"the published XL/2: .* `config\.json`") as raised:
        measure(checkpoints["official_dit"], tmp_path / "out", **given)
    assert len(str(raised.value)) < 1000
    measure(checkpoints["official_dit"], tmp_path / "out", published_config=tmp_path / "arguments.json", **given)
    assert (tmp_path / "out" / "comparison.json").exists()


def test_a_pipeline_of_this_library_is_measured_as_it_is(class_pipeline, statistics, tmp_path, capsys):
    class_pipeline(sample_size=16, num_classes=10).save_pretrained(tmp_path / "mine")
    measure(tmp_path / "mine", tmp_path / "out", compare_with="DiT-XL/2-256-400k", reference_statistics=statistics)
    text = capsys.readouterr().out
    assert "18.10" in text and "scheduler: DDIMScheduler, not DDPMScheduler" in text
    record = json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    assert record["samples"]["guidance_scale"] == 1.0  # the entry's, not the default of the pipeline
    assert not (tmp_path / "out" / "pipeline").exists()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model": "DiT-XL/3"}, r"`model` is 'DiT-XL/3'; published models are DiT-XL/2-256, "),
        ({"model": "DiT-XL/2-256", "compare_with": "DiT"}, r"`compare_with` is 'DiT'; published models are"),
        ({"model": "DiT-XL/2-256-400k"}, r"whose weights are not published; give a checkpoint"),
        ({"model": "DiT-XL/2-256"}, r"`reference_statistics` is not given; .*VIRTUAL_imagenet256_labeled\.npz"),
        (
            {"model": "DiT-XL/2-256", "reference_statistics": "none.npz"},
            r"none\.npz, which does not exist; it must be VIRTUAL",
        ),
        (
            {"model": "MDTv2-XL/2-256", "reference_statistics": "HERE"},
            r"its weights are shgao/MDT-XL2/mdt_xl2_v2_ckpt\.pt, which",
        ),
        ({"model": "./typo.pt", "compare_with": "DiT-XL/2-256", "reference_statistics": "HERE"}, r"no such file"),
        ({"model": "a/b", "compare_with": "DiT-XL/2-256", "reference_statistics": "HERE"}, r"`model` is 'a/b'"),
    ],
)
def test_what_is_not_available_is_refused_in_one_line(tmp_path, values, message):
    here = tmp_path / "here.npz"
    here.write_bytes(b"")
    values = {key: here if value == "HERE" else value for key, value in values.items()}
    with pytest.raises((ValueError, OSError), match=message) as raised:
        measure(values.pop("model"), tmp_path / "out", **values)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", b"[1]", "config.json holds a list"),
        ("config.json", b"{bad", "config.json is not JSON"),
        ("model.pt", b"text", "model.pt' cannot be read"),
        ("model.pt", None, "model.pt' cannot be read"),
    ],
)
def test_damaged_files_are_named(checkpoints, statistics, vae, tmp_path, name, content, message):
    file = checkpoints["official_dit"].parent / name
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    given = {"compare_with": "DiT-XL/2-256", "autoencoder": vae, "reference_statistics": statistics}
    with pytest.raises(ValueError, match=message) as raised:
        measure(checkpoints["official_dit"], tmp_path / "out", **given)
    assert "\n" not in str(raised.value)


def test_the_script_ends_with_one_line_and_has_help():
    command = [sys.executable, str(ROOT / "training" / "published.py")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([*command, "DiT-XL/9"], capture_output=True, text=True, env=environment)
    assert ended.returncode == 1 and ended.stderr.strip().splitlines()[-1].startswith("not measured: `model` is")
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0 and "--compare_with" in shown.stdout and "--reference_statistics" in shown.stdout


@pytest.mark.parametrize("name", published.load_entries())
def test_every_entry_has_a_recipe_in_the_published_mode_and_numbers_that_are_measured(name):
    entry = published.load_entries()[name]
    run = entry.run_config(None)
    assert run.denoiser.conditioning == "published" and run.objective.learned_variance
    assert entry.numbers.keys() <= {"fid", "adm_inception_score"}


@pytest.mark.slow
def test_two_processes_make_one_table(checkpoints, vae, statistics, tmp_path):
    given = {"compare_with": "DiT-XL/2-256", "autoencoder": vae, "reference_statistics": statistics}
    values = FEW | given | {"output_dir": tmp_path / "out"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(ROOT / "training" / "published.py"), str(checkpoints["official_dit"])]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    command += [f"--{key}={value}" for key, value in values.items()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("published: DiT-XL/2-256") == done.stdout.count("results are written to") == 1
    assert (tmp_path / "out" / "comparison.json").exists()
