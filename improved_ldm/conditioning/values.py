"""Reading of arguments: valid values are accepted in any suitable type, all others are refused with one line.

Numbers may be from NumPy and PyTorch; sequences are lists, tuples, arrays and tensors. A boolean is not a number,
a string is neither a number nor a sequence, and a number with a decimal point is not an integer.
"""

from collections.abc import Callable, Collection
from typing import Any, NoReturn

MAX_SIDE = 2**20  # pixels per side of an image; more can only be a mistake
MIN_SIDE = 1e-6  # pixels; keeps ratios of sizes well inside the range of float32
MAX_NUMBER = 1e9
SHOWN = 120  # characters of a value in a message, at most
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}

Size = tuple[float, float]


def refuse(name: str, value: Any, wanted: str) -> NoReturn:
    """Raise a ValueError that names an argument, the caller's value and the valid values."""
    raise ValueError(f"`{name}` is {shown(value)}; it must be {wanted}.")


def shown(value: Any) -> str:
    """A value as the caller typed it, in one line of limited length."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer with more digits than Python converts to text
        text = f"{type(value).__name__} of more digits than can be shown"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def plain(value: Any) -> Any:
    """Convert an array, a tensor or one of their numbers to Python values; other values are returned unchanged."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def is_sequence(value: Any) -> bool:
    """Whether a value is a list, a tuple, or an array or tensor with at least one dimension."""
    return isinstance(value, list | tuple) or (not isinstance(value, type) and getattr(value, "ndim", 0) > 0)


def read_integer(name: str, value: Any, minimum: int, maximum: int) -> int:
    """An integer in [`minimum`, `maximum`].

    Raises:
        ValueError: If the value or its type is not valid.
    """
    read = plain(value)
    if type(read) is not int or read < minimum:
        refuse(name, value, f"an integer ≥ {minimum}")
    if read > maximum:
        refuse(name, value, f"an integer ≤ {maximum}")
    return read


def read_number(name: str, value: Any, minimum: float = -MAX_NUMBER, maximum: float = MAX_NUMBER) -> int | float:
    """A finite number in [`minimum`, `maximum`]; integers stay integers.

    Raises:
        ValueError: If the value or its type is not valid.
    """
    read = plain(value)
    if not _is_number(read) or not minimum <= read <= maximum:  # NaN is in no range
        refuse(name, value, f"a number from {minimum:g} to {maximum:g}")
    return read


def read_size(name: str, value: Any, minimum_is_zero: bool = False) -> Size:
    """(height, width) or (top, left) in pixels, from two numbers.

    Args:
        name: Name of the argument.
        value: Two numbers.
        minimum_is_zero: Whether the numbers may be 0, like those of a corner.

    Raises:
        ValueError: If the value or its type is not valid.
    """
    return read_vector(name, value, 2, 0 if minimum_is_zero else MIN_SIDE, MAX_SIDE)


def read_vector(name: str, value: Any, length: int, minimum: float, maximum: float) -> tuple[int | float, ...]:
    """`length` numbers in [`minimum`, `maximum`].

    Raises:
        ValueError: If the value or its type is not valid.
    """
    read, wanted = tuple(map(plain, value)) if is_sequence(value) else (), f"{NUMBER_WORDS[length]} numbers"
    if len(read) != length or not all(map(_is_number, read)):
        refuse(name, value, wanted)
    if not all(minimum <= number <= maximum for number in read):
        refuse(name, value, f"{wanted} from {minimum:g} to {maximum}")
    return read


def read_flag(name: str, value: Any) -> bool:
    """A boolean, which may be given as 0 or 1.

    Raises:
        ValueError: If the value or its type is not valid.
    """
    read = plain(value)
    if not isinstance(read, int | float) or read not in (0, 1):
        refuse(name, value, "True or False")
    return bool(read)


def read_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """One of the strings in `choices`.

    Raises:
        ValueError: If the value or its type is not valid.
    """
    if not isinstance(value, str) or value not in choices:
        refuse(name, value, f"one of {', '.join(choices)}")
    return value


def read_texts(name: str, value: Any) -> list[str]:
    """One or several strings, as a list with at least one.

    Raises:
        ValueError: If the value or its type is not valid.
    """
    values = list(plain(value)) if is_sequence(value) else [value]
    if not values or not all(isinstance(item, str) for item in values):
        refuse(name, value, "a string or a list of at least one string")
    try:
        "".join(values).encode("utf-8")
    except UnicodeEncodeError:
        refuse(name, value, "text that UTF-8 can encode; half of a surrogate pair is not a character")
    return [str(item) for item in values]


def read_numbers(name: str, value: Any, minimum: float, maximum: float) -> list[int | float]:
    """Several numbers in [`minimum`, `maximum`], at least one.

    Raises:
        ValueError: If the value or its type is not valid.
    """
    if not is_sequence(value) or not len(value):
        refuse(name, value, "a list of at least one number")
    return [read_number(name, item, minimum, maximum) for item in plain(value)]


def is_one_value(value: Any) -> bool:
    """Whether a value is one for all samples: not a sequence."""
    return not is_sequence(value)


def is_one_vector(value: Any) -> bool:
    """Whether a value is one vector for all samples: not a sequence of vectors, some of which may be None."""
    if not is_sequence(value):
        return True
    items = list(value)
    return not all(item is None or is_sequence(item) for item in items)


def read_per_sample(name: str, value: Any, batch_size: int, is_one: Callable[[Any], bool] = is_one_value) -> list:
    """One value per sample, from one value for all samples or a sequence with one per sample.

    Args:
        name: Name of the argument.
        value: One value or a sequence.
        batch_size: Number of samples.
        is_one: Function that returns whether a value is one for all samples.

    Raises:
        ValueError: If a sequence has another length.
    """
    if is_one(value):
        return [value] * batch_size
    if len(value) != batch_size:
        kind = type(value).__name__
        raise ValueError(
            f"`{name}` is a {kind} of {len(value)}; it must have one value for each of {batch_size} samples."
        )
    return list(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
