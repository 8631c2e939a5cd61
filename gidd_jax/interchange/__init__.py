"""How do other people's weights come in, and ours go out?

In: a folder or hub name: a run, the published Hugging Face format, the original's checkpoint. Out:
a network with its parameters, process and tokenizer, and folders that others read. Start in
`load.py`; `tensors.py` has the names and layouts of the weights.
"""
