"""Measurements of gidd_jax against the limits of the machine and a plain PyTorch twin."""
