"""Datasets of TensorFlow Datasets, prepared and read without TensorFlow."""

import sys
from pathlib import Path
from typing import Any

from gidd_jax.errors import InputError, first_line


class TfdsDocuments:
    """One split of a tfds dataset; texts are the values of the feature `text_key`."""

    is_random_access = True

    def __init__(self, name: str, split: str, text_key: str):
        self._source, info = _open_tfds(name, split)
        self._text_key = text_key
        self.num_bytes = int(info.splits[split].num_bytes)
        count = info.splits[split].num_examples
        self.version = f"{info.full_name}, {count} examples, {self.num_bytes} bytes"
        if text_key not in info.features:
            keys = ", ".join(sorted(info.features))
            raise InputError(f"tfds dataset {name!r} has no feature {text_key!r}; it has: {keys}")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:
        text = self._source[index][self._text_key]
        return text.decode("utf-8") if isinstance(text, bytes) else str(text)


def _open_tfds(name: str, split: str) -> tuple[Any, Any]:
    """Data source and info of a tfds dataset, without TensorFlow."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # registers the text builders, skipped without h5py

    tfds.display_progress_bar(sys.stderr.isatty())
    folder = Path(name).expanduser()
    builder: Any
    try:
        if folder.is_dir():
            builder = tfds.builder_from_directory(builder_dir=str(folder))
        else:
            builder = tfds.builder(name, file_format="array_record", try_gcs=False)
            builder.download_and_prepare()
        return builder.as_data_source(split), builder.info
    except Exception as error:  # unknown name or split, no network, a builder that needs TensorFlow
        raise InputError(f"tfds dataset {name!r}, split {split!r}: {first_line(error)}") from error
