"""Sizes in a call of the pipeline: the size of the images, and the control records."""

from typing import Any

from improved_ldm.conditioning.control import (
    ASPECT_RATIO,
    VARIABLES,
    Control,
    ratio_warning,
    variables_read,
    whole_image_size,
)
from improved_ldm.conditioning.control_ranges import ControlRanges
from improved_ldm.conditioning.control_row import Variable
from improved_ldm.conditioning.values import MAX_SIDE, plain, read_integer, read_per_sample, refuse
from improved_ldm.sampling.arguments import check_pixels, logger


class SizesMixin:
    """The part of the pipeline that reads sizes and control arguments."""

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the denoiser was trained at."""
        side = self.denoiser.config.sample_size * self.vae_scale_factor
        return tuple(self.config.default_size or (side, side))

    @property
    def default_original_side(self) -> int:
        """Default of the original image's shorter side, in pixels, for samples of the default size."""
        return self._original_side(*self.default_size)

    @property
    def default_image_size(self) -> tuple[float, float]:
        """(height, width), in pixels, of the image that samples of the default size are views of by default."""
        return whole_image_size(self.default_size, self.default_original_side)

    def _original_side(self, height: int, width: int) -> int:
        return self.config.default_original_size or min(height, width)

    def latent_shape(self, num_images: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape of the latents for `num_images` images of `height` x `width` pixels."""
        factor = self.vae_scale_factor
        return (num_images, self.denoiser.config.in_channels, height // factor, width // factor)

    def read_sides(self, height: Any, width: Any, num_images: int) -> tuple[int, int]:
        """Height and width of the images in pixels, by default those that the denoiser was trained at.

        Raises:
            ValueError: If a side does not divide into latent pixels and patches, or there are too many pixels.
        """
        multiple = self.vae_scale_factor * self.denoiser.patch_size
        sides = []
        for name, given, default in zip(("height", "width"), (height, width), self.default_size, strict=True):
            value = default if given is None else given
            pixels = plain(value)
            if type(pixels) is not int or pixels <= 0 or pixels % multiple:
                refuse(name, value, f"a positive multiple of {multiple} pixels")
            sides.append(read_integer(name, pixels, 1, MAX_SIDE))
        check_pixels(*sides, num_images)
        return tuple(sides)

    def make_controls(self, batch_size: int, height: int, width: int, **given: Any) -> list[Control] | None:
        """One control record per prompt, with defaults filled in; None if the model reads no control.

        Records may have another aspect ratio than the images; a warning is logged then.

        Args:
            batch_size: Number of prompts.
            height: Height of the images in pixels.
            width: Width of the images in pixels.
            given: Control arguments of the call, each one value for all prompts or a sequence with one per prompt;
                None takes the default.

        Raises:
            ValueError: If a list has the wrong length, sizes are impossible, or the model does not read the control.
        """
        read = self.denoiser.control_inputs
        for name, value in given.items():
            if value is not None and name not in read:
                raise ValueError(
                    f"`{name}` is given, but the model reads no such control; "
                    f"it reads {', '.join(sorted(read)) or 'none'}."
                )
        if not read:
            return None
        columns = {
            row.name: read_per_sample(row.name, given.get(row.name), batch_size, row.is_one) for row in VARIABLES
        }
        side = self._original_side(height, width)
        controls = [
            Control.asked(dict(zip(columns, values, strict=True)), (height, width), side)
            for values in zip(*columns.values(), strict=True)
        ]
        if warning := ratio_warning(controls, height, width):
            logger.warning(warning)
        self._warn_of_control({name for name, value in given.items() if value is not None}, controls)
        return controls

    def varied_control(self) -> tuple[Variable, ...]:
        """The control variables that the denoiser reads and that varied in its training, as far as that is known."""
        ranges = ControlRanges(self.config.control_seen)
        return tuple(row for row in variables_read(self.denoiser.control_inputs) if ranges.varied(row))

    def saw_control(self, **given: Any) -> bool:
        """Whether control arguments are within what the model was trained with, as far as that is known."""
        ranges, control = (
            ControlRanges(self.config.control_seen),
            self.make_controls(1, *self.default_size, **given)[0],
        )
        return all(ranges.holds(row, control) for row in variables_read(given))

    def saw_shape(self, height: int, width: int) -> bool:
        """Whether it is known that the model was trained with images of this aspect ratio."""
        ranges, controls = ControlRanges(self.config.control_seen), self.make_controls(1, height, width)
        (row,) = variables_read({ASPECT_RATIO})
        return controls is not None and ranges.is_known and ranges.holds(row, controls[0])

    def _warn_of_control(self, given: set[str], controls: list[Control]):
        """Say once of each given variable that never varied in training, if another value is asked for."""
        ranges = ControlRanges(self.config.control_seen)
        for row in variables_read(given - self._said_control):
            if not ranges.varied(row) and not all(ranges.holds(row, control) for control in controls):
                self._said_control.add(row.name)
                logger.warning(
                    f"`{row.name}` is given, but it never varied in the training samples: the model has not learned "
                    "what it does."
                )
