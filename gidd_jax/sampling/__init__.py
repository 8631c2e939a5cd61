"""How does noise become tokens, and how are wrong tokens found and mended?

In: a network, a process, options and maybe a prompt. Out: token ids, and a trace of how they came
about. Start reading in `steps.py` (one denoising step), then `loop.py` (the steps of a whole run).
"""
