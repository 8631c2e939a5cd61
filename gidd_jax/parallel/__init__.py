"""On which devices and hosts does it run?

In: mesh settings, the `--distributed` flags, the shapes of parameters with their axis names. Out: a
mesh, the sharding of every array, one process among several. Start reading in `sharding.py`.
"""
