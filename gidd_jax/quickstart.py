"""Train a small GIDD model on the embedded corpus, evaluate it, and print text that it wrote.

The texts are drawn with --method=entropy_bound --epsilon=0.3 --temperature=0.8 of gidd_jax.sample.

Examples:
  python -m gidd_jax.quickstart --workdir=outputs/quickstart
  python -m gidd_jax.quickstart --workdir=outputs/short --config.train.num_steps=100

The workdir then holds summary.json (its `seconds` are those of this start, installing aside),
samples.npz, loss.png, plots/, TensorBoard files and checkpoints.
"""

import time
from pathlib import Path
from typing import Any

from gidd_jax.cli import CommandFlags, config_flag, printable, run

flags = CommandFlags()
CONFIG = config_flag(flags, "quickstart")
WORKDIR = flags.DEFINE_string("workdir", "outputs/quickstart", "Folder of the run.")
NUM_SAMPLES = 4
# Of so small a model the surest tokens first, and the probable ones, read best.
DRAWN: dict[str, Any] = {"method": "entropy_bound", "epsilon": 0.3, "temperature": 0.8}
NUM_SAMPLES_T = 4  # times drawn per validation row


def main(argv: list[str]) -> None:
    del argv
    start = time.monotonic()

    from gidd_jax.checkpoints.checkpoint import find_checkpoint
    from gidd_jax.data.pipeline import unigram_bits_per_byte, validation_batches
    from gidd_jax.evaluation import corpora, scoring
    from gidd_jax.evaluation.reports import write_report
    from gidd_jax.inference.gidd import Gidd
    from gidd_jax.inference.samples import save_samples
    from gidd_jax.sections import split_own_process
    from gidd_jax.settings import Settings
    from gidd_jax.training.loop import train
    from gidd_jax.views import pictures

    settings, workdir = Settings.from_config(CONFIG.value), Path(WORKDIR.value)
    train(settings, workdir)
    if find_checkpoint(workdir).step < settings.train.num_steps:
        return  # stopped by a signal; the same command continues

    # Who names a file to train with has said that its code may run.
    own = settings.process.name if split_own_process(settings.process.name) else None
    model = Gidd.from_pretrained(workdir, process=own)
    how = DRAWN if model.process is not None else {}
    samples = model.generate(NUM_SAMPLES, seed=settings.seed, **how)
    save_samples(workdir / "samples.npz", samples, model.tokenizer)
    for number, text in enumerate(samples.texts):
        print(f"\n--- sample {number} ---\n{printable(text)}")

    corpus = corpora.open_rows(settings.data, "validation", model, is_own=True)
    scores = scoring.score_rows(
        model,
        corpus,
        num_samples_t=NUM_SAMPLES_T,
        batch_size=16,
        seed=settings.seed,
        label="Evaluating",
    )
    figures = scoring.corpus_figures(
        model.process, corpus, scores, num_resamples=1000, seed=settings.seed
    )
    data = (settings.data, model.tokenizer, model.max_seq_len)
    unigram = unigram_bits_per_byte(*data, validation_batches(*data, settings.train.batch_size))
    summary = {
        "bits_per_byte": figures["bits_per_byte"],
        "bits_per_byte_standard_error": figures["bits_per_byte_standard_error"],
        "unigram_bits_per_byte": unigram,
        "perplexity": figures["perplexity"],
        "seconds": round(time.monotonic() - start, 1),
        "steps": settings.train.num_steps,
    }
    write_report(workdir / "summary.json", summary)
    pictures.save_figures({"loss": pictures.loss_picture(workdir)}, workdir, formats=["png"])
    drawn = pictures.run_pictures(workdir, process=own)
    if "profile" in figures:  # of diffusion models
        drawn["profile"] = pictures.profile_picture({"validation": figures["profile"]})
    pictures.save_figures(drawn, workdir / "plots")
    print(
        f"\nvalidation: {summary['bits_per_byte']:.3f} bits per byte (an upper bound), "
        f"{1 - summary['bits_per_byte'] / unigram:.1%} below the unigram baseline {unigram:.3f}; "
        f"perplexity {summary['perplexity']:.1f} per token; {summary['seconds']:.0f} s\n"
        f"written to {workdir}: summary.json, samples.npz, loss.png, plots/"
    )


if __name__ == "__main__":
    run(main, flags, resumes=True)
