"""Invalid settings: each is refused at once, with little memory, in one line that names the key."""

import gc
import time
import tracemalloc
from pathlib import Path

import pytest

from improved_ldm.evaluation.request import EvaluateConfig
from improved_ldm.settings import ConfigError, parse_config
from improved_ldm.trainer.checks import check_models
from improved_ldm.trainer.config import AdapterRunConfig, RunConfig
from tests.scripts import ROOT, fork_server

CONFIGS = ROOT / "training" / "configs"
MAX_SECONDS, MAX_BYTES, MAX_LINE = 1.0, 2**30, 2100

LAUGHS = (
    "{a: &a [x,x,x,x,x,x,x,x,x,x], "
    + ", ".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "}"
)

# key and value on the command line, and a part of the message
VALUES = [
    ("seed", "x", "integer"),
    ("seed", "true", "a number"),
    ("seed", "-1", "equal to 0"),
    ("seed", "1e400", "finite"),
    ("seed", "4294967296", "less than"),
    ("seed", "9" * 20_000, "limit"),
    ("seed", "9" * 3_000_000, "3,000,000 characters"),
    ("seed", "1:30", "integer"),
    ("seed", "!!python/object/apply:os.system [ls]", "tag"),
    ("seed", "!!binary aGk=", "tag"),
    ("seed", "[", "YAML"),
    ("output_dir", "", "at least 1"),
    ("output_dir", "a\0b", "NUL"),
    ("output_dir", "a" * 300, "255"),
    ("data.source", "", "at least 1"),
    ("data.source", "x" * 5000, "4096"),
    ("transform", "5", "section"),
    ("transform", "[]", "section"),
    ("data.num_workers", "1000000", "1024"),
    ("data.num_workers", "-1", "equal to 0"),
    ("data.num_classes", "0", "equal to 1"),
    ("data.num_classes", "1000000000", "less than"),
    ("data.shuffle_window", "1000000000000", "less than"),
    ("transform.resolution", "0", "equal to 1"),
    ("transform.resolution", "-16", "equal to 1"),
    ("transform.resolution", "1000000000", "65536"),
    ("transform.resolution", "32.5", "integer"),
    ("transform.resolution", "true", "must be a number"),
    ("transform.resolution", "[32]", "[height, width]"),
    ("transform.resolution", "[32, 32, 32]", "[height, width]"),
    ("transform.resolution", "[32, 0]", "equal to 1"),
    ("transform.resolution", "[32, wide]", "integer"),
    ("transform.min_crop", ".nan", "finite"),
    ("transform.crop_probability", "1.5", "equal to 1"),
    ("cache.passes", "1000000000", "10000"),
    ("text.max_tokens", "1000000000", "65536"),
    ("text.padding", "none at all", "zero"),
    ("training.steps", "0", "equal to 1"),
    ("training.steps", "10000000000", "less than"),
    ("training.steps", "1.5e0", "integer"),
    ("training.batch_size", "1000000000", "1048576"),
    ("training.gradient_accumulation_steps", "0", "equal to 1"),
    ("training.log_every", "0", "equal to 1"),
    ("training.checkpoint_every", "-5", "equal to 1"),
    ("training.cpu_threads", "100000", "1024"),
    ("training.mixed_precision", "fp8", "bf16"),
    ("training.trackers", "[wandbb]", "wandb"),
    ("training.trackers", "[aim]", "pip install aim"),
    ("training.trackers", "tensorboard", "list"),
    ("optimizer.learning_rate", "-1", "greater than 0"),
    ("optimizer.learning_rate", ".inf", "finite"),
    ("optimizer.learning_rate", "1e300", "less than"),
    ("optimizer.learning_rate", "true", "a number"),
    ("optimizer.betas", "[0.9, 1.0]", "less than 1"),
    ("optimizer.betas", "[0.9]", "adamw has 2"),
    ("optimizer.name", "sgd", "'adamw' or 'adan'"),
    ("optimizer.eps", "0", "greater than 0"),
    ("optimizer.lr_base_batch", "256", "`lr_scaling` is none, which has no base"),
    ("optimizer.ema_every", "400001", "at most `training.steps`"),
    ("optimizer.ema_decay", "1", "less than 1"),
    ("sampling.num_inference_steps", "1000000000", "10000"),
    ("sampling.guidance_scale", ".nan", "finite"),
    ("denoiser.name", "ditt", "'dit'"),
    ("denoiser.name", "x" * 9000, "unknown"),
    ("denoiser.size", "XXL/2", "XL"),
    ("denoiser.size", "XL/3", "2, 4, 8"),
    ("denoiser.control_route", "film", "'norm' or 'tokens'"),
    ("denoiser.options", "5", "dictionary"),
    ("denoiser.options", "{published: 5}", "dictionary"),
    ("denoiser.options", "{published: {eps: 1}}", "may have"),
    ("denoiser.options", "{published: {norm_eps: many}}", "number"),
    ("denoiser.options", "{published: {norm_eps: .inf}}", "from 0"),
    ("denoiser.options", "{num_layers: -3}", "from 1 to 1000"),
    ("denoiser.options", "{num_attention_heads: 0}", "from 1 to 65536"),
    ("denoiser.options", "{patch_size: 0}", "from 1"),
    ("denoiser.options", "{hidden_size: 0}", "from 1"),
    ("denoiser.options", "{num_layers: many}", "integer"),
    ("denoiser.options", "{num_layers: 1000000000}", "from 1 to 1000"),
    ("denoiser.options", "{num_layers: true}", "a number"),
    ("denoiser.options", "{hidden_size: [1, 2]}", "integer"),
    ("denoiser.options", "{mlp_ratio: .inf}", "from 0"),
    ("denoiser.options", "{sample_size: 3}", "may have"),
    ("denoiser.options", "{a: &a {b: *a}}", "contains itself"),
    ("denoiser.options", LAUGHS, "values"),
    ("denoiser.options", "[" * 20_000, "deep"),
    ("denoiser.options", "{a: " * 60 + "1" + "}" * 60, "deep"),
    ("denoiser.options", "{num_layers: 2, num_layers: 3}", "twice"),
    ("denoiser.options", "{1: 2}", "word"),
    ("after", "{}", "cannot be given"),
    ("after", "{source: a, steps: 3}", "cannot be given"),
    ("stages", "5", "list"),
    ("stages", "[{resolution: 16}]", "missing"),
    ("stages", "[" + "{resolution: 16, steps: 6}," * 1000 + "]", "100"),
    ("stages", "[" + "{resolution: 16, steps: 6}," * 2000 + "]", "30,000"),
    ("stages", "[{resolution: 16, steps: 6, batch: 3}]", "not a key"),
]
KEYS = [".", "data.", ".source", "data..source", "", "k" * 3_000_000, "data." * 30_000 + "x", "training.step", "sede"]
FILES = {
    "list": b"- seed: 1\n",
    "word": b"seed\n",
    "empty": b"",
    "comments": b"# nothing\n",
    "nul": b"seed: 1\0\n",
    "binary": bytes(range(256)),
    "latin1": "output_dir: caf\u00e9\n".encode("latin-1"),
    "tab": b"training:\n\tsteps: 3\n",
    "twice": b"seed: 1\nseed: 2\n",
    "tag": b"seed: !!python/object:os.system x\n",
    "include": b"data: !include other.yaml\n",
    "documents": b"seed: 1\n---\nseed: 2\n",
    "cycle": b"denoiser: &a\n  options: *a\n",
    "laughs": f"denoiser: {{options: {LAUGHS}}}\n".encode(),
    "deep": b"seed: " + b"[" * 50_000,
    "large": b"# " + b"x" * 10_000_000 + b"\nseed: 1\n",
    "long key": b"k" * 90_000 + b": 1\n",
    "unclosed": b"seed: [1\n",
}


def refusal(config_class, argv: list[str], default: Path | None = None) -> str:
    """The one-line message of a configuration that is refused within a second and a gigabyte."""
    gc.disable()  # garbage collection would include objects of other tests
    started = time.process_time()
    with pytest.raises(ConfigError) as refused:
        parse_config(config_class, argv, default)
    seconds = time.process_time() - started
    gc.enable()
    assert seconds < MAX_SECONDS
    tracemalloc.start()  # tracing makes it slower
    with pytest.raises(ConfigError):
        parse_config(config_class, argv, default)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(refused.value)
    assert peak < MAX_BYTES
    assert "\n" not in message and len(message) < MAX_LINE
    return message


@pytest.mark.parametrize(("key", "value", "reason"), VALUES, ids=lambda part: part[:30])
def test_a_value_that_cannot_be_is_refused_by_its_key(key, value, reason):
    message = refusal(RunConfig, [f"--{key}", value])
    assert key in message and reason in message, message


@pytest.mark.parametrize("value", ["{layers_per_block: 0}", "{norm_num_groups: 0}", "{block_out_channels: []}"])
def test_a_unet_has_no_empty_parts(value):
    message = refusal(RunConfig, ["--denoiser.name", "unet", "--denoiser.size", "S/2", "--denoiser.options", value])
    assert "`denoiser.options`" in message and value[1:5] in message


def test_layers_are_numbered_from_0():
    options = "{dual_attention_layers: [0], mlp_ratio: 0, qk_norm: false}"
    config = parse_config(RunConfig, ["--denoiser.name", "mmdit", "--denoiser.options", options])
    assert config.denoiser.options["dual_attention_layers"] == (0,)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:20])
def test_a_key_that_is_none_is_shown(key):
    assert f"{key[:20]}" in refusal(RunConfig, [f"--{key}=3"])


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_holds_no_settings_is_named(tmp_path, name):
    file = tmp_path / "config.yaml"
    file.write_bytes(FILES[name])
    message = refusal(RunConfig, ["--config", str(file)])
    assert str(file) in message or "kkkk" in message


@pytest.mark.parametrize("place", ["nowhere.yaml", ".", "a\0b", "a" * 300])
def test_a_place_that_is_no_file_is_shown(place):
    assert refusal(RunConfig, ["--config", place]).startswith("--config ")


@pytest.mark.parametrize(
    ("config_class", "argv", "message"),
    [
        (AdapterRunConfig, ["--base", "x", "--lora.rank", "1000000"], "`lora.rank` is 1000000"),
        (AdapterRunConfig, ["--base", ""], "`base` is ''"),
        (EvaluateConfig, ["--data", "x", "--batch_size", "0"], "`batch_size` is 0"),
        (EvaluateConfig, ["--data", "x", "--output_dir", ""], "`output_dir` is ''"),
        (
            EvaluateConfig,
            ["--data", "x", "--scores.kid_subsets", "10000000000"],
            "`scores.kid_subsets` is 10000000000",
        ),
        (EvaluateConfig, ["--data", "x", "--control", "{flip: .nan}"], "`control.flip"),
    ],
)
def test_the_other_scripts_have_bounds_too(config_class, argv, message):
    assert message in refusal(config_class, argv)


@pytest.mark.parametrize(
    ("argv", "key", "expected"),
    [
        (["--seed", "1e3"], "seed", 1000),
        (["--seed", "010"], "seed", 10),
        (["--training.steps", "1000000000"], "training.steps", 10**9),
        (["--training.batch_size", "65536"], "training.batch_size", 65536),
        (["--transform.resolution", "16384"], "transform.resolution", 16384),
        (["--optimizer.learning_rate", "1e-4"], "optimizer.learning_rate", 1e-4),
        (["--data.source", "photos #1"], "data.source", "photos #1"),
        (["--data.source", "*.tar"], "data.source", "*.tar"),
        (["--data.source", "[a] b: c"], "data.source", "[a] b: c"),
        (["--data.split", "no"], "data.split", "no"),
        (["--data.name", "'null'"], "data.name", "null"),
        (["--data.name", "null"], "data.name", None),
        (["--denoiser.options", "{mlp_ratio: 4}"], "denoiser.options", {"mlp_ratio": 4}),
    ],
)
def test_what_has_a_meaning_is_taken(argv, key, expected):
    value = parse_config(RunConfig, argv)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected


@pytest.mark.parametrize(
    "denoiser",
    [
        {"options": {"hidden_size": 65536, "num_layers": 1000, "num_attention_heads": 64}},
        {"name": "mmdit", "size": "XL/2", "options": {"num_layers": 1000, "hidden_size": 8192}},
        {"name": "unet", "options": {"block_out_channels": [65536, 65536, 65536]}},
    ],
)
def test_a_model_beyond_memory_is_refused_before_it_is_made(denoiser):
    config = RunConfig.model_validate({"denoiser": denoiser, "text": {"max_tokens": 16}})
    started = time.process_time()
    with pytest.raises(ValueError, match=r"`denoiser.size` and `denoiser.options` make a model of at least [\d,]+ GB"):
        check_models([config], ["text"])
    assert time.process_time() - started < 1


SCRIPTS = [
    (["training/train_t2i.py", "--seed", "x"], "seed"),
    (["training/train_t2i.py", "--denoiser.name", "unet2"], "denoiser.name"),
    (["training/train_t2i.py", "--transform.resolution", "33"], "transform.resolution"),
    (["training/train_t2i.py", "--text.max_tokens", "1000"], "text.max_tokens"),
    (["training/train_t2i.py", "--data.source", "nowhere/at/all"], "data.source"),
    (
        ["training/train_t2i.py", "--denoiser.options", "{hidden_size: 100, num_attention_heads: 3}"],
        "denoiser.options",
    ),
    (["training/train_class_conditional.py", "--data.split", "nothing"], "data.split"),
    (["training/train_class_conditional.py", "--evaluation.judge", "nowhere"], "evaluation.judge"),
    (["training/train_lora.py", "--base", "nowhere/at/all"], "base"),
    (["training/train_autoencoder.py", "--output_dir", "x", "--data", "nowhere/at/all"], "data"),
    (["training/train_clip.py", "--output_dir", "x", "--training.steps", "0"], "training.steps"),
    (["training/train_judge.py", "--output_dir", "x", "--judge.widths", "[]"], "judge.widths"),
    (["training/evaluate.py", "--data", "embedded:fashion-mnist", "--samples", "nowhere"], "samples"),
    (["training/publish.py", "--pipeline", "nowhere", "--repo", "a/b", "--version", "v1"], "pipeline"),
    (["training/reproduce.py", "no_table"], "no_table"),
    (["training/benchmark.py"], "--peers"),
    (["training/render_cards.py", "--all"], "--all"),
    (["-m", "improved_ldm.convert", "facebookresearch/DiT", "nowhere.pt", "out"], "nowhere.pt"),
    (["-m", "improved_ldm.demo", "--port", "0"], "--port"),
]


@pytest.mark.parametrize(("command", "named"), SCRIPTS)
def test_a_script_ends_with_one_line(tmp_path, command, named):
    command = [ROOT / part if part.startswith("training/") else part for part in command]
    process = fork_server().start(command, folder=tmp_path)
    lines = process.communicate()[0].splitlines()
    assert process.returncode == 1 and len(lines) == 1 and named in lines[0], lines
    assert not list(tmp_path.iterdir())


STAGED = CONFIGS / "fashion_16_32.yaml"


@pytest.mark.parametrize(
    ("stages", "key", "value"),
    [
        (None, "training.steps", "60"),
        (None, "transform.resolution", "16"),
        (None, "transform.target_scale", "64"),
        (None, "transform.min_crop", "0.5"),
        ("[{resolution: 16, steps: 60, batch_size: 4}]", "training.batch_size", "8"),
        ("[{resolution: 16, steps: 60, learning_rate: 1e-4}]", "optimizer.learning_rate", "1e-3"),
        ("[{resolution: 16, steps: 60, source: a, split: b}]", "data.source", "c"),
        ("[{resolution: 16, steps: 60, source: a, split: b}]", "data.split", "c"),
    ],
)
def test_a_key_that_the_stages_decide_is_refused_with_what_to_type(stages, key, value):
    argv = ["--config", str(STAGED), *([] if stages is None else ["--stages", stages])]
    message = refusal(RunConfig, [*argv, f"--{key}", value])
    assert message.startswith(f"`{key}` would be ignored")
    typed = message.partition('--stages "')[2].partition('"')[0]
    assert parse_config(RunConfig, [*argv, "--stages", typed]).stages


def test_a_key_that_a_stage_leaves_to_the_run_is_read():
    config = parse_config(RunConfig, ["--config", str(STAGED), "--training.batch_size", "5"])
    assert config.of_stage(0).training.batch_size == 5


def test_a_file_does_not_hold_what_its_stages_decide(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("transform: {resolution: 32}\nstages: [{resolution: 16, steps: 60}]\n", encoding="utf-8")
    assert "`transform.resolution` would be ignored" in refusal(RunConfig, ["--config", str(file)])


def test_stages_of_the_command_line_stand_above_a_file_without_any():
    config = parse_config(RunConfig, ["--stages", "[{resolution: 16, steps: 60}]"], CONFIGS / "quickstart.yaml")
    assert (config.of_stage(0).transform.resolution, config.of_stage(0).training.steps) == (16, 60)
