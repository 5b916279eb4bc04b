"""What a trained pipeline is worth: classes, orientation, coverage, distances, obedience to the control."""
