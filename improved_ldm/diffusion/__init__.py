"""Noise schedules and training objectives."""
