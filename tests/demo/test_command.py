"""The demo's command: its errors if it cannot open a page."""

import socket
import sys

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from improved_ldm.demo.__main__ import load_pipeline, main
from improved_ldm.demo.bundled import BUNDLED
from improved_ldm.pipeline import ImprovedLDMPipeline


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [
        *[
            ("port", value, "a whole number from 1 to 65535")
            for value in ("99999", "0", "-1", "web", "", "²", "1" * 10)
        ],
        *[("queue", value, "a whole number from 1 to 1000") for value in ("0", "1001", "-1", "1.5", "all", "")],
        *[
            ("host", value, "an IPv4 address or a name of this")
            for value in ("8.8.8.8", "256.0.0.1", "::1", "", "a b")
        ],
        *[
            ("root_path", value, "a path such as /improved")
            for value in ("improved", "/", "", "/a b", "/a?b", "ftp://a/b")
        ],
    ],
)
def test_an_option_that_cannot_be_is_named(option, value, valid):
    with pytest.raises(SystemExit) as ended:
        main([f"--{option}={value}"])
    line = str(ended.value)
    assert f"argument --{option}: it is {value!r}; it must be {valid}" in line
    assert "\n" not in line


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"^port {port} is in use; choose another with `--port`$"):
            main([BUNDLED, "--port", str(port)])


def test_a_pipeline_of_another_family_is_refused(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="does not load: it is a DDPMPipeline; it must be an ImprovedLDMPipeline"):
        main([str(tmp_path)])


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="does not load: "):
        main([str(tmp_path)])


def test_a_pipeline_of_samples_that_are_not_square_is_loaded(class_pipeline, tmp_path):
    ImprovedLDMPipeline(**class_pipeline().components, default_size=(8, 16)).save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path)).default_size == (8, 16)


def test_a_first_prompt_that_cannot_be_is_named():
    with pytest.raises(SystemExit, match=r"^the first images are not drawn: `prompt` has 1001 characters; it must"):
        main([BUNDLED, "--prompt", "a" * 1001])


def test_a_missing_gradio_is_named(monkeypatch):
    for name in ("improved_ldm.demo.page", "improved_ldm.demo.editor"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r'^the demo needs gradio: pip install "improved_ldm\[demo\]"$'):
        main([])
