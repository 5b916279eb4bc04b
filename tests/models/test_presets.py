import pytest
import torch

from improved_ldm.models.presets import DENOISERS, PATCH_SIZES, SIZES, denoiser_class, make_denoiser, preset


def millions(name, size, **config):
    with torch.device("meta"):
        model = make_denoiser(name, size, **config)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize(("size", "published"), [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)])
def test_published_dit_has_the_published_parameters(size, published):
    count = millions("dit", size, conditioning="published", num_classes=1000, out_channels=8)
    assert count == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("size", ["S/2", "B/2", "L/2", "XL/2"])
def test_mmdit_is_about_as_large_as_dit(size):
    dit = millions("dit", size, text_dim=768)
    assert millions("mmdit", size, text_dim=768) == pytest.approx(dit, rel=0.15)


@pytest.mark.parametrize("name", DENOISERS)
def test_every_size_is_a_valid_config(name):
    for size in SIZES[name]:
        for patch_size in PATCH_SIZES:
            values = preset(name, f"{size}/{patch_size}")
            assert values["patch_size"] == patch_size
            assert values["hidden_size"] % values["num_attention_heads"] == 0


def test_config_wins_over_the_preset():
    model = make_denoiser("dit", "tiny/2", num_layers=1, num_classes=2)
    assert model.config.num_layers == len(model.transformer_blocks) == 1
    assert model.config.hidden_size == 192


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"'dat'.*dit"):
        denoiser_class("dat")
    with pytest.raises(ValueError, match="'dat'"):
        preset("dat", "S/2")


@pytest.mark.parametrize("size", ["M/2", "S/3", "S", "", "S/2/2", "s/2"])
def test_unknown_sizes_are_errors(size):
    with pytest.raises(ValueError, match=f"'{size}'"):
        preset("dit", size)
