"""The constructor arguments of a published model, read strictly."""

from types import SimpleNamespace
from typing import Any


def read_arguments(
    config: dict[str, Any], defaults: dict[str, Any], fixed: dict[str, Any], ignored: tuple[str, ...] = ()
) -> SimpleNamespace:
    """The arguments that are converted, with defaults filled in.

    Args:
        config: The source's own constructor arguments.
        defaults: Arguments that are converted, with the source's defaults.
        fixed: Arguments for which the family supports one value only.
        ignored: Arguments that change neither the weights nor the prediction.

    Raises:
        ValueError: If an argument is unknown, differs from its fixed value, or has another type than its default.
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
