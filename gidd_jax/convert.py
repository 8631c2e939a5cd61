"""Write a model as a Hugging Face folder: config.json, model.safetensors and its tokenizer.

Reads whatever the other commands read: a run of gidd_jax.train, a checkpoint of the original's
training, a Hugging Face folder or owner/name on the hub. Diffusion models are written in the format
of the published GIDD models, autoregressive ones as a Llama that transformers loads by itself.

Examples:
  python -m gidd_jax.convert --checkpoint=outputs/quickstart --out=quickstart-hf
  python -m gidd_jax.convert --checkpoint=original/checkpoint --out=gidd-small
  python -m gidd_jax.convert --checkpoint=OWNER/NAME --row_mode=crop --out=gidd-cropped
  python -m gidd_jax.convert --checkpoint=RUN --dtype=bfloat16 --out=half
"""

from gidd_jax.cli import CommandFlags, run
from gidd_jax.model_flags import checkpoint_flag, dtype_flag

flags = CommandFlags()
CHECKPOINT = checkpoint_flag(flags)
OUT = flags.DEFINE_string("out", None, "Folder to write; it must not exist.", required=True)
ROW_MODE = flags.DEFINE_string(
    "row_mode",
    None,
    "How training framed the rows of a diffusion model that is no run of gidd_jax.train: crop, "
    "packed or padded. Default: as its folder says, or else packed.",
)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average of the parameters.")
DTYPE = dtype_flag(flags)


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.interchange.load import load_pretrained
    from gidd_jax.interchange.save import check_new_folder, save_pretrained

    out = check_new_folder(OUT.value)  # before the work, not after it
    model = load_pretrained(
        CHECKPOINT.value,
        ema=EMA.value,
        row_mode=ROW_MODE.value,
        built_in=True,
        dtype=DTYPE.value,
    )
    save_pretrained(model, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main, flags)
