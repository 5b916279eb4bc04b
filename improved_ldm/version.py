"""The version of the package, also of the files that it writes."""

__version__ = "0.1.0"
