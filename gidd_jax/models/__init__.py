"""Which networks are there?

In: noisy tokens z_t [B, L] and times t (the autoregressive baseline: tokens alone). Out: logits
[B, L, V]. Start reading in `dit.py`; what DiT and Llama share is in `layers.py`.
"""
