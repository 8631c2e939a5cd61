"""Fast versions of what `loss.py` and `sampler.py` define, tested against their plain twins."""
