"""The parts of `training/published.py`: the published models, their weights, and the comparison with them."""
