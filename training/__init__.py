"""Scripts that train, evaluate and publish; installed, they are `improved_ldm.training`."""
