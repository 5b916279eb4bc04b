import json

import pytest
from PIL import Image

from improved_ldm.evaluation.sweep import parse_sweep, point_name, write_sweep


def test_every_combination_ends_included():
    points = parse_sweep("guidance_scale=1:8:0.5 control_guidance_scale=0:2:0.5")
    assert len(points) == 15 * 5
    assert points[0] == {"guidance_scale": 1.0, "control_guidance_scale": 0.0}
    assert points[-1] == {"guidance_scale": 8.0, "control_guidance_scale": 2.0}
    assert len({point_name(point) for point in points}) == len(points)


@pytest.mark.parametrize(
    ("text", "scales"),
    [
        ("guidance_scale=1:1.3:0.1", [1.0, 1.1, 1.2, 1.3]),  # rounding makes the sum of the steps smaller than the end
        ("guidance_scale=1:2:0.4", [1.0, 1.4, 1.8]),
        ("guidance_scale=3", [3.0]),
        ("guidance_scale=2:2:1", [2.0]),
    ],
)
def test_ranges(text, scales):
    assert [point["guidance_scale"] for point in parse_sweep(text)] == scales


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidance_scale=1:8", "must be name=start:stop:step"),
        ("guidance=1:8:1", "one of guidance_scale, control_guidance_scale"),
        ("guidance_scale=1:8:0", "step must be > 0"),
        ("guidance_scale=8:1:1", "stop ≥ the start"),
        ("guidance_scale=1 guidance_scale=2", "twice"),
        (" ", "must name guidance_scale or control_guidance_scale"),
    ],
)
def test_what_is_no_sweep_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sweep(text)


@pytest.mark.parametrize("with_clip", [True, False])
def test_both_files_are_written(tmp_path, with_clip):
    records = [
        {
            "scores": {"fid": 10 + (scale - 3) ** 2 + control} | ({"clip_score": 20 + scale} if with_clip else {}),
            "samples": {"images": 8, "guidance_scale": scale, "control_guidance_scale": control},
            "features": {"name": "inception", "sha256": "0"},
            "seconds": {"sampling": 1.0, "scoring": 1.0},
        }
        for control in (0.0, 1.0)
        for scale in (1.0, 3.0, 5.0)
    ]
    write_sweep(records, tmp_path / "sweep")
    sweep = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    assert [point["scores"] for point in sweep["points"]] == [record["scores"] for record in records]
    assert sweep["samples"] == {"images": 8}
    assert sweep["features"] == records[0]["features"]
    assert "mixed" not in sweep
    with Image.open(tmp_path / "sweep" / "sweep.png") as image:
        assert min(image.size) > 300


def test_points_that_do_not_compare_are_said_to(tmp_path):
    records = [
        {
            "scores": {"fid": 10.0},
            "samples": {"images": images, "guidance_scale": 1.0, "control_guidance_scale": 0.0},
            "features": {"name": "inception", "sha256": "0"},
            "seconds": {},
        }
        for images in (8, 9)
    ]
    write_sweep(records, tmp_path)
    sweep = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert sweep["mixed"] == "These numbers do not compare with each other: samples 8 and 9."
