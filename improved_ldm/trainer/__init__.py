"""What the training scripts share: typed config, loop, state and resume, EMA, reports."""
