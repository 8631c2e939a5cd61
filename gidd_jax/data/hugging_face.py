"""Datasets of the Hugging Face hub, through the extra `datasets`, which runs no code of theirs."""

import sys
from pathlib import Path
from typing import Any

from gidd_jax.data.files import text_of
from gidd_jax.errors import InputError

# Where the hub keeps what the script of an old dataset made, as data.
_WITHOUT_SCRIPT = "refs/convert/parquet"


class HuggingFaceDocuments:
    """One split of a dataset, mapped from disk; texts are the values of the column `text_key`.

    name: OWNER/NAME or OWNER/NAME/CONFIG on the hub, or a folder that `save_to_disk` wrote.
    """

    is_random_access = True

    def __init__(self, name: str, split: str, text_key: str):
        self._where = f"Hugging Face dataset {name!r}, split {split!r}"
        self._text_key = text_key
        dataset: Any = None
        try:
            dataset = _open(name, split)
            columns = list(dataset.column_names)
            texts = dataset.select_columns([text_key]) if text_key in columns else None
        except InputError:
            raise
        except Exception as error:  # unknown name or split, no network, damaged files
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{self._where}: {reason}") from error
        if texts is None:
            raise InputError(f"{self._where} has no column {text_key!r}; it has: {columns}")
        self._texts = texts
        self.num_bytes = int(texts.data.nbytes)
        # What the library knows a dataset by: of its repository and files, or as it was saved.
        known_by = getattr(dataset, "_fingerprint", "")
        self.version = f"{known_by}, {len(texts)} rows, {self.num_bytes} bytes"

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        return text_of(self._texts[index], self._text_key, f"{self._where}: row {index + 1}")


def _open(name: str, split: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"data path 'hf:{name}' needs the package datasets: pip install 'gidd-jax[datasets]'"
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    folder = Path(name).expanduser()
    if folder.is_dir():
        splits = datasets.load_from_disk(str(folder))
        if not isinstance(splits, datasets.DatasetDict) or split not in splits:
            raise InputError(f"{folder} is no dataset with a split {split!r}")
        return splits[split]
    owner, _, rest = name.partition("/")
    repository, _, config = rest.partition("/")
    if not owner or not repository:
        raise InputError(
            f"data path 'hf:{name}' is no folder: name a dataset on the hub by OWNER/NAME or "
            "OWNER/NAME/CONFIG"
        )
    arguments = (f"{owner}/{repository}", config or None)
    try:
        return datasets.load_dataset(*arguments, split=split)
    except RuntimeError:  # a script, which is not run
        return datasets.load_dataset(*arguments, split=split, revision=_WITHOUT_SCRIPT)
