"""Settings of the networks around a denoiser: what is refused, and with which words."""

from pathlib import Path

import pytest

from improved_ldm.settings import ConfigError, Section, parse_config, with_defaults
from improved_ldm.trainer.autoencoder_run import check_sizes
from improved_ldm.trainer.network_config import AutoencoderRunConfig, ClipRunConfig, JudgeRunConfig
from improved_ldm.trainer.optimizer_config import OptimizerConfig

CONFIGS = Path(__file__).parents[2] / "training" / "configs" / "networks"
CLASSES = {"autoencoder": AutoencoderRunConfig, "clip": ClipRunConfig, "judge": JudgeRunConfig}

WRONG = [  # command line, and what the message has
    ("autoencoder", "--autoencoder.type vq", "`autoencoder.type` is 'vq'"),
    ("autoencoder", "--autoencoder.block_out_channels [32]", "`autoencoder.block_out_channels` is"),
    ("autoencoder", "--autoencoder.latent_channels 0", "`autoencoder.latent_channels` is 0"),
    (
        "autoencoder",
        "--autoencoder.kl_weight 1e-4",
        "`autoencoder.kl_weight` is given, but `autoencoder.type` is 'dc'",
    ),
    ("autoencoder", "--autoencoder.type kl --autoencoder.latent_noise 0.1", "it is for 'dc' only"),
    ("autoencoder", "--data.caption_column words", "`data.caption_column` is not a key"),
    ("autoencoder", "--training.semantic_dropout 0.1", "`training.semantic_dropout` is not a key"),
    ("autoencoder", "--optimizer.ema_every 9 --training.steps 8", "`optimizer.ema_every` is 9"),
    ("clip", "--transform.resolution 60", "`transform.resolution` is 60; it must be a multiple of `clip.patch_size`"),
    ("clip", "--transform.resolution [32,64]", "`transform.resolution` is [32, 64]; it must be one number"),
    ("clip", "--transform.buckets true", "`transform.buckets` is true"),
    ("clip", "--clip.heads 5", "`clip.width` is 96; it must be a multiple of `clip.heads` 5"),
    ("clip", "--clip.max_tokens 2", "`clip.max_tokens` is 2"),
    ("clip", "--clip.match name", "`clip.match` is 'name'"),
    ("judge", "--transform.flip_probability 0.5", "`transform.flip_probability` is 0.5; it must be 0"),
    ("judge", "--transform.resolution 8", "`transform.resolution` is 8; it must be at least 16"),
    ("judge", "--judge.widths []", "`judge.widths` is"),
    ("judge", "--data.caption_column words", "`data.caption_column` is not a key"),
]

MOVED = {  # earlier flat key → the key of today
    "autoencoder": {
        **{key: f"transform.{key}" for key in ("resolution", "min_crop", "reduce_probability", "min_original_size")},
        **{key: f"autoencoder.{key}" for key in ("type", "block_out_channels", "layers_per_block", "norm_num_groups")},
        **{key: f"autoencoder.{key}" for key in ("latent_channels", "kl_weight", "latent_noise")},
        "latent_flip_probability": "autoencoder.latent_flip_probability",
        **{key: f"training.{key}" for key in ("batch_size", "steps")},
        **{key: f"optimizer.{key}" for key in ("learning_rate", "ema_decay")},
        "num_workers": "data.num_workers",
        "test_split": "validation.split",
    },
    "clip": {
        **{key: f"clip.{key}" for key in ("patch_size", "width", "heads", "text_layers", "vision_layers")},
        **{key: f"clip.{key}" for key in ("projection_dim", "max_tokens", "max_merges")},
        **{key: f"transform.{key}" for key in ("resolution", "min_crop")},
        **{key: f"training.{key}" for key in ("batch_size", "steps")},
        **{key: f"optimizer.{key}" for key in ("learning_rate", "weight_decay")},
        "label_column": "data.label_column",
        "test_split": "validation.split",
    },
    "judge": {
        **{key: f"judge.{key}" for key in ("widths", "one_sided", "label_smoothing")},
        **{key: f"transform.{key}" for key in ("resolution", "min_crop")},
        **{key: f"training.{key}" for key in ("batch_size", "steps")},
        **{key: f"optimizer.{key}" for key in ("learning_rate", "weight_decay")},
        **{key: f"data.{key}" for key in ("label_column", "num_classes")},
        "test_split": "validation.split",
    },
}


@pytest.mark.parametrize("name, line, message", WRONG)
def test_a_wrong_value_is_named(name, line, message):
    with pytest.raises(ConfigError) as error:
        parse_config(CLASSES[name], line.split())
    assert message in str(error.value)


@pytest.mark.parametrize("name, key", [(name, key) for name, keys in MOVED.items() for key in keys])
def test_an_earlier_flat_key_is_refused_with_the_name_of_its_successor(name, key):
    with pytest.raises(ConfigError) as error:
        parse_config(CLASSES[name], [f"--{key}", "1"])
    assert f"`{key}` is not a key" in str(error.value)
    assert f"`{MOVED[name][key]}`" in str(error.value)


@pytest.mark.parametrize("name", CLASSES)
def test_the_data_of_an_earlier_command_line_are_read(name):
    assert parse_config(CLASSES[name], ["--data", "runs/images"]).data.source == "runs/images"


@pytest.mark.parametrize(
    "line, message",
    [
        ("--transform.resolution 36", "`transform.resolution` is 36; it must be a multiple of 8 pixels"),
        (
            "--transform.resolution 32 --transform.crop_policy crop_at_target_scale --transform.target_scale 60",
            "`transform.target_scale` is 60; it must be a multiple of 8 pixels",
        ),
        ("--transform.buckets true --transform.bucket_step 4", "`transform.bucket_step` is 4"),
        (
            "--autoencoder.type kl --autoencoder.block_out_channels [10,20] --autoencoder.norm_num_groups 8",
            "`autoencoder` has sizes that do not suit each other",
        ),
    ],
)
def test_sizes_that_do_not_suit_each_other_are_refused(line, message):
    with pytest.raises(ValueError) as error:
        check_sizes(parse_config(AutoencoderRunConfig, line.split()))
    assert message in str(error.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_valid(path):
    config = parse_config(CLASSES[path.stem.rpartition("_")[2]], ["--config", str(path)])
    if isinstance(config, AutoencoderRunConfig):
        check_sizes(config)


def test_a_section_with_other_defaults_has_the_same_keys_and_limits():
    section = with_defaults(OptimizerConfig, learning_rate=0.5, schedule="cosine")
    assert issubclass(section, Section) and section.__doc__ == OptimizerConfig.__doc__
    assert list(section.model_fields) == list(OptimizerConfig.model_fields)
    assert section() == section(**OptimizerConfig().model_dump() | {"learning_rate": 0.5, "schedule": "cosine"})
    assert section.model_fields["learning_rate"].description == "Peak learning rate."
    assert OptimizerConfig().learning_rate == 1e-4
    with pytest.raises(ValueError, match="greater than 0"):
        section(learning_rate=-1)
