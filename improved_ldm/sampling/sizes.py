"""Sizes in a call of the pipeline: the size of the images, and the control records."""

from typing import Any

from improved_ldm.conditioning.control import VARIABLES, Control, ratio_warning, whole_image_size
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
        return controls
