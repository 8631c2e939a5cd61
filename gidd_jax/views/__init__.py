"""What do people look at?

In: figures, traces, suspicions. Out: plots, pages and terminal pictures. Start in `pictures.py` for
plots, in `replay_page.py` for the replay.
"""
