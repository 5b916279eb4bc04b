import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm.places import local_folders, local_paths, shareable_place, shareable_record, shareable_text
from improved_ldm.provenance import launch_command, read_json_lines, write_json, write_json_lines, write_whole


@pytest.fixture
def unlaunched(monkeypatch):
    """Removes all variables of `accelerate launch` from the environment."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        (["/usr/bin/python3.11", "script.py", "--a", "b c"], "python script.py --a 'b c'"),
        (["python", "-m", "package.module", "--a=1"], "python -m package.module --a=1"),
    ],
)
def test_the_command_is_the_one_that_was_typed(unlaunched, monkeypatch, typed, command):
    monkeypatch.setattr(sys, "orig_argv", typed)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")  # a user can set it too
    assert launch_command() == command


def test_what_accelerate_launches_knows_it(unlaunched, tmp_path):
    (tmp_path / "script.py").write_text(
        "from improved_ldm.provenance import launch_command; print(launch_command())", encoding="utf-8"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
    result = subprocess.run(
        [*launch, "script.py", "--a", "b c"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "accelerate launch script.py --a 'b c'", result.stderr


def test_a_record_without_a_number_is_not_written(tmp_path):
    write_json(tmp_path / "a.json", {"fid": 1.5})
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "a.json", {"fid": math.nan})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"fid": 1.5}


TEXTS = st.text(st.characters(codec="utf-8")) | st.sampled_from(
    ["a\u2028b", "a\u2029b", "a\u0085b", "a\x1cb", "a\r\nb"]
)


@given(st.lists(st.dictionaries(TEXTS, TEXTS | st.integers() | st.none())))
def test_records_are_read_back_as_they_were_written(tmp_path_factory, records):
    file = tmp_path_factory.mktemp("records") / "records.jsonl"
    write_json_lines(file, records)
    assert read_json_lines(file) == records


@given(st.integers(1, 200))
def test_a_record_that_was_cut_is_named_or_left_out(tmp_path_factory, cut):
    file = tmp_path_factory.mktemp("records") / "records.jsonl"
    records = [{"text": "früh\u2028spät", "number": number} for number in range(5)]
    write_json_lines(file, records)
    lines = file.read_bytes()[:-cut]
    file.write_bytes(lines)
    damaged = []
    left = read_json_lines(file, damaged.append)
    assert left == records[: len(left)] and len(damaged) <= 1
    if damaged:
        assert f"line {len(left) + 1} is left out" in damaged[0]
        with pytest.raises(ValueError, match=rf"records\.jsonl, line {len(left) + 1}: it must be a JSON object"):
            read_json_lines(file)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "record"
    file.write_bytes(b"before")

    def fail(unfinished):
        unfinished.write_bytes(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_whole(file, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["record"] and file.read_bytes() == b"before"


def test_a_place_is_shared_without_local_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, expected in (
        (str(tmp_path / "data" / "photos"), "data/photos"),
        (str(tmp_path.parent / "photos"), ".../photos"),
        ("embedded:fashion-mnist", "embedded:fashion-mnist"),
        ("user/name", "user/name"),
        ("data/photos", "data/photos"),
        ("../photos", "../photos"),
        (str(tmp_path), f".../{tmp_path.name}"),
        ("/data/me/photos/*.jpg", ".../*.jpg"),
        ("inception:/data/me/weights.pth", "inception:.../weights.pth"),
        ("open_clip:ViT-B-32:/data/me/weights.pt", "open_clip:ViT-B-32:.../weights.pt"),
        ("open_clip:ViT-B-32:laion2b", "open_clip:ViT-B-32:laion2b"),
        ("https://host/photos", "https://host/photos"),
        ("file:///data/me/photos.tar", ".../photos.tar"),
        ("zip::file:///data/me/photos.zip", ".../photos.zip"),
        ("../" * 30 + "data/me/photos", ".../photos"),
        (str(Path.home() / "photos"), ".../photos"),
        (str(Path.home()), f".../{Path.home().name}" if len(Path.home().parts) > 2 else "..."),
    ):
        assert shareable_place(place) == expected


@given(st.text(alphabet=" \"'`a/.:=,;()[]{}~\n", max_size=20), st.text(alphabet=" \"'`/.:=,;()[]{}\n", max_size=5))
def test_no_text_that_is_shared_names_a_folder(before, after):
    for folder in local_folders():
        text = shareable_text(f"{before} {folder}/photos{after}")
        assert f"{folder}/" not in text and "photos" in text
        record = shareable_record({"a": [f"{folder}/photos{after}", {"b": f"--data={folder}/photos"}], "c": 1.5})
        assert f"{folder}/" not in str(record) and record["c"] == 1.5


def test_addresses_and_words_are_no_folders():
    home = str(Path.home())
    for text in (f"https://host{home}/photos", f"{home}-elsewhere/photos", "embedded:clip, user/name", ""):
        assert shareable_text(text) == text and local_paths(text) == []


def test_a_command_is_shared_without_local_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "train.py", f"--data.source={tmp_path}/photos", f"{tmp_path}/run"]
    )
    assert launch_command() == "python train.py --data.source=.../photos .../run"
    for stages, shared in (
        (f"[{{steps: 2, source: {tmp_path}/b}}, {{source: '{tmp_path}'}}]", None),
        ("[{source: /a/b c}, {source: /b}]", "[{source: .../b c}, {source: .../b}]"),
        ("[a photo, 1 / 2]", "[a photo, 1 / 2]"),
        ("[/no/yaml", "[.../yaml"),
    ):
        monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", f"--stages={stages}", stages])
        shared = shared or f"[{{steps: 2, source: .../b}}, {{source: '.../{tmp_path.name}'}}]"
        assert launch_command() == shlex.join(["python", "train.py", f"--stages={shared}", shared])
