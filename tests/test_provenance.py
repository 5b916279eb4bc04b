import json
import math
import os
import subprocess
import sys

import pytest

from improved_ldm.provenance import launch_command, write_json


@pytest.fixture
def unlaunched(monkeypatch):
    """No trace of `accelerate launch` in the environment."""
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
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")  # which a user sets too
    assert launch_command() == command


def test_what_accelerate_launches_knows_it(unlaunched, tmp_path):
    (tmp_path / "script.py").write_text("from improved_ldm.provenance import launch_command; print(launch_command())")
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
    assert json.loads((tmp_path / "a.json").read_text()) == {"fid": 1.5}
