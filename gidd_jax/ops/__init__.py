"""Fast versions of what `loss.py` and `sampling/` define, tested against their plain twins."""
