"""How does a network learn: one update, and the loop around it?

In: settings, batches, a mesh. Out: parameters in checkpoints, figures in logs. Start reading in
`objective.py` (what is optimised) and `step.py` (one update), then `loop.py` (a whole run).
"""
