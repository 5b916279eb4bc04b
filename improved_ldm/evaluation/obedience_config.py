"""The settings of the measurement of obedience, apart from it: a configuration loads no libraries of metrics."""

from typing import Annotated

from pydantic import Field

from improved_ldm.bounds import Count, Place
from improved_ldm.settings import Section


class ObedienceConfig(Section):
    """Settings of the measurement of obedience to class and control."""

    judge: Place | None = "embedded:judge"
    """`embedded:judge` or the folder of a Judge, used only with its own data set; null skips the measurement."""
    num_samples: Annotated[Count, Field(ge=2)] = 500
    """Number of images whose class and orientation are judged."""
    num_coverage_samples: Annotated[Count, Field(ge=6)] = 1000
    """Number of images for coverage and FID."""
    num_detail_samples: Count = 100
    """Number of images that are sampled at five original sizes each."""

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of samples, as arguments of `evaluate_obedience`."""
        return self.model_dump(exclude={"judge"})
