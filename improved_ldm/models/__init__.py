"""The denoisers, one backbone per file, and the layers and the trunk that they share."""
