"""Train a small GIDD model on the embedded corpus, evaluate it, and print text that it wrote.

Example:
  python -m gidd_jax.quickstart --workdir=outputs/quickstart

The workdir then holds summary.json, samples.npz, loss.png, TensorBoard files and checkpoints.
"""

import json
import time
from pathlib import Path

from absl import flags

from gidd_jax.cli import config_flag, run

CONFIG = config_flag("quickstart")
WORKDIR = flags.DEFINE_string("workdir", "outputs/quickstart", "Folder of the run.")
NUM_SAMPLES = 4
NUM_STEPS = 128


def main(argv: list[str]) -> None:
    del argv
    start = time.monotonic()

    import numpy as np

    from gidd_jax.checkpoint import write_atomically
    from gidd_jax.data.pipeline import unigram_bits_per_byte, validation_batches
    from gidd_jax.gidd import Gidd
    from gidd_jax.plots import plot_loss
    from gidd_jax.settings import Settings
    from gidd_jax.trainer import train

    settings, workdir = Settings.from_config(CONFIG.value), Path(WORKDIR.value)
    figures = train(settings, workdir)
    plot_loss(workdir)

    model = Gidd.from_pretrained(workdir)
    validation = validation_batches(
        settings.data,
        model.tokenizer,
        settings.model.max_seq_len,
        settings.train.batch_size,
        max_batches=settings.train.eval_batches,
    )
    unigram = unigram_bits_per_byte(
        settings.data, model.tokenizer, settings.model.max_seq_len, validation
    )
    samples = model.generate(NUM_SAMPLES, seed=settings.seed)
    np.savez(workdir / "samples.npz", ids=samples.ids, texts=np.array(samples.texts))
    for number, text in enumerate(samples.texts):
        print(f"\n--- sample {number} ---\n{text}")

    summary = {
        "bits_per_byte": figures["bits_per_byte"],
        "unigram_bits_per_byte": unigram,
        "perplexity": figures["perplexity"],
        "seconds": round(time.monotonic() - start, 1),
        "steps": settings.train.num_steps,
    }
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(
        f"\nvalidation: {summary['bits_per_byte']:.3f} bits per byte (bound), unigram baseline "
        f"{unigram:.3f}; perplexity {summary['perplexity']:.1f} per token; "
        f"{summary['seconds']:.0f} s\nwritten to {workdir}: summary.json, samples.npz, loss.png"
    )


if __name__ == "__main__":
    run(main)
