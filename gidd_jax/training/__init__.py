"""How does a network learn: one update, and the loop around it?

In: settings, batches, a mesh. Out: parameters in checkpoints, figures in logs. Start reading in
`state.py` (what is optimised, and one update), then `loop.py` (a run from start to end).
"""
