"""Which cache a run uses."""

import shutil

import pytest

from tests.trainer.conftest import load_script

SHORT = {"training.steps": 2}


def test_settings_that_do_not_change_the_content_share_a_cache(arguments, tmp_path):
    main = load_script("train_t2i").main
    for number, options in enumerate(
        ({}, {"data.num_workers": 1}, {"data.shuffle_window": 8}, {"text.noise_scale": 0})
    ):
        main(arguments(f"run{number}", **SHORT, **{"cache.folder": tmp_path / "caches"}, **options))
    assert len(list((tmp_path / "caches").iterdir())) == 1


def test_a_finished_cache_is_used_or_refused(arguments, tmp_path, capsys):
    main = load_script("train_t2i").main
    main(arguments("run", **SHORT))
    (made,) = (tmp_path / "run" / "cache").iterdir()
    finished = shutil.copytree(made, tmp_path / "finished")
    capsys.readouterr()
    main(arguments("other", **SHORT, **{"cache.pretrained": finished, "cache.passes": 0}))
    assert f"the samples come from the cache {finished}, made of .../train.parquet" in capsys.readouterr().out
    assert not (tmp_path / "other" / "cache").exists()
    other = {"cache.pretrained": finished, "cache.passes": 0, "transform.resolution": 16}
    with pytest.raises(ValueError, match=r"`sizes` is \[\[32, 32\]\]; the run needs \[\[16, 16\]\]"):
        main(arguments("third", **SHORT, **other))
    with pytest.raises(SystemExit, match="`passes` 1; it must be 0 then"):
        main(arguments("fourth", **SHORT, **{"cache.pretrained": finished, "cache.passes": 1}))
