"""Links to settings: a link reads as what it was written from, and anything else is refused by name."""

from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm.conditioning.control import RECTANGLE
from improved_ldm.demo.comparison import Settings
from improved_ldm.demo.limits import Limits
from improved_ldm.demo.link import read_link, write_link
from improved_ldm.demo.opening import first_settings

HOSTILE = [
    *[("seed", value) for value in ("-1", "1.5", "nan", "inf", "1e400", "9" * 5000, "", "7;", "<script>", "' OR 1=1")],
    *[(name, value) for name in ("guidance_scale", "control_guidance_scale") for value in ("nan", "-inf", "1e9", "x")],
    *[("num_inference_steps", value) for value in ("0", "1000000", "1e9", "2.5")],
    *[("prompt", value) for value in ("a" * 1001, "half \ud800")],
    *[(f"view.{name}", value) for name in RECTANGLE for value in ("nan", "-1", "1e9", "[0]", "")],
    *[("view.flip", value) for value in ("1", "True", "yes", "")],
    *[("view.shape", value) for value in ("9x9", "../..", "/etc/passwd")],
]


@pytest.fixture
def text_page(text_pipeline):
    """The limits and the first settings of a page of 8 x 8 images."""
    pipe = text_pipeline()
    return Limits(pipe), first_settings(pipe, "a boot")


@st.composite
def settings(draw, limits):
    side = draw(st.floats(1, 8))
    height, width = (max(1, side * draw(st.floats(0, 1))) for _ in range(2))
    top, left = ((side - extent) * draw(st.floats(0, 1)) for extent in (height, width))
    view = dict(zip(RECTANGLE, (side, top, left, height, width), strict=True)) | {"flip": draw(st.booleans())}
    return limits.check(
        draw(st.text(st.characters(codec="utf-8"), max_size=40)),
        draw(st.integers(0, limits.seed.maximum)),
        draw(st.floats(1, 10)),
        draw(st.floats(0, 5)),
        draw(st.integers(1, 100)),
        draw(st.sampled_from([view, limits.view])),
    )


def test_a_link_reads_as_what_it_was_written_from(text_page):
    limits, first = text_page

    @given(settings(limits))
    def check(asked):
        assert read_link(write_link(asked, limits), limits, first) == (asked, [])

    check()


def test_what_a_link_leaves_out_is_as_the_page_starts_with_the_default_view(text_page):
    limits, first = text_page
    expected = first._replace(subject="", seed=3, view=limits.view | {"flip": True})
    assert read_link("seed=3&flip=true&prompt=", limits, first) == (expected, [])


def test_a_link_has_the_names_of_the_api_and_only_what_is_special_in_the_view(text_page):
    limits, first = text_page
    names = ["prompt", "seed", "guidance_scale", "control_guidance_scale", "num_inference_steps"]
    asked = first._replace(view=limits.view | {"flip": True})
    assert [name for name, _ in parse_qsl(write_link(asked, limits))] == [*names, "flip"]


@pytest.mark.parametrize(("name", "value"), HOSTILE, ids=[f"{name}-{value[:12]!r}" for name, value in HOSTILE])
def test_a_hostile_value_is_refused_by_its_name(text_page, name, value):
    limits, first = text_page
    query = urlencode({name.removeprefix("view."): value.encode("utf-8", "surrogatepass")})
    if name == "prompt" and "\ud800" in value:  # the bytes are no UTF-8 and read as replacement characters
        assert "\ufffd" in read_link(query, limits, first)[0].subject
        return
    with pytest.raises(ValueError, match=f"^`{name}` ") as refused:
        read_link(query, limits, first)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_a_setting_that_is_given_twice_is_named(text_page):
    with pytest.raises(ValueError, match=r"^`seed` is given twice"):
        read_link("seed=1&prompt=a&seed=1", *text_page)


def test_names_that_are_no_settings_are_returned_except_those_of_the_host(text_page):
    assert read_link("promt=a&__theme=dark&utm_source=x", *text_page)[1] == ["promt", "utm_source"]


def test_any_query_is_settings_or_an_error_of_one_line(text_page):
    limits, first = text_page

    @given(st.text(max_size=60) | st.dictionaries(st.sampled_from(["seed", "top", "flip"]), st.text()).map(urlencode))
    def check(query):
        try:
            assert isinstance(read_link(query, limits, first)[0], Settings)
        except ValueError as error:
            assert "\n" not in str(error)

    check()


def test_a_class_is_linked_by_number_or_name(class_pipeline):
    pipe = class_pipeline()
    pipe.register_to_config(class_names=["boot", "coat", "bag"])
    limits, first = Limits(pipe), first_settings(pipe, "")
    assert write_link(first._replace(subject=2), limits).startswith("class_labels=2&")
    for text in ("2", "bag"):
        assert read_link(f"class_labels={text}", limits, first)[0].subject == 2
    with pytest.raises(ValueError, match=r"^`class_labels` is 'shoe'"):
        read_link("class_labels=shoe", limits, first)
