"""What does a run leave behind, and how does it stay whole?

In: a run's folder, local or in a bucket; its state, settings, tokenizer and place in the data. Out:
checkpoints that are complete or not there, checked when they are read. Start in `checkpoint.py`.
"""
