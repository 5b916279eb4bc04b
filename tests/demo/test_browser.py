"""The demo for a visitor: a real process, the bundled pipeline and a real browser."""

import io
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, expect

from improved_ldm.conditioning.control import Control
from improved_ldm.conditioning.control_ranges import ControlRanges
from improved_ldm.demo.bundled import load_bundled
from improved_ldm.pipeline import ImprovedLDMPipeline

SIDE = 128  # pixels of the whole image
FIRST, OTHER = "fox, 3D style", "red apple, flat style"  # prompts
MARGIN, CANVAS = 15, 600  # canvas pixels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no `chromium` on the PATH"),
]


@pytest.fixture(scope="module")
def bundled_address(run_demo):
    """The address of a demo that is started without arguments."""
    with run_demo() as (url, _):
        yield url


@pytest.fixture(scope="module")
def address(run_demo, tmp_path_factory):
    """The address of a demo of the bundled networks with few steps, so that it draws at once."""
    with run_demo(_few_steps(load_bundled(), tmp_path_factory)) as (url, _):
        yield url


def _few_steps(pipe: ImprovedLDMPipeline, tmp_path_factory) -> str:
    """Save a pipeline that draws in few steps; returns its folder."""
    pipe.register_to_config(default_num_inference_steps=3)
    folder = tmp_path_factory.mktemp("few") / "steps"
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shaped_address(run_demo, tmp_path_factory):
    """The address of a demo of the bundled networks in a pipeline that is known to have seen three shapes."""
    pipe, ranges = load_bundled(), ControlRanges({})
    for size in ((96, 160), (160, 96)):
        ranges.add(torch.tensor([Control.of_whole_image((SIDE, SIDE), size, flip).to_row() for flip in (False, True)]))
    pipe.register_to_config(control_seen=ranges.record())
    with run_demo(_few_steps(pipe, tmp_path_factory)) as (url, _):
        yield url


@pytest.fixture
def page(open_page, address):
    """A new visit, without console errors, failed requests or requests to other servers."""
    with open_page(address) as page:
        yield page


@pytest.fixture
def bundled_page(open_page, bundled_address):
    """As `page`, of the demo that is started without arguments."""
    with open_page(bundled_address) as page:
        yield page


def _draw(page: Page) -> dict[str, np.ndarray]:
    """Press the button and read both images."""
    thumbnails = page.locator("#gallery .thumbnail-item img")
    expected = thumbnails.count() + 1
    page.click("#draw")
    expect(thumbnails).to_have_count(expected)
    expect(page.locator("#asked img")).to_have_attribute("src", thumbnails.first.get_attribute("src"))
    return {name: _image(page, f"#{name} img") for name in ("plain", "asked")}


def _image(page: Page, selector: str) -> np.ndarray:
    source = page.locator(selector).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())), dtype=int)


def _numbers(page: Page) -> list[float]:
    return [float(page.input_value(f"#view [name={name}]")) for name in ("top", "left", "height", "width")]


def _drag(page: Page, start: tuple[float, float], end: tuple[float, float]):
    """Drag on the canvas between two points (top, left) in pixels of the whole image."""
    box = page.locator("#view [name=crop]").bounding_box()
    zoom = box["width"] / CANVAS

    def at(point):
        y, x = (zoom * (MARGIN + value / SIDE * (CANVAS - 2 * MARGIN)) for value in point)
        return box["x"] + x, box["y"] + y

    page.mouse.move(*at(start))
    page.mouse.down()
    page.mouse.move(*at(end), steps=4)
    page.mouse.up()


def _has_handle_at(page: Page, top: float, left: float) -> bool:
    """Whether the canvas is opaque white at the centre of a handle."""
    x, y = (round(MARGIN + value / SIDE * (CANVAS - 2 * MARGIN)) for value in (left, top))
    read = f"canvas => [...canvas.getContext('2d').getImageData({x}, {y}, 1, 1).data]"
    return page.locator("#view [name=crop]").evaluate(read) == [255, 255, 255, 255]


def _open_whole(page: Page):
    """Ask for the default view instead of the first crop."""
    page.click("#view [name=whole]")
    assert _numbers(page) == [0, 0, SIDE, SIDE]


def _bottom(page: Page, name: str) -> float:
    box = page.locator(f"#{name}").bounding_box()
    return box["y"] + box["height"]


def test_the_page_opens_with_a_picture_and_the_first_press_draws_another(bundled_page):
    page = bundled_page
    first = {name: _image(page, f"#{name} img") for name in ("plain", "asked")}
    assert all(image.shape == (SIDE, SIDE, 3) and image.std() > 20 for image in first.values())
    assert abs(first["plain"] - first["asked"]).mean() > 10  # the first view is a crop
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(1)
    seed = int(page.input_value("#seed input"))
    for press in (1, 2):
        drawn = _draw(page)
        assert all(abs(drawn[name] - first[name]).mean() > 0.5 for name in first)  # a caption has one picture
        expect(page.locator("#seed input")).to_have_value(str(seed + press))
        first = drawn


def test_the_steps_are_counted_on_the_picture(page):
    page.fill("#steps input[type=number]", "60")
    page.click("#draw")
    expect(page.locator("#asked")).to_contain_text(re.compile(r"[1-5]?\d/60 steps"))
    expect(page.locator("#gallery .thumbnail-item img")).to_have_count(2)
    expect(page.locator("#asked")).not_to_contain_text("steps")


def test_the_address_is_a_link_to_what_is_drawn(open_page, address):
    with open_page(address) as page:
        page.fill("#subject textarea", OTHER)
        page.fill("#seed input", "11")
        page.check("#view [name=flip]")
        _drag(page, (32, 80), (80, 96))
        drawn, numbers = _draw(page), _numbers(page)
        page.wait_for_url("**seed=11**")
        query = page.url.removeprefix(address)
    with open_page(address, query) as page:
        expect(page.locator("#gallery .thumbnail-item img")).to_have_count(2)
        assert page.input_value("#subject textarea") == OTHER
        assert _numbers(page) == numbers
        expect(page.locator("#view [name=flip]")).to_be_checked()
        for name, image in drawn.items():
            assert (_image(page, f"#{name} img") == image).all()


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ("?seed=-5", "the link is not opened: `seed` is -5; it must be a whole number from 0 to 2147483647."),
        ("?prompt=a+fox&guidance_scale=1e9", "`guidance_scale` is 1000000000.0; it must be a number from 1 to 10."),
        ("?flip=<img+src=x+onerror=alert(1)>", "`view.flip` is '‹img src=x onerror=alert(1)>'; it must be true or"),
    ],
)
def test_a_hostile_link_is_refused_and_says_why(open_page, address, query, line):
    with open_page(address, query) as page:
        expect(page.get_by_test_id("toast-body")).to_contain_text(line)
        assert page.input_value("#subject textarea") == FIRST
        expect(page.locator("#gallery .thumbnail-item img")).to_have_count(1)
        assert _image(page, "#asked img").std() > 20


def test_an_unknown_name_in_a_link_is_said_and_the_rest_is_drawn(open_page, address):
    with open_page(address, "?seed=3&sede=4&__theme=light") as page:
        expect(page.get_by_test_id("toast-body")).to_contain_text("the link has sede, which this page does not know")
        expect(page.locator("#gallery .thumbnail-item img")).to_have_count(2)
        expect(page.locator("#seed input")).to_have_value("3")


def test_the_link_is_copied(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#link button")
    expect(page.locator("#link button")).to_have_text("Copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url and "seed=7" in link


def test_on_a_phone_the_picture_is_above_the_controls_and_stays_in_sight(page):
    page.set_viewport_size({"width": 390, "height": 844})
    pictures, draw = "#pictures", "#draw"
    assert _bottom(page, "pictures") < page.locator("#subject").bounding_box()["y"]
    for place in ("#subject", "#view [name=width]"):
        page.locator(place).scroll_into_view_if_needed()
        for name in (pictures, draw):
            expect(page.locator(name)).to_be_in_viewport(ratio=0.9)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    drawn = _draw(page)
    assert drawn["asked"].std() > 20
    expect(page.locator("#asked img")).to_be_in_viewport(ratio=0.9)


def test_a_shape_is_dragged_and_drawn(open_page, shaped_address):
    with open_page(shaped_address) as page:
        pad = page.locator("#view [name=shape]")
        box = pad.bounding_box()
        centre = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.move(centre[0] + 20, centre[1] + 20)
        page.mouse.down()
        page.mouse.move(centre[0] + 36, centre[1] + 21, steps=4)
        page.mouse.up()
        expect(page.locator("#view [name=size]")).to_have_value("96×160")
        stage = page.locator("#view [name=crop]").bounding_box()
        assert stage["width"] > 1.5 * stage["height"]
        images = _draw(page)
        assert images["plain"].shape == images["asked"].shape == (96, 160, 3)
        page.wait_for_url("**shape=96x160**")
        for size in ("112×144", "128×128", "144×112", "160×96", "160×96"):
            pad.press("ArrowLeft")
            expect(page.locator("#view [name=size]")).to_have_value(size)


def test_a_model_of_one_shape_has_no_pad(page):
    expect(page.locator("#view [name=shape]")).to_be_hidden()


def test_the_flip_mirrors_the_right_image_and_leaves_the_left_one(page):
    page.fill("#subject textarea", "rooster, gradient style")  # which looks to one side
    _open_whole(page)
    before = _draw(page)
    assert before["plain"].shape == (SIDE, SIDE, 3) and before["plain"].std() > 20
    assert (before["plain"] == before["asked"]).all()  # nothing is requested yet
    page.check("#view [name=flip]")
    after = _draw(page)
    assert (after["plain"] == before["plain"]).all()
    mirrored = after["plain"][:, ::-1]
    assert abs(after["asked"] - mirrored).mean() < 0.5 * abs(after["asked"] - after["plain"]).mean()


def test_the_crop_is_drawn_dragged_and_asked_for(page):
    _open_whole(page)
    _drag(page, (16, 24), (80, 96))  # a new rectangle
    assert _numbers(page) == [16, 24, 64, 72]
    assert _has_handle_at(page, 16, 24) and _has_handle_at(page, 80, 96) and not _has_handle_at(page, 0, 0)
    _drag(page, (48, 60), (60, 44))  # the rectangle as a whole
    assert _numbers(page) == [28, 8, 64, 72]
    _drag(page, (92, 80), (150, 64))  # its lower right corner, dragged beyond the image
    assert _numbers(page) == [28, 8, SIDE - 28, 56]
    images = _draw(page)
    assert abs(images["plain"] - images["asked"]).mean() > 10
    page.click("#view [name=whole]")
    assert _numbers(page) == [0, 0, SIDE, SIDE]
    again = _draw(page)
    assert (again["asked"] == images["plain"]).all()


def test_typed_numbers_move_the_rectangle(page):
    _open_whole(page)
    for name, value in {"height": "40", "width": "48", "top": "20", "left": "140"}.items():
        page.fill(f"#view [name={name}]", value)
        page.press(f"#view [name={name}]", "Enter")
    assert _numbers(page) == [20, SIDE - 48, 40, 48]  # the rectangle is kept inside the image
    assert _has_handle_at(page, 20, SIDE - 48) and _has_handle_at(page, 60, SIDE)
    page.fill("#view [name=original_size]", "64")
    assert _numbers(page) == [10, 40, 20, 24]  # the same part of a smaller image
    assert page.input_value("#view [name=side]") == "64"
    assert _has_handle_at(page, 20, SIDE - 48)


def test_a_small_original_size_takes_detail_away(page):
    _open_whole(page)
    page.fill("#view [name=original_size]", "32")
    images = _draw(page)
    assert page.input_value("#view [name=side]") == "32"  # still shown after the image arrives
    edges = {name: abs(np.diff(image[..., 0], axis=1)).mean() for name, image in images.items()}
    assert edges["asked"] < 0.99 * edges["plain"]


def test_the_gallery_leads_back_to_what_was_drawn(page):
    _open_whole(page)
    first = _draw(page)
    page.fill("#subject textarea", OTHER)
    page.fill("#seed input", "11")
    page.check("#view [name=flip]")
    _drag(page, (16, 24), (80, 96))
    second = _draw(page)
    assert (first["plain"] != second["plain"]).any()
    captions = page.locator("#gallery .caption-label").all_inner_texts()
    assert captions == [
        f"{OTHER} · seed 11 · 128 px · crop 64×72 at 16, 24 · flip",
        f"{FIRST} · seed 7",
        f"{FIRST} · seed 7 · 128 px · crop 83×83 at 26, 6",
    ]
    page.locator("#gallery .thumbnail-item").nth(1).click()
    expect(page.locator("#subject textarea")).to_have_value(FIRST)
    expect(page.locator("#seed input")).to_have_value("7")
    expect(page.locator("#view [name=flip]")).not_to_be_checked()
    expect(page.locator("#view [name=width]")).to_have_value(str(SIDE))
    for name, image in first.items():
        assert (_image(page, f"#{name} img") == image).all()
    page.wait_for_url("**seed=7**")


def test_the_random_button_changes_the_seed(page):
    page.click("#any-seed")
    expect(page.locator("#seed input")).not_to_have_value("7")


def test_an_error_is_one_line_on_the_page(page):
    page.fill("#seed input", "")
    page.click("#draw")
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("`seed` is None; it must be a whole number from 0 to 2147483647.")


def test_the_page_fits_a_small_screen(bundled_page):
    page = bundled_page
    _draw(page)
    for name in ("head", "about", "draw", "link", "view", "plain", "asked", "gallery", "guidance", "steps"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 800 and box["x"] + box["width"] <= 1280
    style = "image => [getComputedStyle(image).imageRendering, getComputedStyle(image).objectFit]"
    assert page.locator("#asked img").evaluate(style) == ["pixelated", "contain"]
    assert page.locator("#asked img").bounding_box()["width"] > 200
