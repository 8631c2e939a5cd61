"""Tokenise a corpus once into ArrayRecord shards that training reads at speed.

The output folder serves as data.path. A run that was killed continues with the missing shards.
"""

import os
from pathlib import Path

from gidd_jax.cli import CommandFlags, load_config, run
from gidd_jax.errors import InputError

flags = CommandFlags()
FLAGS = flags.values
flags.DEFINE_string(
    "path", None, "Corpus, as data.path: files, folders, globs, tfds:NAME, hf:OWNER/NAME."
)
flags.DEFINE_string(
    "tokenizer", None, "embedded, a local folder, a Hugging Face hub name, chars:FILE or ids:VOCAB."
)
flags.DEFINE_string(
    "out", None, "Folder for the shards; an unfinished one is continued.", required=True
)
flags.DEFINE_integer("seq_len", 512, "Tokens per row.", lower_bound=2)
flags.DEFINE_string(
    "mode", "packed", "crop | packed | padded, as data.mode; none, as data.frame=none."
)
flags.DEFINE_string(
    "validation",
    load_config("base").to_dict()["data"]["validation"],
    "Rule of the validation split, as data.validation.",
)
flags.DEFINE_string("text_key", "text", "Field of the text in jsonl, parquet, tfds and hf.")
flags.DEFINE_string(
    "txt_documents",
    "blank_line",
    "What counts as one document in a .txt file: file, line or blank_line.",
)
flags.DEFINE_integer("num_workers", 2, "Processes that tokenise.", lower_bound=1)
flags.DEFINE_integer("shard_size", 10_000, "Documents per shard.", lower_bound=1)
flags.DEFINE_bool("verify", False, "Only hash the shards in --out against the manifest.")
EXAMPLES = """Examples:
  python -m gidd_jax.prepare_data --path=corpus/ --tokenizer=gpt2 --out=shards --seq_len=512
  python -m gidd_jax.prepare_data --path=embedded --tokenizer=embedded --out=shards --shard_size=50
  python -m gidd_jax.prepare_data --path=tfds:lm1b --tokenizer=bert-base-uncased --out=lm1b \\
      --seq_len=128 --mode=padded --validation=split:test
  python -m gidd_jax.prepare_data --path=hf:Skylion007/openwebtext --tokenizer=gpt2 --out=owt \\
      --seq_len=512 --mode=crop --validation=last:100000 --num_workers=16
  python -m gidd_jax.prepare_data --path=hf:HuggingFaceFW/fineweb/sample-10BT --tokenizer=gpt2 \\
      --out=fineweb --seq_len=1024 --validation=hash:0.001 --num_workers=16
  python -m gidd_jax.prepare_data --out=shards --verify
  python -m gidd_jax.train --config=gidd --config.data.path=shards --config.data.mode=packed"""


def main(_: list[str]) -> None:
    # Read at the first import: without it transformers warns that there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from gidd_jax.data import rows, shards
    from gidd_jax.data.preparation import prepare

    required = ("out",) if FLAGS.verify else ("path", "tokenizer", "out")
    for name in required:
        if not FLAGS[name].value:
            raise InputError(f"--{name} is required: see --help")
    out = Path(FLAGS.out).expanduser()
    if FLAGS.verify:
        manifest = shards.verify(out)
        print(f"{out}: every shard is as it was written")
    else:
        manifest = prepare(
            FLAGS.path,
            FLAGS.tokenizer,
            out,
            seq_len=FLAGS.seq_len,
            mode=FLAGS.mode,
            validation=FLAGS.validation,
            text_key=FLAGS.text_key,
            txt_documents=FLAGS.txt_documents,
            num_workers=FLAGS.num_workers,
            shard_size=FLAGS.shard_size,
        )
    for split in shards.SPLITS:
        counts = ", ".join(_counted(n, name) for name, n in manifest.totals(split).items())
        print(f"{split}: {counts} in {_counted(len(manifest.splits[split]), 'shards')}")
    if not FLAGS.verify:
        key = "frame" if manifest.mode == rows.NO_FRAME else "mode"
        print(f"train with --config.data.path={out} --config.data.{key}={manifest.mode}")
        print(f"  --config.data.tokenizer={out / shards.TOKENIZER_FOLDER}")


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name.removesuffix('s') if count == 1 else name}"


if __name__ == "__main__":
    run(main, flags, examples=EXAMPLES, resumes=True)
