"""Draw texts from a trained model: a checkpoint of GIDD, MDLM or the autoregressive baseline.

Examples:
  python -m gidd_jax.sample --checkpoint=outputs/quickstart --num_samples=4 --num_steps=128
  python -m gidd_jax.sample --checkpoint=RUN --num_samples=64 --min_p=0.001 --out=samples.npz

The npz file holds `ids` (int32 [N, L]) and `texts` (N strings).
"""

from pathlib import Path

from absl import flags

from gidd_jax.cli import run
from gidd_jax.errors import InputError

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Workdir of a run, or one of its checkpoints.", required=True
)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 16, "Sequences to draw.", lower_bound=1)
NUM_STEPS = flags.DEFINE_integer(
    "num_steps", 128, "Denoising steps, each one network call (diffusion only).", lower_bound=1
)
OUT = flags.DEFINE_string("out", None, "File to write, ending in .npz.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences drawn together.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", None, "Tokens per sequence. Default: the context.")
SEED = flags.DEFINE_integer("seed", 0, "Seed; the same seed draws the same texts.", lower_bound=0)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of the predicted distribution; 0 is greedy.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Drop tokens below this posterior probability.")
GRID = flags.DEFINE_enum(
    "grid", "uniform", ["uniform", "reference"], "Time grid; reference: the original's."
)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average of the parameters.")


def main(argv: list[str]) -> None:
    del argv
    out = Path(OUT.value) if OUT.value else None
    if out is not None:
        if out.suffix != ".npz":
            raise InputError(f"--out must end in .npz: {out}")
        if out.parent.exists() and not out.parent.is_dir():
            raise InputError(f"--out: {out.parent} is not a folder")

    import numpy as np

    from gidd_jax.gidd import Gidd
    from gidd_jax.sampler import SamplerOptions

    options = SamplerOptions(
        num_steps=NUM_STEPS.value,
        temperature=TEMPERATURE.value,
        min_p=MIN_P.value,
        grid=GRID.value,
    )
    model = Gidd.from_pretrained(CHECKPOINT.value, ema=EMA.value)
    samples = model.generate(
        NUM_SAMPLES.value,
        batch_size=BATCH_SIZE.value,
        length=LENGTH.value,
        seed=SEED.value,
        options=options,
    )
    for number, text in enumerate(samples.texts):
        print(f"--- sample {number} ---\n{text}\n")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(out, ids=samples.ids, texts=np.array(samples.texts))
        print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
