"""Transfer of a trained model or pipeline to another resolution or to other conditions."""

from improved_ldm.transfer.conditions import change_conditions
from improved_ldm.transfer.resolution import transfer

__all__ = ["change_conditions", "transfer"]
