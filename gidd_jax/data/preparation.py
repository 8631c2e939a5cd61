"""Write a corpus as ArrayRecord shards, by several processes; what was killed is continued."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gidd_jax.data import arrays, rows, shards
from gidd_jax.data.corpus import Documents, open_corpus
from gidd_jax.data.shards import MANIFEST, PLAN, Manifest, Shard, check_size
from gidd_jax.data.sources import tokenizer_for
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.mixture import split_mixture

_DONE = "done"  # folder of one note per finished shard
_ENCODE_BYTES = 4 << 20  # text of one process in memory at a time
_worker: tuple["_Job", dict[str, Documents]]  # in a worker: what it was started with


@dataclasses.dataclass(frozen=True)
class _Job:
    """What one worker needs besides the documents; the same for every shard."""

    folder: Path
    tokenizer: Tokenizer
    mode: str
    seq_len: int


@dataclasses.dataclass(frozen=True)
class _Task:
    """One shard: documents start:stop of a split."""

    split: str
    file: str
    start: int
    stop: int


def prepare(
    path: str,
    tokenizer_name: str,
    out: Path,
    *,
    seq_len: int,
    mode: str,
    validation: str,
    text_key: str,
    txt_documents: str,
    num_workers: int,
    shard_size: int,
) -> Manifest:
    """Write shards of `shard_size` documents, a copy of the tokenizer and manifest.json to `out`.

    Raises InputError when the corpus cannot be read or `out` holds shards of other settings.
    """
    rows.check_mode(mode)
    if mode == rows.ANSWERS:
        raise InputError(
            "data mode 'answers': shards do not say what is a prompt: train on the records, .jsonl "
            "or .parquet, themselves"
        )
    if split_mixture(path)[0].path != path:
        raise InputError(
            f"data path {path!r} has weights, which belong to training: prepare each part into a "
            "folder of its own, and mix those in data.path"
        )
    if shards.is_shard_folder(path):
        raise InputError(f"data path {path!r} is a folder of shards: prepare from the texts")
    if arrays.is_of_arrays(path):
        raise InputError(f"data path {path!r} holds arrays of ids: train on them as they are")
    corpus = open_corpus(path, validation, text_key, txt_documents)
    splits: dict[str, Documents] = {"train": corpus.train, "validation": corpus.validation}
    tokenizer = tokenizer_for(tokenizer_name, mode, lambda: list(splits.values()))
    plan = {
        "path": path,
        "validation": validation,
        "text_key": text_key,
        "txt_documents": txt_documents,
        "fingerprint": tokenizer.fingerprint,
        "mode": mode,
        "seq_len": seq_len,
        "shard_size": shard_size,
        "documents": {split: [len(d), d.num_bytes] for split, d in splits.items()},
    }
    _start(out, plan, tokenizer)
    tokenizer.save(out / shards.TOKENIZER_FOLDER)
    tasks = list(_tasks(splits, shard_size))
    _write_shards(_Job(out, tokenizer, mode, seq_len), splits, tasks, num_workers)

    done = {t: _read_done(out, t) for t in tasks}
    manifest = shards.Manifest(
        path=path,
        validation=validation,
        tokenizer=tokenizer_name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        mode=mode,
        seq_len=seq_len,
        splits={s: [d for t, d in done.items() if d and t.split == s] for s in shards.SPLITS},
    )
    manifest.write(out)
    return manifest


def _start(out: Path, plan: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Make the folder or check that it belongs to the same plan; drop what a killed run left."""
    file = out / PLAN
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file: name a folder")
    out.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        try:
            old = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{file} is damaged ({error}): delete {out}") from error
        changed = [k for k in plan if k != "fingerprint" and old.get(k) != plan[k]]
        if not tokenizer.has_fingerprint(str(old.get("fingerprint"))):
            changed.append("the tokenizer")
        if changed:
            raise InputError(
                f"{out} holds shards made with other settings ({', '.join(changed)}): "
                "name another --out or delete it"
            )
    elif any(out.iterdir()):
        raise InputError(f"--out={out} is not empty and holds no shards: name another folder")
    else:
        temporary = out / (PLAN + ".tmp")
        temporary.write_text(json.dumps(plan, indent=1) + "\n")
        temporary.replace(file)
    (out / _DONE).mkdir(exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # until every shard is checked
    for leftover in out.rglob("*.part"):
        leftover.unlink()


def _tasks(splits: dict[str, Documents], shard_size: int) -> Iterator[_Task]:
    for split, documents in splits.items():
        for index, start in enumerate(range(0, len(documents), shard_size)):
            stop = min(start + shard_size, len(documents))
            yield _Task(split, f"{split}-{index:05d}.array_record", start, stop)


def _read_done(out: Path, task: _Task) -> Shard | None:
    """The finished shard of a task, None where it is still to be made."""
    try:
        shard = Shard(**json.loads(_note(out, task).read_text()))
        check_size(out, shard)
    except (OSError, ValueError, TypeError, RecursionError):  # InputError is a ValueError
        return None
    return shard if shard.file == task.file else None


def _note(out: Path, task: _Task) -> Path:
    return out / _DONE / (task.file + ".json")


def _write_shards(
    job: _Job, splits: dict[str, Documents], tasks: list[_Task], num_workers: int
) -> None:
    """Make the missing shards in processes, with a progress bar over documents on a terminal."""
    missing = [t for t in tasks if _read_done(job.folder, t) is None]
    total = sum(t.stop - t.start for t in tasks)
    rest = sum(t.stop - t.start for t in missing)
    bar = tqdm(total=total, initial=total - rest, desc="Tokenising", unit="doc", disable=None)
    # Spawned, not forked: the tokenizer's threads do not survive a fork.
    with (
        bar,
        ProcessPoolExecutor(
            max(num_workers, 1),
            multiprocessing.get_context("spawn"),
            initializer=_initialise_worker,
            initargs=(job, splits),
        ) as pool,
    ):
        try:
            with _without_interrupts():
                futures: dict[Future[None], _Task] = {
                    pool.submit(_write_shard, task): task for task in missing
                }
            for future in as_completed(futures):
                future.result()
                bar.update(futures[future].stop - futures[future].start)
        except BrokenProcessPool as error:
            raise InputError(
                "a worker was killed, most likely for want of memory: "
                "run the same command again with a smaller --num_workers"
            ) from error
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()  # a shard that is not complete has no name yet
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes that never hear Ctrl-C: this one ends them, without their tracebacks.

    They inherit the mask, which holds while they import, too. What comes meanwhile is heard at the
    end of the block: half a start would leave a process without its orders.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "pthread_sigmask"):  # Windows has none
        yield
        return
    heard = threading.Event()
    handler = signal.signal(signal.SIGINT, lambda *_: heard.set())
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if heard.is_set():
        raise KeyboardInterrupt


def _initialise_worker(job: _Job, splits: dict[str, Documents]) -> None:
    global _worker
    _worker = (job, splits)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End a worker whose command was killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_shard(task: _Task) -> None:
    """Tokenise the documents of one shard; the file appears under its name only when complete."""
    from array_record.python.array_record_module import ArrayRecordWriter

    job, splits = _worker
    # Named by process: a worker may outlive a killed command and meet the next one here.
    part = job.folder / f"{task.file}.{os.getpid()}.part"
    lots = [
        rows.tokenise(texts, job.tokenizer, job.mode)
        for texts in _lots(splits[task.split], task.start, task.stop)
    ]
    documents = rows.join(lots)
    # Training crops are drawn later, from whole documents; validation rows are final.
    is_whole = job.mode == "crop" and task.split == "train"
    records = documents.whole() if is_whole else rows.cut(documents, job.mode, job.seq_len)
    num_bytes = records.sums(documents.num_bytes)
    writer = ArrayRecordWriter(str(part), "group_size:1")  # any record can be read on its own
    for index in range(len(records)):
        writer.write(
            shards.encode_record(records[index], int(num_bytes[index]), job.tokenizer.vocab_size)
        )
    writer.close()
    shard = shards.Shard(
        file=task.file,
        size=part.stat().st_size,
        sha256=shards.sha256(part),
        documents=task.stop - task.start,
        records=len(records),
        tokens=len(documents.ids),
        bytes=int(documents.num_bytes.sum()),
    )
    part.replace(job.folder / task.file)
    note = _note(job.folder, task)
    temporary = note.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(dataclasses.asdict(shard)))
    temporary.replace(note)


def _lots(documents: Documents, start: int, stop: int) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for index in range(start, stop):
        texts.append(documents[index])
        size += len(texts[-1])
        if size >= _ENCODE_BYTES or index == stop - 1:
            yield texts
            texts, size = [], 0
