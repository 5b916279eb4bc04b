"""The denoisers, one backbone a file, and the layers and the trunk that they share."""
