"""Random DiT-like models under random plans: equal to the plain model, or refused in words."""
