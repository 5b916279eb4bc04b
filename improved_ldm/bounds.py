"""Types of user values, with bounds beyond which a value can only be a mistake."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializationInfo,
    TypeAdapter,
    ValidationError,
)

from improved_ldm.places import check_path, shareable_place
from improved_ldm.resolution import resolution_of

SHAREABLE = "shareable"  # the context for dumping a configuration without local folders


def _is_no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"it must be a number, not {str(value).lower()}")
    return value


def _dumped(place: str, info: SerializationInfo) -> str:
    return shareable_place(place) if info.context == SHAREABLE else place


def _is_named(path: Any) -> Any:
    if path == "":  # which would be the current folder
        raise ValueError("a path has at least 1 character")
    return path


def _read_sides(value: Any) -> int | tuple[int, int]:
    """One number of pixels or two; two equal ones are one."""
    is_pair = isinstance(value, list | tuple)
    try:
        sides = _PAIR_OF_PIXELS.validate_python(value) if is_pair else [_PIXELS.validate_python(value)] * 2
    except ValidationError as error:
        problem = error.errors()[0]
        if is_pair and problem["type"] in ("missing", "too_long"):
            raise ValueError("it must be one number of pixels, or [height, width]") from None
        raise ValueError(problem["msg"]) from None
    return resolution_of(*sides)


_Integer = Annotated[int, BeforeValidator(_is_no_boolean)]
Count = Annotated[_Integer, Field(ge=1, le=10**9)]
CountOrZero = Annotated[_Integer, Field(ge=0, le=10**9)]
Seed = Annotated[_Integer, Field(ge=0, lt=2**32)]  # the range of NumPy
BatchSize = Annotated[_Integer, Field(ge=1, le=2**20)]
Pixels = Annotated[_Integer, Field(ge=1, le=2**16)]
_PIXELS, _PAIR_OF_PIXELS = TypeAdapter(Pixels), TypeAdapter(tuple[Pixels, Pixels])
Sides = Annotated[int | tuple[int, int], BeforeValidator(_read_sides)]  # `Pixels` of a square, or [height, width]
Width = Annotated[_Integer, Field(ge=1, le=2**16)]  # channels, tokens, the rank of an adapter
Depth = Annotated[_Integer, Field(ge=1, le=1000)]  # layers
SamplerSteps = Annotated[_Integer, Field(ge=1, le=10**4)]
Parts = Annotated[_Integer, Field(ge=1, le=10**4)]  # of images, for a score
Classes = Annotated[_Integer, Field(ge=1, le=10**6)]
Window = Annotated[_Integer, Field(ge=1, le=10**7)]  # images that are in memory at once
Passes = Annotated[_Integer, Field(ge=0, le=10**4)]
Workers = Annotated[_Integer, Field(ge=0, le=1024)]
Prefetched = Annotated[_Integer, Field(ge=0, le=1024)]  # batches that are in memory at once
Threads = Annotated[_Integer, Field(ge=1, le=1024)]

Number = Annotated[float, BeforeValidator(_is_no_boolean), Field(ge=-1e9, le=1e9)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Probability = Annotated[Number, Field(ge=0, le=1)]
DecayRate = Annotated[Number, Field(ge=0, lt=1)]
Aspect = Annotated[Number, Field(ge=1, le=2**16)]  # longer side / shorter side
Share = Annotated[Number, Field(gt=0, le=1)]  # of a whole

Text = Annotated[str, Field(min_length=1, max_length=10_000)]
Columns = Text | tuple[Text, ...]
Place = Annotated[  # a path or a Hub id
    str, Field(min_length=1, max_length=4096), AfterValidator(check_path), PlainSerializer(_dumped)
]
LocalPath = Annotated[Path, BeforeValidator(_is_named), AfterValidator(check_path)]
