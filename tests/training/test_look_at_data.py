"""The look at the data: a real process on real files, and its numbers against what the files hold."""

import io
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from improved_ldm.data.buckets import Buckets
from improved_ldm.data.contact_sheet import CROP
from improved_ldm.settings import ConfigError, parse_config
from training import look_at_data

ROOT = Path(__file__).parents[2]
SIZES = [(64, 64)] * 6 + [(128, 64)] * 3 + [(48, 120)] * 2 + [(24, 20)]  # (height, width)
LONG = "a very long caption of a picture " * 20


def encoded(size: tuple[int, int], seed: int, format: str = "PNG") -> bytes:
    """A picture of coloured areas, which is not almost like another."""
    areas = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(areas).resize(size[::-1], Image.Resampling.BICUBIC).save(file, format)
    return file.getvalue()


def write_parquet(file: Path, images: list[bytes], captions: list[str], **columns: list) -> Path:
    rows = {"image": [{"bytes": image, "path": None} for image in images], "text": captions, **columns}
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    features |= {name: datasets.ClassLabel(names=["cat", "dog", "owl"]) for name in columns}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)
    return file


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Twelve images of several sizes, an exact copy, a reduced copy, and two rows that cannot be used."""
    images = [encoded(size, seed) for seed, size in enumerate(SIZES)]
    images += [images[0], encoded((32, 32), 0), b"not an image", images[1][:40]]
    captions = [f"picture {number}" for number in range(10)] + ["", "picture 0"]
    return write_parquet(tmp_path / "mixed.parquet", images, [*captions, LONG, "copy", "damaged", "damaged"])


def look(tmp_path: Path, **keys) -> tuple[str, Path]:
    """The report of a look in this process, and the contact sheet."""
    keys = {"look.output": tmp_path / "look", "text.max_tokens": 16, "transform.resolution": 32} | keys
    arguments = [f"--{key}={value}" for key, value in keys.items()]
    look_at_data.main(parse_config(look_at_data.Config, arguments))
    return (tmp_path / "look" / "report.txt").read_text(encoding="utf-8"), tmp_path / "look" / "contact_sheet.png"


def tiles_on(sheet: Path) -> int:
    """The number of crop frames on a sheet."""
    pixels = np.asarray(Image.open(sheet))
    colour = [int(CROP[i : i + 2], 16) for i in (1, 3, 5)]
    return ndimage.label((pixels == colour).all(-1))[1]


def cells(report: str, first: str) -> list[str]:
    """The cells of the line of a report that begins with a text."""
    (line,) = [line for line in report.splitlines() if line.strip().startswith(first)]
    return line.strip().removeprefix(first).split()


def test_a_process_counts_what_the_files_hold(mixed, tmp_path):
    command = [sys.executable, str(ROOT / "training" / "look_at_data.py"), f"--data.source={mixed}", "--look.rows=0"]
    command += [f"--look.output={tmp_path / 'look'}", "--look.tiles=7", "--text.max_tokens=16"]
    command += ["--transform.resolution=32", "--transform.crop_policy=resize_then_crop", "--transform.min_crop=1"]
    command += ["--transform.reduce_probability=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "look" / "report.txt").read_text(encoding="utf-8")
    assert report.strip() in done.stdout
    assert "16 rows looked at, 2 of them (12.5%) cannot be used and are skipped" in report
    assert f"2 rows: image cannot be decoded; the first is {mixed}, row 14" in report
    assert "more than 5% are skipped: a training run would stop" in report

    sizes = np.array([*SIZES, (64, 64), (32, 32)])
    for name, sides in (("height", sizes[:, 0]), ("width", sizes[:, 1]), ("shorter side", sizes.min(1))):
        expected = np.quantile(sides, [0, 0.25, 0.5, 0.75, 1], method="nearest")
        assert cells(report, name) == [str(value) for value in expected]
    assert cells(report, "about square, within 10%")[:2] == ["8", "57.1%"]
    assert cells(report, "tall, 3:2 to 2:1")[0] == "3"
    assert cells(report, "very wide, over 2:1")[0] == "2"

    cut_away = (3 * (1 - 64 * 64 / (128 * 64)) + 2 * (1 - 48 * 48 / (48 * 120)) + (1 - 20 * 20 / (24 * 20))) / 14
    assert cells(report, "32 x 32") == ["14", f"{cut_away:.1%}", f"{5 / 14:.1%}", f"{1 / 14:.1%}"]
    assert "1 (7.1%) are longer than `text.max_tokens` 16" in report
    assert "13 distinct captions, 1 empty" in report
    assert f"1 with the bytes of an earlier image; the first is {mixed}, row 12, like {mixed}, row 0" in report
    assert f"1 that hardly differ from an earlier one, by thumbnails; the first is {mixed}, row 13, like" in report
    assert tiles_on(tmp_path / "look" / "contact_sheet.png") == 7


def test_a_sample_is_spread_over_the_set(tmp_path):
    images = [encoded((16, 16), number) for number in range(60)]
    file = write_parquet(tmp_path / "many.parquet", images, ["a"] * 60, label=[0] * 30 + [1] * 30)
    report, sheet = look(tmp_path, **{"data.source": file, "look.rows": 10, "look.condition": "class"})
    assert "10 rows looked at" in report
    assert "10 rows spread over all" in report
    assert cells(report, "cat") == ["5"] and cells(report, "dog") == ["5"]
    assert "1 of 3 have no row here" in report
    assert tiles_on(sheet) == 10


def test_folders_of_classes_need_no_condition(tmp_path):
    for number in range(9):
        folder = tmp_path / "pictures" / ("cat" if number < 6 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded((16, 24), number))
    report, sheet = look(tmp_path, **{"data.source": tmp_path / "pictures", "look.rows": 3})
    assert "3 rows looked at" in report and "tokens" not in report
    assert cells(report, "cat") == ["2"] and cells(report, "dog") == ["1"]
    assert tiles_on(sheet) == 3


def test_buckets_have_their_own_lines(mixed, tmp_path):
    keys = {"transform.buckets": "true", "transform.bucket_step": 8, "transform.crop_policy": "resize_then_crop"}
    keys |= {"transform.min_crop": 1, "transform.reduce_probability": 0}
    report, _ = look(tmp_path, **{"data.source": mixed, "look.rows": 0, **keys})
    buckets = Buckets(32, 8)
    sizes = [*SIZES, (64, 64), (32, 32)]
    for number, (height, width) in enumerate(buckets.sizes):
        count = int((buckets.nearest(sizes) == number).sum())
        assert cells(report, f"{height} x {width}")[0] == str(count)
    assert cells(report, "all ")[0] == "14"


def test_rows_that_a_filter_leaves_out_are_counted(mixed, tmp_path):
    report, sheet = look(tmp_path, **{"data.source": mixed, "look.rows": 0, "data.min_size": 30})
    assert "16 rows looked at" in report
    assert "1 row left out: shorter side below 30 pixels" in report
    assert tiles_on(sheet) == 13


def test_every_set_of_a_mixture_is_looked_at(mixed, tmp_path):
    other = write_parquet(tmp_path / "other.parquet", [encoded((16, 16), 5)], ["other"])
    keys = {"data.sources": f"[{{source: {mixed}}}, {{source: {other}, caption_prefix: 'a '}}]"}
    arguments = [f"--{key}={value}" for key, value in (keys | {"look.output": tmp_path / "look"}).items()]
    look_at_data.main(parse_config(look_at_data.Config, arguments))
    for number, count in ((1, 14), (2, 1)):
        assert tiles_on(tmp_path / "look" / f"source-{number}" / "contact_sheet.png") == count


def test_every_stage_is_looked_at(mixed, tmp_path):
    stages = "[{resolution: 16, steps: 1}, {resolution: 32, steps: 1}]"
    arguments = [f"--data.source={mixed}", f"--stages={stages}", f"--look.output={tmp_path / 'look'}"]
    look_at_data.main(parse_config(look_at_data.Config, arguments))
    for number, side in ((1, 16), (2, 32)):
        folder = tmp_path / "look" / f"stage-{number}"
        assert cells((folder / "report.txt").read_text(encoding="utf-8"), f"{side} x {side}")[0] == "14"
        assert tiles_on(folder / "contact_sheet.png") == 14


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("look.row", "5", "the nearest valid key is `look.rows`"),
        ("look.rows", "-1", "`look.rows` is -1"),
        ("look.tiles", "0", "`look.tiles` is 0"),
        ("look.condition", "picture", "`look.condition` is 'picture'"),
        ("transform.resolutoin", "32", "the nearest valid key is `transform.resolution`"),
    ],
)
def test_wrong_keys_are_refused(key, value, said):
    with pytest.raises(ConfigError, match=said):
        parse_config(look_at_data.Config, [f"--{key}={value}"])


def test_a_set_without_captions_and_classes_is_refused(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(encoded((16, 16), 0))
    with pytest.raises(ValueError, match=r"`data\.caption_column` is 'text'"):
        look(tmp_path, **{"data.source": tmp_path / "pictures"})


def test_a_set_of_damaged_images_is_refused_after_its_counts(tmp_path, capsys):
    file = write_parquet(tmp_path / "damaged.parquet", [b"no", b"image"], ["a", "b"])
    with pytest.raises(ValueError, match="the set holds no row that can be used"):
        look(tmp_path, **{"data.source": file})
    assert "2 rows looked at, 2 of them (100.0%) cannot be used" in capsys.readouterr().out
