"""What would be slow or large if it were written plainly?

In: hidden states, output weights, tokens. Out: the losses of `loss.py` without a tensor of logits.
Each kernel is tested against its plain twin. Start reading in `fused_loss.py`.
"""
