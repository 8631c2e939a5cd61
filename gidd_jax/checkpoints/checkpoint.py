"""Checkpoints of a run, written in the background and complete in themselves.

WORKDIR/checkpoints/STEP/ holds the training state and, as JSON, the data position, the settings
of the run (with its process, and its text if that is the user's own) and the files of its
tokenizer. A step appears under its name only
when all of it is written; in a bucket, it counts only then.
"""

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

from gidd_jax.checkpoints.checksums import array_checksums, json_checksum
from gidd_jax.checkpoints.numbers import not_numbers
from gidd_jax.checkpoints.storage import (
    check_reachable,
    is_remote,
    run_folder,
)
from gidd_jax.data.files import stays_in_folder
from gidd_jax.data.tokenizer import Tokenizer, load_tokenizer
from gidd_jax.errors import InputError, StorageError, first_line

CHECKPOINTS = "checkpoints"  # folder of the steps in a workdir


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One complete step on disk."""

    folder: epath.Path
    step: int

    def config(self) -> dict[str, Any]:
        """Return the settings of the run that wrote it, for `Settings.from_saved`."""
        return self._json("config")

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the run that wrote it."""
        files = self.tokenizer_files()
        with tempfile.TemporaryDirectory() as folder:
            try:
                for name, text in files.items():
                    (Path(folder) / name).write_text(text, encoding="utf-8")
            except ValueError as error:  # no name of a file, or half of a surrogate pair
                raise _damaged(self, error) from error
            return dataclasses.replace(load_tokenizer(folder), name=str(self.folder))

    def tokenizer_files(self) -> dict[str, str]:
        """Return the texts of the tokenizer's files by their names."""
        files = self._json("tokenizer")
        if not _are_files(files):
            raise _damaged(self, ValueError("its tokenizer is no set of files"))
        return files

    def process(self) -> dict[str, Any] | None:
        """Return the record of the user's own process (`Source.record`); None if there is none."""
        return self._json("process") if (self.folder / "process").exists() else None

    def data_position(self) -> dict[str, Any]:
        """Return the state of the data iterator."""
        return self._json("data")

    def array_checksums(self) -> dict[str, int]:
        """Return the checksum of every array of the state by its dotted name."""
        sums = self._json("checksums")
        if not isinstance(sums, dict) or not isinstance(sums.get("arrays"), dict):
            raise _damaged(self, ValueError("it has no checksums of arrays"))
        return sums["arrays"]

    def _json(self, item: str) -> Any:
        try:
            value = ocp.JsonCheckpointHandler().restore(self.folder / item)
            if item != "checksums" and json_checksum(value) != self._json("checksums")[item]:
                raise ValueError(f"the checksum of its {item} is another")
        except InputError:
            raise
        except Exception as error:
            raise _damaged(self, error) from error
        return value


def find_checkpoint(path: str | epath.PathLike) -> Checkpoint:
    """Return the newest checkpoint in a workdir or its checkpoints folder, or the step itself.

    Raises InputError when the folder cannot be reached or holds no complete checkpoint.
    """
    folder = run_folder(path)
    check_reachable(folder)
    if not folder.is_dir():
        raise InputError(f"no such folder: {path}")
    if folder.name.isdecimal() and (folder / "state").is_dir():
        if not ocp.utils.is_checkpoint_finalized(folder):
            raise InputError(f"{path} is only a part of a checkpoint: use another step")
        return Checkpoint(folder, int(folder.name))
    root = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    steps = ocp.utils.checkpoint_steps(root)
    if not steps:
        raise InputError(
            f"{path} holds no checkpoint: give the workdir of a run, its {CHECKPOINTS} folder or "
            "one step of it"
        )
    return Checkpoint(root / str(max(steps)), max(steps))


def load_params(
    checkpoint: Checkpoint, abstract_params: Any, *, ema: bool = False, frozen: bool = False
) -> Any:
    """Return only the parameters (or their moving average, or frozen ones) of a checkpoint.

    `abstract_params` holds jax.ShapeDtypeStruct; those without a sharding go to the first device.
    Raises InputError when the shapes differ, there is no average or the files are damaged.
    """
    name = "frozen" if frozen else "ema" if ema else "params"
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or local
            ),
            abstract_params,
        )
    }
    saved = _saved_shapes(checkpoint)
    if ema and saved.get("ema", ...) is None:
        raise InputError(
            f"{checkpoint.folder} has no moving average of the parameters: the run had "
            "optimizer.ema_decay = 0"
        )
    _check_fits(checkpoint, wanted, {k: v for k, v in saved.items() if k.startswith(name + ".")})
    try:
        params = ocp.PyTreeCheckpointer().restore(
            checkpoint.folder / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )[name]
    except Exception as error:
        raise _damaged(checkpoint, error) from error
    _check_sums(checkpoint, f"{name}.", params)
    _check_numbers(checkpoint, {name: params})
    return params


class Checkpointer:
    """Writes and reads the checkpoints of one workdir; every process of a run makes one."""

    def __init__(
        self,
        workdir: str | epath.PathLike,
        *,
        every: int,
        max_to_keep: int,
        config: Mapping[str, Any],
        tokenizer: Tokenizer,
        process: Mapping[str, str] | None = None,
    ) -> None:
        self._root = run_folder(workdir) / CHECKPOINTS
        self._every = every
        self._context = {"config": dict(config), "tokenizer": tokenizer_files(tokenizer)}
        if process is not None:
            self._context["process"] = dict(process)
        self._manager = ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(
                # max_to_keep with a best_fn would delete the newest step: say which to keep.
                preservation_policy=ocp.checkpoint_managers.LatestN(max_to_keep),
            ),
        )

    def latest_step(self) -> int | None:
        """Return the newest complete step, or None; waits for the one that is being written."""
        self.wait()
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, data_state: Mapping[str, Any], *, force: bool = False
    ) -> bool:
        """Start to write `step` if it is a multiple of `every` or forced; return whether it did.

        The arrays are copied before the call returns, so the caller may donate them.
        """
        if step == self._manager.latest_step() or (step % self._every and not force):
            return False
        items = {"data": dict(data_state), **self._context}
        arrays = {name: leaf for name, leaf in _flat(state).items() if leaf is not None}
        items["checksums"] = {name: json_checksum(value) for name, value in items.items()} | {
            "arrays": array_checksums(arrays)
        }
        json_items = {name: ocp.args.JsonSave(value) for name, value in items.items()}  # pyright: ignore[reportCallIssue]
        state_item = ocp.args.StandardSave(state)  # pyright: ignore[reportCallIssue]
        with self._named_failures():
            return self._manager.save(
                step, args=ocp.args.Composite(state=state_item, **json_items), force=True
            )

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Return (state, data position) of `step` or of the newest step.

        `abstract_state` holds jax.ShapeDtypeStruct with the shardings to restore to, on any
        mesh. Raises InputError when there is no such step, it does not fit or it is damaged.
        """
        newest = self.latest_step()
        step = newest if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise InputError(f"{self._root} holds no checkpoint" + (f" {step}" if step else ""))
        checkpoint = Checkpoint(self._root / str(step), step)
        _check_fits(checkpoint, abstract_state, _saved_shapes(checkpoint))
        try:
            state = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state),  # pyright: ignore[reportCallIssue]
                ),
            )["state"]
        except Exception as error:
            raise _damaged(checkpoint, error) from error
        _check_sums(checkpoint, "", state)
        _check_numbers(checkpoint, state)
        return state, checkpoint.data_position()

    def reached_preemption(self, step: int) -> bool:
        """Return whether the machine is about to be taken away (needs jax.distributed)."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Return when everything started is on disk; raises StorageError if that failed."""
        with self._named_failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then release the background threads; raises StorageError if writing failed."""
        with self._named_failures():
            self._manager.close()

    @contextlib.contextmanager
    def _named_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            kinds = (OSError, RuntimeError, ValueError)  # TensorStore's are ValueErrors
            if not (isinstance(error, kinds) or is_remote(self._root)):
                raise
            raise StorageError(
                f"a checkpoint could not be written to {self._root} ({first_line(error)}): make "
                f"room or mend the folder; the same command continues from {self._last_words()}"
            ) from error

    def _last_words(self) -> str:
        try:
            steps = ocp.utils.checkpoint_steps(self._root) if self._root.is_dir() else []
        except Exception:  # the bucket that just failed
            return "its last checkpoint"
        return f"step {max(steps)}" if steps else "its beginning"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except StorageError:
            if error is None:
                raise
            # The block ended by another error, which is often this one: the first is what counts.


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of the files of a tokenizer by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {file.name: file.read_text("utf-8") for file in sorted(Path(folder).iterdir())}


def _are_files(files: Any) -> bool:
    """Tell whether names that stay in their folder have texts, as `tokenizer_files` gives them."""
    return isinstance(files, dict) and all(
        stays_in_folder(name) and isinstance(text, str) for name, text in files.items()
    )


def _saved_shapes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the saved leaves by dotted name, each with a shape and a dtype (or None)."""
    try:
        metadata: Any = ocp.PyTreeCheckpointHandler().metadata(checkpoint.folder / "state")
        return _flat(metadata.tree)
    except Exception as error:
        raise _damaged(checkpoint, error) from error


def _flat(tree: Any) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)[0]
    return {".".join(map(_entry_name, path)): leaf for path, leaf in flat}


def _entry_name(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _check_fits(checkpoint: Checkpoint, wanted: Any, saved: Mapping[str, Any]) -> None:
    """Raise InputError that names the first leaf whose presence, shape or dtype differs."""
    # Orbax would cast another dtype without a word.
    ours = {name: leaf for name, leaf in _flat(wanted).items() if leaf is not None}
    theirs = {name: leaf for name, leaf in saved.items() if leaf is not None}
    for name in sorted(ours.keys() | theirs.keys()):
        there, here = _describe(theirs.get(name)), _describe(ours.get(name))
        if there != here:
            raise InputError(
                f"checkpoint {checkpoint.folder} does not fit the model: {name} is {there} there "
                f"and {here} here"
            )


def _check_sums(checkpoint: Checkpoint, prefix: str, tree: Any) -> None:
    """Raise InputError unless the arrays of the tree are those that were saved."""
    saved = checkpoint.array_checksums()
    arrays = {f"{prefix}{n}": leaf for n, leaf in _flat(tree).items() if leaf is not None}
    for name, value in array_checksums(arrays).items():
        if saved.get(name) != value:
            raise _damaged(checkpoint, ValueError(f"the checksum of {name} is another"))


def _check_numbers(checkpoint: Checkpoint, state: Any) -> None:
    """Raise InputError that names an array of the parameters, or of their average, with a NaN."""
    names = ("params.", "ema.")
    weights = {name: leaf for name, leaf in _flat(state).items() if name.startswith(names)}
    bad = not_numbers({name: leaf for name, leaf in weights.items() if leaf is not None})
    if bad is not None:
        raise _damaged(checkpoint, ValueError(bad))


def _describe(leaf: Any) -> str:
    if leaf is None:
        return "missing"
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # saved as the integers in it
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _damaged(checkpoint: Checkpoint, error: Exception) -> InputError:
    later = (PermissionError, ConnectionError, TimeoutError, MemoryError)
    if isinstance(error, later) or (is_remote(checkpoint.folder) and _is_refused(error)):
        return InputError(f"checkpoint {checkpoint.folder} cannot be read now: {first_line(error)}")
    steps = ocp.utils.checkpoint_steps(checkpoint.folder.parent)
    older = [step for step in steps if step < checkpoint.step]
    fix = f"delete it to continue from step {max(older)}" if older else "there is no older one"
    return InputError(f"checkpoint {checkpoint.folder} is damaged ({first_line(error)}): {fix}")


def _is_refused(error: Exception) -> bool:
    """Tell whether a bucket's clients could not read, rather than found something wrong."""
    by_tensorstore = r"PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED"
    by_gcsfs = type(error).__module__.split(".")[0] in ("gcsfs", "aiohttp", "google", "requests")
    is_os = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return by_gcsfs or is_os or re.search(by_tensorstore, str(error)) is not None
