"""The constructor arguments of a published model, read strictly."""

from types import SimpleNamespace
from typing import Any


def read_arguments(
    config: dict[str, Any], defaults: dict[str, Any], fixed: dict[str, Any], ignored: tuple[str, ...] = ()
) -> SimpleNamespace:
    """The arguments that matter, defaults filled in.

    Args:
        config: the source's own constructor arguments.
        defaults: arguments that are carried over, with the source's defaults.
        fixed: arguments that the family has in one value only.
        ignored: arguments that change neither the weights nor the prediction.

    Raises:
        ValueError: for an argument that is unknown, fixed at another value, or of another type than its default.
    """
    for name, value in config.items():
        if name in fixed and value != fixed[name] and not (value is None and not fixed[name]):
            raise ValueError(f"`{name}` is {value!r} in the source's configuration; only {fixed[name]!r} converts.")
        if not (name in defaults or name in fixed or name in ignored or name.startswith("_")):
            known = ", ".join(sorted({*defaults, *fixed, *ignored}))
            raise ValueError(f"`{name}` in the source's configuration is unknown; it may have {known}.")
        if isinstance(default := defaults.get(name), int | float) and isinstance(value, str):
            raise ValueError(
                f"`{name}` is {value!r} in the source's configuration; it must be a number like {default}."
            )
    return SimpleNamespace(**{name: config.get(name, value) for name, value in defaults.items()})
