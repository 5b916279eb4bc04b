"""A trained model or pipeline to another resolution, or to other conditions."""

from improved_ldm.transfer.conditions import Changes, change_conditions
from improved_ldm.transfer.resolution import transfer

__all__ = ["Changes", "change_conditions", "transfer"]
