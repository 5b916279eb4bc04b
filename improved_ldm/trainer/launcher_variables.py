"""The environment variables with which `accelerate launch` and `accelerate config` set keys of `training`."""

import os

LAUNCHER_VARIABLES = {  # key of `training` → variable
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}
UNLAUNCHED = {"mixed_precision": "no", "gradient_accumulation_steps": 1}  # if the launcher asks for nothing
UNSAID = ("", "no", "1", "auto")  # what the launcher sets by default


def launched_with(key: str) -> str | None:
    """The launcher's value for a key of `LAUNCHER_VARIABLES`; None if it does not set one."""
    value = os.environ.get(LAUNCHER_VARIABLES[key], "").lower()
    return None if value in UNSAID else value
