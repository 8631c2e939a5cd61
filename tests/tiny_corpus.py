"""A corpus of 23 documents for tests: as files, and as a dataset that tfds has prepared."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from gidd_jax.cli import load_config
from gidd_jax.data.pipeline import TrainBatches
from gidd_jax.settings import DataSettings, Settings

TEXTS = [f"Document {i}: " + f"words é {i} and more. " * (1 + 5 * (i % 4)) for i in range(23)]


class LocalText(tfds.core.GeneratorBasedBuilder):
    """A prepared dataset that needs neither a network nor TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(["held"])}

    def _generate_examples(self, texts):
        for i, text in enumerate(texts):
            yield i, {"text": text}


def write_tfds(folder: Path) -> str:
    """Prepare the dataset in a folder, and return where it lies."""
    builder = LocalText(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def write_jsonl(file: Path, texts=TEXTS, key="text") -> str:
    file.write_text("".join(json.dumps({key: t}, ensure_ascii=False) + "\n" for t in texts))
    return str(file)


def settings(path, **changes) -> DataSettings:
    """The data settings of the base config, for this corpus; `changes` by key."""
    ours = {"path": str(path), "validation": "last:3", "txt_documents": "line", **changes}
    return replace(Settings.from_config(load_config("base")).data, **ours)


def contents(documents) -> list[str]:
    return [documents[i] for i in range(len(documents))]


def first_batches(train: TrainBatches, count: int) -> list[dict[str, np.ndarray]]:
    try:
        return [next(train) for _ in range(count)]
    finally:
        train.close()
