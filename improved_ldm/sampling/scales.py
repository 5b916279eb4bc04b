"""The guidance scales and options of a call of the pipeline."""

from typing import Any

from improved_ldm.conditioning.guidance import GuidanceOptions
from improved_ldm.conditioning.values import read_number
from improved_ldm.sampling.arguments import MAX_SCALE
from improved_ldm.sampling.components import check_channels


class ScalesMixin:
    """The part of the pipeline that reads how strongly, where and when a call is guided."""

    def read_guidance(
        self, guidance_scale: Any, control_guidance_scale: Any, guidance_rescale: Any, guidance_options: Any
    ) -> dict[str, Any]:
        """The guidance of a call as arguments of `GuidedConditions`, checked; for the arguments see the call.

        Raises:
            ValueError: If a value is not valid, control guidance is given to a model that reads no control, or more
                channels are to be guided than the latents have.
        """
        scales = {
            "guidance_scale": self.config.default_guidance_scale if guidance_scale is None else guidance_scale,
            "control_guidance_scale": control_guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        largest = {"guidance_rescale": 1}
        scales = {name: read_number(name, value, 0, largest.get(name, MAX_SCALE)) for name, value in scales.items()}
        beta = scales["control_guidance_scale"]
        if beta != 1 and not self.denoiser.control_inputs:
            raise ValueError(f"`control_guidance_scale` is {beta}; the model reads no control, so it must be 1.")
        options = GuidanceOptions.plain(self.config.guidance_options if guidance_options is None else guidance_options)
        check_channels(options, self.denoiser.config.in_channels)
        return scales | {"options": GuidanceOptions.read(options)}
