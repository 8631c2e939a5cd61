"""Build the embedded corpus and tokenizer from the plain text of three novels.

Examples:
  python -m gidd_jax.data.build_assets --corpus=austen3.txt --out=gidd_jax/assets
  python -m gidd_jax.data.build_assets --corpus=train.jsonl --validation=path:val.jsonl --out=mine

Of a corpus of documents (.jsonl) only the tokenizer is made.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from gidd_jax.cli import CommandFlags, run

flags = CommandFlags()
FLAGS = flags.values
flags.DEFINE_string(
    "corpus", None, "Text file of the novels; chapters start 'Chapter N'. Or .jsonl.", required=True
)
flags.DEFINE_string("out", None, "Folder to write austen.jsonl and tokenizer/ to.", required=True)
flags.DEFINE_integer("vocab_size", 4096, "Tokens, special ones included.", lower_bound=300)
flags.DEFINE_string("validation", "hash:0.05", "Documents that the tokenizer must not see.")
NOVELS = (
    "persuasion",
    "pride-and-prejudice",
    "sense-and-sensibility",
)  # as they follow in the file
END_OF_TEXT, PAD, MASK = "<|endoftext|>", "[PAD]", "[MASK]"


def split_chapters(text: str) -> list[dict[str, str]]:
    """One record {'id', 'text'} per chapter; chapter 1 starts the next novel."""
    starts = [m.start() for m in re.finditer(r"^chapter \d+$", text, re.MULTILINE | re.IGNORECASE)]
    records, novel = [], -1
    for begin, end in zip(starts, [*starts[1:], len(text)], strict=True):
        chapter = text[begin:end].strip()
        number = int(chapter.split("\n", 1)[0].split()[1])
        novel += number == 1
        records.append({"id": f"{NOVELS[novel]}-{number:02d}", "text": chapter})
    return records


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """GPT-2's kind of byte-level BPE; end of text, [PAD] and [MASK] are the ids 0, 1 and 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(_: list[str]) -> None:
    # Read at the first import: without it transformers warns that there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import PreTrainedTokenizerFast

    from gidd_jax.data.corpus import iterate, open_corpus

    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    corpus = Path(FLAGS.corpus)
    if corpus.suffix != ".jsonl":
        records = split_chapters(corpus.read_text(encoding="utf-8"))
        corpus = out / "austen.jsonl"
        corpus.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    splits = open_corpus(str(corpus), FLAGS.validation, "text", "file")
    backend = train_tokenizer(iterate(splits.train, "Reading"), FLAGS.vocab_size)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        mask_token=MASK,
    ).save_pretrained(str(out / "tokenizer"))
    print(f"{len(splits.train)} training and {len(splits.validation)} validation documents")


if __name__ == "__main__":
    run(main, flags)
