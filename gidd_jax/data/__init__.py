"""How does a corpus become batches?

In: a data path, a tokenizer, a rule for the validation split. Out: the batches of a run, resumable
at any row, and shards that are tokenised once. Start reading in `pipeline.py`; `corpus.py` finds
the documents, `rows.py` makes rows of them; `arrays.py` reads rows that are ids already.
"""
