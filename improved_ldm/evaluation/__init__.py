"""Evaluation of trained pipelines: classes, orientation, coverage, distances, and obedience to the control."""
