"""Write a model as a Hugging Face folder: config.json, model.safetensors and its tokenizer.

Reads whatever the other commands read: a run of gidd_jax.train, a checkpoint of the original's
training, a Hugging Face folder or owner/name on the hub. Diffusion models are written in the format
of the published GIDD models, autoregressive ones as a Llama that transformers loads by itself.
README.md is a model card. --with_code adds PyTorch code, with which transformers loads a diffusion
model, too (trust_remote_code=True), and samples from it.

Examples:
  python -m gidd_jax.convert --checkpoint=outputs/quickstart --out=quickstart-hf
  python -m gidd_jax.convert --checkpoint=original/checkpoint --out=gidd-small
  python -m gidd_jax.convert --checkpoint=OWNER/NAME --row_mode=crop --out=gidd-cropped
  python -m gidd_jax.convert --checkpoint=RUN --dtype=bfloat16 --out=half
  python -m gidd_jax.convert --checkpoint=RUN --out=mine --with_code --license=apache-2.0 \
    --push=OWNER/NAME
"""

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError
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
WITH_CODE = flags.DEFINE_bool(
    "with_code", False, "Add PyTorch code that transformers loads with trust_remote_code=True."
)
LICENSE = flags.DEFINE_string(
    "license", None, "Licence that the model card names, such as apache-2.0."
)
PUSH = flags.DEFINE_string(
    "push", None, "OWNER/NAME of a new repository on the Hugging Face hub to upload the folder to."
)
PRIVATE = flags.DEFINE_bool("private", False, "--push: nobody else sees the repository.")


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.interchange.card import model_card
    from gidd_jax.interchange.load import load_pretrained
    from gidd_jax.interchange.push import check_repository, push
    from gidd_jax.interchange.save import check_new_folder, save_pretrained

    if PRIVATE.value and not PUSH.value:
        raise InputError("--private belongs to --push: add it, or leave --private out")
    out = check_new_folder(OUT.value)  # before the work, not after it
    if PUSH.value is not None:
        check_repository(PUSH.value)
    model = load_pretrained(
        CHECKPOINT.value,
        ema=EMA.value,
        row_mode=ROW_MODE.value,
        built_in=True,
        dtype=DTYPE.value,
    )
    options = {"licence": LICENSE.value, "with_code": WITH_CODE.value}
    card = model_card(model, CHECKPOINT.value, **options)
    save_pretrained(model, out, with_code=WITH_CODE.value, card=card)
    print(f"wrote {out}")
    if PUSH.value is not None:
        print(f"uploaded to {push(out, PUSH.value, private=PRIVATE.value)}")


if __name__ == "__main__":
    run(main, flags)
