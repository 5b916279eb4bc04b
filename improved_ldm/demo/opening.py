"""What the page shows before anything is asked: the first pair of images, and pictures of what the scales change."""

from collections.abc import Iterator

from PIL import Image

from improved_ldm.conditioning.control import RECTANGLE
from improved_ldm.demo.comparison import CHOICES, Settings, View, default_view, sample, view_arguments
from improved_ldm.pipeline import ImprovedLDMPipeline

FIRST_SEED = 7
FIRST_CROP = (0.2, 0.05, 0.65, 0.65)  # top, left, height, width as fractions of the image
SMALL = 0.3  # side of a small original image, as a fraction of the default
STRESSED = 3.0  # control guidance scale that exaggerates the control
THUMBNAIL = 96  # pixels of the longer side

Strip = list[tuple[float, Image.Image]]  # values of a scale and what is drawn with them


def first_settings(pipeline: ImprovedLDMPipeline, prompt: str) -> Settings:
    """The settings with which the page starts.

    Args:
        pipeline: Pipeline of the page; its defaults are taken.
        prompt: Prompt for a text model; a class model starts with its first class.
    """
    return Settings(
        prompt if pipeline.takes_text else 0,
        FIRST_SEED,
        pipeline.config.default_guidance_scale,
        1.0,
        pipeline.config.default_num_inference_steps,
        first_view(pipeline),
    )


def first_view(pipeline: ImprovedLDMPipeline) -> View:
    """The first view of `_telling_views` that the model has learned to show; the default one if there is none."""
    read = pipeline.denoiser.control_inputs
    default = default_view(pipeline)
    plain = view_arguments(default, read, pipeline.default_size)
    for view in _telling_views(default):
        arguments = view_arguments(view, read, pipeline.default_size)
        if arguments != plain and pipeline.saw_control(**arguments):
            return view
    return default


def _telling_views(default: View) -> Iterator[View]:
    """Views that differ visibly from the default one: a crop, then the switches and choices, then little detail."""
    side, _, _, height, width = (default[name] for name in RECTANGLE)
    sides = (height, width, height, width)
    crop = [round(share * whole) for share, whole in zip(FIRST_CROP, sides, strict=True)]
    yield default | dict(zip(RECTANGLE, (side, *crop), strict=True))
    for row in CHOICES:
        if row.name in default:
            yield default | {row.name: True if row.is_switch else next(iter(row.shown((side, side))))}
    small = [value * SMALL for value in (side, 0, 0, height, width)]
    yield default | dict(zip(RECTANGLE, small, strict=True))


def guidance_strip(pipeline: ImprovedLDMPipeline, first: Settings, plain: Image.Image, highest: float) -> Strip:
    """The default view at guidance scales from 1 to the highest one; `plain` is that of the first settings."""
    values = sorted({1.0, first.guidance_scale, highest})
    settings = first._replace(view=default_view(pipeline))
    return _strip(
        pipeline, [settings._replace(guidance_scale=value) for value in values], values, {first.guidance_scale: plain}
    )


def control_strip(pipeline: ImprovedLDMPipeline, first: Settings, asked: Image.Image) -> Strip:
    """The first view at control guidance scales from 0, which ignores it; `asked` is that of the first settings."""
    values = [0.0, first.control_guidance_scale, STRESSED]
    settings = [first._replace(control_guidance_scale=value) for value in values]
    return _strip(pipeline, settings, values, {first.control_guidance_scale: asked})


def _strip(
    pipeline: ImprovedLDMPipeline, settings: list[Settings], values: list[float], drawn: dict[float, Image.Image]
) -> Strip:
    images = (
        drawn[value] if value in drawn else sample(pipeline, one, [one.view])[0]
        for one, value in zip(settings, values, strict=True)
    )
    return [(value, _thumbnail(image)) for value, image in zip(values, images, strict=True)]


def _thumbnail(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small
