"""How good is a model, how good are its texts, and is a process what it says it is?

In: a model and a corpus, texts and a scorer, a process. Out: figures with their errors. Start in
`scoring.py` (how well a model predicts a corpus); each other file answers one question of its own.
"""
