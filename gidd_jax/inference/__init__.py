"""How is a trained model used: texts in, texts out?

In: a trained model, prompts and options. Out: samples, corrections, likelihoods, suspicions.
Start reading in `gidd.py`; `programs.py` holds what it compiles.
"""
