"""From stored images to training batches: sources of rows, image transforms and loaders."""
