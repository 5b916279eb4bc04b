"""What the page does for its visitors: drawing, going back to a drawing, opening a link, and forgetting."""

from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from improved_ldm.demo.comparison import SHAPE, Settings, View, compare, described, view_arguments
from improved_ldm.demo.editor import picture_url
from improved_ldm.demo.limits import MAX_SEED, Limits
from improved_ldm.demo.link import read_link, write_link
from improved_ldm.demo.opening import first_settings
from improved_ldm.demo.pictures import PictureFolder
from improved_ldm.demo.server import refuse, warn
from improved_ldm.picture_text import picture_text
from improved_ldm.pipeline import ImprovedLDMPipeline

KEPT = 24  # entries in the gallery
FAILURE = "The drawing failed. Try other settings, or try again later."


class Drawing(NamedTuple):
    """A pair of images and their settings.

    Args:
        settings: Settings of the images.
        plain: Image file of the default view.
        asked: Image file of the requested view.
    """

    settings: Settings
    plain: str
    asked: str


class Studio:
    """Draws for the visitors of a page; the first pair is drawn at once.

    Args:
        pipeline: Pipeline to sample from.
        model: Name of the pipeline in the text of the images.
        prompt: First prompt, for a text model.

    Raises:
        ValueError: If the first prompt is out of bounds.
    """

    def __init__(self, pipeline: ImprovedLDMPipeline, model: str, prompt: str):
        self.pipeline, self.model = pipeline, model
        self.limits, self.pictures = Limits(pipeline), PictureFolder()
        settings = self.limits.check(*first_settings(pipeline, prompt))
        texts = self._texts(settings)
        self.first_images = compare(pipeline, settings)
        files = map(self.pictures.keep, ("plain", "asked"), self.first_images, texts)
        self.first = Drawing(settings, *files)

    def draw(
        self,
        history: list[Drawing],
        subject,
        seed,
        guidance_scale,
        control_guidance_scale,
        num_inference_steps,
        view,
        progress=gr.Progress(),  # noqa: B008 - Gradio passes one for this default
    ):
        """Draw the default view and the requested view with the same seed."""
        values = (subject, seed, guidance_scale, control_guidance_scale, num_inference_steps, view)
        return self._draw(history, self._checked(*values), progress)

    def draw_new(self, history: list[Drawing], *values):
        """As `draw`; settings that the gallery has take the next seed, so that something new is drawn."""
        *values, progress = values
        settings, drawn = self._checked(*values), [past.settings for past in history]
        while settings in drawn:
            settings = settings._replace(seed=(settings.seed + 1) % (MAX_SEED + 1))
        return self._draw(history, settings, progress)

    def go_back(self, history: list[Drawing], chosen: gr.EventData):
        """Show an entry of the gallery and its settings again."""
        try:
            settings, plain, asked = history[chosen.index]
            picture = picture_url(Image.open(plain))
        except (
            AttributeError,
            IndexError,
            TypeError,
            OSError,
        ):  # a client can send any event, and files can be removed
            refuse(f"the chosen drawing is not one of the {len(history)} in the gallery.")
        *values, view = settings
        return *values, gr.update(value=view, picture=picture), write_link(settings, self.limits), plain, asked

    def open_link(self, opened: gr.EventData):
        """The settings in the query of the page's address."""
        try:
            settings, unknown = read_link(opened.query, self.limits, self.first.settings)
        except (AttributeError, TypeError):  # a client can send any event
            refuse("the link is not opened: it has no query.")
        except ValueError as error:
            refuse(f"the link is not opened: {error}")
        if unknown:
            warn(f"the link has {', '.join(unknown)}, which this page does not know and leaves out.")
        return tuple(settings)

    def forget(self, history: list[Drawing]):
        """Remove the images of a visit."""
        self.pictures.remove(file for drawing in history for file in (drawing.plain, drawing.asked))

    def gallery(self, history: list[Drawing]) -> list[tuple[str, str]]:
        """The images of the gallery with their captions."""
        return [(past.asked, self._caption(past.settings)) for past in history]

    def _checked(self, *values: Any) -> Settings:
        try:
            return self.limits.check(*values)
        except ValueError as error:
            refuse(str(error))

    def _draw(self, history: list[Drawing], settings: Settings, progress: gr.Progress):
        """Draw settings; returns the history, the gallery, the link, the seed, the editor and both images."""
        total = settings.num_inference_steps
        try:
            images = compare(
                self.pipeline, settings, lambda done: progress((done, total), desc="Drawing", unit="steps")
            )
        except ValueError as error:
            refuse(str(error))
        except Exception as error:  # the message may reveal details of the server, so only the log has it
            raise gr.Error(FAILURE) from error
        plain, asked = map(self.pictures.save, images, self._texts(settings))
        # leave out images that were removed to make room for those of other visitors
        history = [Drawing(settings, plain, asked), *(past for past in history if past.plain in self.pictures)]
        self.forget(history[KEPT:])
        history = history[:KEPT]
        link, editor = write_link(settings, self.limits), gr.update(picture=picture_url(images[0]))
        return history, self.gallery(history), link, settings.seed, editor, plain, asked

    def _subject(self, settings: Settings) -> str:
        return settings.subject if self.pipeline.takes_text else self.pipeline.class_name(settings.subject)

    def _caption(self, settings: Settings) -> str:
        view = settings.view
        is_default = view == self.limits.view
        asked = "" if is_default else f" · {described(view, self.limits.shapes[view[SHAPE]])}"
        return f"{self._subject(settings)} · seed {settings.seed}{asked}"

    def _texts(self, settings: Settings) -> list[dict[str, str]]:
        """The texts in the files of both images."""
        return [self._text(settings, view) for view in (self.limits.views[settings.view[SHAPE]], settings.view)]

    def _text(self, settings: Settings, view: View) -> dict[str, str]:
        read, drawn = self.pipeline.denoiser.control_inputs, self.limits.shapes[view[SHAPE]]
        return picture_text(
            {self.limits.subject: self._subject(settings)},
            settings.seed,
            view_arguments(view, read, drawn),
            self.model,
            guidance_scale=settings.guidance_scale,
            control_guidance_scale=settings.control_guidance_scale,
            num_inference_steps=settings.num_inference_steps,
        )
