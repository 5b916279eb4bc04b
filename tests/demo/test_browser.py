"""The demo for a visitor: a real process, the bundled pipeline and a real browser."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

SIDE = 28  # pixels of the whole image
MARGIN, CANVAS = 15, 600  # canvas pixels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no `chromium` on the PATH"),
]


@pytest.fixture(scope="module")
def address(run_demo):
    """The address of a running demo."""
    with run_demo() as (url, _):
        yield url


@pytest.fixture
def page(open_page, address):
    """A new visit, without console errors, failed requests or requests to other servers."""
    with open_page(address) as page:
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
    box = page.locator("#view canvas").bounding_box()
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
    return page.locator("#view canvas").evaluate(read) == [255, 255, 255, 255]


def test_the_flip_mirrors_the_right_image_and_leaves_the_left_one(page):
    before = _draw(page)
    assert before["plain"].shape == (32, 32, 3) and before["plain"].std() > 20
    assert (before["plain"] == before["asked"]).all()  # nothing is requested yet
    page.check("#view [name=flip]")
    after = _draw(page)
    assert (after["plain"] == before["plain"]).all()
    mirrored = after["plain"][:, ::-1]
    assert abs(after["asked"] - mirrored).mean() < 0.5 * abs(after["asked"] - after["plain"]).mean()


def test_the_crop_is_drawn_dragged_and_asked_for(page):
    assert _numbers(page) == [0, 0, SIDE, SIDE]
    _drag(page, (4, 6), (20, 24))  # a new rectangle
    assert _numbers(page) == [4, 6, 16, 18]
    assert _has_handle_at(page, 4, 6) and _has_handle_at(page, 20, 24) and not _has_handle_at(page, 0, 0)
    _drag(page, (12, 15), (15, 11))  # the rectangle as a whole
    assert _numbers(page) == [7, 2, 16, 18]
    _drag(page, (23, 20), (40, 16))  # its lower right corner, dragged beyond the image
    assert _numbers(page) == [7, 2, SIDE - 7, 14]
    images = _draw(page)
    assert abs(images["plain"] - images["asked"]).mean() > 10
    page.click("#view [name=whole]")
    assert _numbers(page) == [0, 0, SIDE, SIDE]
    again = _draw(page)
    assert (again["asked"] == images["plain"]).all()


def test_typed_numbers_move_the_rectangle(page):
    for name, value in {"height": "10", "width": "12", "top": "5", "left": "40"}.items():
        page.fill(f"#view [name={name}]", value)
        page.press(f"#view [name={name}]", "Enter")
    assert _numbers(page) == [5, SIDE - 12, 10, 12]  # the rectangle is kept inside the image
    assert _has_handle_at(page, 5, SIDE - 12) and _has_handle_at(page, 15, SIDE)
    page.fill("#view [name=original_size]", "14")
    assert _numbers(page) == [2.5, 8, 5, 6]  # the same part of a smaller image
    assert page.input_value("#view [name=side]") == "14"
    assert _has_handle_at(page, 5, SIDE - 12)


def test_a_small_original_size_takes_detail_away(page):
    page.fill("#view [name=original_size]", "7")
    images = _draw(page)
    assert page.input_value("#view [name=side]") == "7"  # still shown after the image arrives
    edges = {name: abs(np.diff(image[..., 0], axis=1)).max() for name, image in images.items()}
    assert edges["asked"] < 0.7 * edges["plain"]


def test_the_gallery_leads_back_to_what_was_drawn(page):
    first = _draw(page)
    page.fill("#subject textarea", "a photo of a coat")
    page.fill("#seed input", "11")
    page.check("#view [name=flip]")
    _drag(page, (4, 6), (20, 24))
    second = _draw(page)
    assert (first["plain"] != second["plain"]).any()
    captions = page.locator("#gallery .caption-label").all_inner_texts()
    assert captions == [
        "a photo of a coat · seed 11 · 28 px · crop 16×18 at 4, 6 · flip",
        "a photo of an ankle boot · seed 7",
    ]
    page.locator("#gallery .thumbnail-item").nth(1).click()
    expect(page.locator("#subject textarea")).to_have_value("a photo of an ankle boot")
    expect(page.locator("#seed input")).to_have_value("7")
    expect(page.locator("#view [name=flip]")).not_to_be_checked()
    expect(page.locator("#view [name=width]")).to_have_value(str(SIDE))
    assert (_draw(page)["asked"] == first["asked"]).all()


def test_the_random_button_changes_the_seed(page):
    page.click("#any-seed")
    expect(page.locator("#seed input")).not_to_have_value("7")


def test_an_error_is_one_line_on_the_page(page):
    page.fill("#seed input", "")
    page.click("#draw")
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("`seed` is None; it must be a whole number from 0 to 2147483647.")


def test_the_page_fits_a_small_screen(page):
    _draw(page)
    for name in ("head", "draw", "view", "plain", "asked", "gallery"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 800 and box["x"] + box["width"] <= 1280
    style = "image => [getComputedStyle(image).imageRendering, getComputedStyle(image).objectFit]"
    assert page.locator("#asked img").evaluate(style) == ["pixelated", "contain"]
    assert page.locator("#asked img").bounding_box()["width"] > 200
