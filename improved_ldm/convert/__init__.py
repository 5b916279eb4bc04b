"""Conversion of published weights to the family and back; `python -m improved_ldm.convert` converts a checkpoint."""

from improved_ldm.convert.sources import SOURCES, from_published, to_published
from improved_ldm.convert.warm_start import disentangle

__all__ = ["SOURCES", "disentangle", "from_published", "to_published"]
