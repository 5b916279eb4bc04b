import json
from random import Random

import pytest
import torch
from torchvision.transforms import Compose, RandomHorizontalFlip

from training import benchmark

CPU = torch.device("cpu")
TRANSFORMER = {"sample_size": 8, "hidden_size": 24, "num_layers": 1, "num_attention_heads": 2}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 8, 8),
    "transformer_layers_per_block": (0, 1, 1),
    "num_attention_heads": (1, 1, 1),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def compare_tiny(backbone):
    return benchmark.compare_peers(backbone, 2, 3, CPU, **(UNET if backbone == "unet" else TRANSFORMER))


@pytest.mark.parametrize("backbone", benchmark.CONDITIONS)
def test_both_sides_have_the_same_sizes(backbone):
    # one block, so that diffusers' DiT embeds its conditions once, too
    counts = compare_tiny(backbone)["parameters"]
    assert counts["ours"] == counts["theirs"]


def test_table_has_a_line_a_backbone_and_a_ratio_a_column():
    row = compare_tiny("dit")
    header, _, *lines = benchmark.table([row, row]).splitlines()
    assert header.split(" | ")[1:] == ["forward", "forward_backward", "memory", "parameters |"]
    assert len(lines) == 2
    assert f"{row['memory']['ratio']:.3f} | 1.000 |" in lines[0]


def test_times_are_in_the_order_of_the_arguments():
    long, short = torch.ones(2000, 1000), torch.ones(10)
    times = benchmark.time_pair(long.exp, short.exp, 5, CPU)
    assert times["ours_ms"] > times["theirs_ms"]
    assert 1 < times["p10"] <= times["ratio"] <= times["p90"]


def test_peak_sees_what_is_allocated_and_freed():
    tensor = torch.ones(1000, 1000)

    def two_at_once():
        _ = (tensor * 2) * 3  # the product by 2 is alive beside the product by 3
        return tensor + 1

    assert benchmark.peak_rise(two_at_once, CPU) == pytest.approx(2 * tensor.nbytes, rel=0.01)


def test_peak_of_a_step_counts_weights_optimizer_state_and_gradients():
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000, bias=False))
    model.forward = lambda latents, return_dict: (model[0](latents),)
    peak = benchmark.training_peak(model, {"latents": torch.ones(1, 1000)}, CPU)
    assert peak == pytest.approx(4 * model[0].weight.nbytes, rel=0.02)  # with two moments


def test_results_are_written(monkeypatch, tmp_path, capsys):
    row = {**compare_tiny("dit"), "backbone": "pixart"}
    monkeypatch.setattr(benchmark, "compare_peers", lambda *args: row)
    benchmark.main(["--peers", "--backbones", "pixart", "--output", str(tmp_path / "peers.json")])
    report = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    assert report["results"] == [row]
    assert report["versions"]["torch"] == torch.__version__
    assert "| pixart |" in capsys.readouterr().out


def test_decoding_is_compared_for_each_format(tmp_path, capsys):
    benchmark.main(["--data", "--rounds", "5", "--batch-size", "4", "--output", str(tmp_path / "data.json")])
    report = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    rows = report["results"]
    assert [row["format"] for row in rows] == ["JPEG", "WEBP", "PNG"]
    # JPEG images are decoded at half their size, and images of all formats are scaled faster
    assert rows[0]["image_feature"]["ratio"] < 0.85 and rows[0]["diffusers_example"]["ratio"] < 0.6
    assert all(row["diffusers_example"]["ratio"] < 0.95 for row in rows)
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.split(" | ")[1:4] == ["diffusers_example", "image_feature", "ours_per_second"]
    for row, line in zip(rows, lines, strict=True):
        assert row["ours_per_second"] == pytest.approx(4000 / row["diffusers_example"]["ours_ms"])
        assert f"| {row['format']} | {row['diffusers_example']['ratio']:.3f} (" in line


def test_the_example_of_diffusers_makes_what_ours_makes():
    image = benchmark.make_image(0)
    theirs = benchmark.DIFFUSERS_EXAMPLE.transforms
    pixels, _ = benchmark.ImageTransform(benchmark.SAMPLE_SIDE)(image, Random(0))
    plain = [step for step in theirs if not isinstance(step, RandomHorizontalFlip)]
    expected = Compose(plain)(image)
    assert (benchmark.pixel_values(pixels) - expected).abs().max() <= 2 / 127.5 + 1e-6
