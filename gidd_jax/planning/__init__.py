"""What will a run need, and how fast can it be at most?

In: settings and a topology such as v5e-256. Out: memory and time of a step, without the devices.
Start reading in `plan.py`; `ahead.py` compiles for devices that are not here.
"""
