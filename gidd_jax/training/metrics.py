"""Metrics of a run: their averages, where they are written, and how fast the run goes."""

import importlib.util
import json
import math
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import flax.struct
import jax
from absl import logging
from clu import metrics
from etils import epath

from gidd_jax.checkpoints.storage import is_remote, named_failures, run_folder, write_atomically
from gidd_jax.errors import InputError, StorageError
from gidd_jax.hardware import peak_flops
from gidd_jax.models.dit import MLP_RATIO, padded_vocab_size
from gidd_jax.settings import ModelSettings, Settings

METRICS_FILE = "metrics.jsonl"
_WANDB_AXIS = "step"  # the axis of its charts, so that each figure stands at its step of training


@flax.struct.dataclass
class StepMetrics(metrics.Collection):
    """Averages over the steps since the last report; per token in nats where it applies."""

    loss: metrics.Average.from_output("loss")  # pyright: ignore[reportInvalidTypeForm]
    elbo: metrics.Average.from_output("elbo")  # pyright: ignore[reportInvalidTypeForm]
    kl: metrics.Average.from_output("kl")  # pyright: ignore[reportInvalidTypeForm]
    is_div: metrics.Average.from_output("is_div")  # pyright: ignore[reportInvalidTypeForm]
    grad_norm: metrics.Average.from_output("grad_norm")  # pyright: ignore[reportInvalidTypeForm]
    learning_rate: metrics.LastValue.from_output("learning_rate")  # pyright: ignore[reportInvalidTypeForm]


def num_columns(model: ModelSettings, vocab_size: int) -> int:
    """Return the number of columns of the logits."""
    return padded_vocab_size(vocab_size) if model.name == "dit" else vocab_size


def flops_per_token(settings: Settings, vocab_size: int) -> float:
    """Return the FLOPs of one token's forward and backward pass at the full context length.

    Six per weight of a matrix product (the output projection too, with the columns that pad the
    vocabulary) and the two products of attention, of which causal attention needs half. The
    time conditioning is computed once per sequence and left out: less than 0.1 %. Of a model by
    blocks the layers go through noisy and clean tokens, all against all, as the plain form does.
    """
    model, (weights, attention) = settings.model, _layer_products(settings)
    output = model.hidden_size * num_columns(model, vocab_size)
    return 6.0 * (model.num_layers * weights + output) + 3.0 * model.num_layers * attention


def recomputed_flops_per_token(settings: Settings, keeps_attention: bool) -> float:
    """Return the FLOPs of one token that model.remat adds: what the backward pass computes again.

    `full`: the layers' whole forward pass; `attention` and `dots`: attention, but where it
    `keeps_attention` (the TPU's kernel does), and `attention` the products with weights, too.
    """
    weights, attention = _layer_products(settings)
    kept = attention if keeps_attention else 0.0
    again = {
        "none": 0.0,
        "dots": attention - kept,
        "attention": 2.0 * weights + attention - kept,
        "full": 2.0 * weights + attention,
    }
    return settings.model.num_layers * again[settings.model.remat]


def hidden_units(model: ModelSettings) -> int:
    """Return the hidden units of a block's perceptron."""
    is_llama = model.name == "llama"
    return (model.intermediate_size if is_llama else 0) or MLP_RATIO * model.hidden_size


def _layer_products(settings: Settings) -> tuple[int, int]:
    """Return the weights of a layer's products, and the FLOPs of its attention (one token)."""
    model = settings.model
    D, L, M = model.hidden_size, model.max_seq_len, hidden_units(model)
    if model.name == "llama":
        head_dim = model.head_dim or D // model.num_heads
        width, kv_width = (
            head_dim * count for count in (model.num_heads, model.num_kv_heads or model.num_heads)
        )
        sees = 2 if settings.process.name == "autoregressive" else 4
        return 2 * D * (width + kv_width) + 3 * D * M, sees * L * width
    twice = 2 if settings.train.block_length else 1
    return twice * (4 * D * D + 2 * D * M), twice**2 * 4 * L * D


class MetricWriter:
    """Writes to TensorBoard event files, `metrics.jsonl` and, if asked, to W&B.

    Every process makes one; only process 0 writes. A run that resumes at `resume_step` first
    drops what an earlier start wrote after that step, so that each step is there once. A bucket's
    objects cannot grow: there, the files are copies, as new as the last flush. Raises StorageError
    when the bucket takes nothing.
    """

    def __init__(
        self,
        workdir: str | epath.PathLike,
        *,
        resume_step: int = 0,
        wandb_project: str | None = None,
    ) -> None:
        self._file: Any = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter

        self._home = run_folder(workdir)
        self._spool = tempfile.TemporaryDirectory() if is_remote(self._home) else None
        folder = epath.Path(self._spool.name) if self._spool else self._home
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if self._spool:
            with named_failures(self._home):
                if (self._home / METRICS_FILE).exists():
                    path.write_bytes((self._home / METRICS_FILE).read_bytes())
        self._wandb = _start_wandb(self._home, folder, wandb_project) if wandb_project else None
        # The suffix keeps apart two starts within one second: files are named by the second.
        self._events = SummaryWriter(
            str(folder / "tensorboard"),
            purge_step=resume_step + 1,
            filename_suffix=f".{resume_step}",
        )
        _drop_after(path, resume_step)
        self._file = path.open("a")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write named numbers of one step."""
        if self._file is None:
            return
        values = {name: float(value) for name, value in scalars.items()}
        # JSON has no NaN and no infinity, and TensorBoard warns of them in every line.
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        for name, value in finite.items():
            if value is not None:
                self._events.add_scalar(name, value, step)
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            # A run that went on from an older checkpoint is behind what W&B holds of it, and W&B
            # drops what comes with a smaller step than its own: it gets the next one of these.
            own = step if step >= self._wandb.step else None
            self._wandb.log({_WANDB_AXIS: step, **values}, step=own)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings of the run (nested dictionaries)."""
        if self._file is None:
            return
        self._events.add_text("settings", "```\n" + json.dumps(hparams, indent=2) + "\n```")
        if self._wandb is not None:
            self._wandb.config.update(dict(hparams), allow_val_change=True)

    def flush(self) -> None:
        """Put everything on disk, or in the bucket."""
        if self._file is None:
            return
        self._file.flush()
        self._events.flush()
        self._copy()

    def close(self) -> None:
        """Flush and release the files."""
        if self._file is None:
            return
        self._file.close()
        self._events.close()
        self._file = None
        try:
            self._copy()
        finally:
            if self._spool:
                self._spool.cleanup()
            if self._wandb is not None:
                self._wandb.finish()

    def _copy(self) -> None:
        """Put the files of this start into the bucket, each as a whole."""
        if self._spool is None:
            return
        folder = epath.Path(self._spool.name)
        with named_failures(self._home):
            for file in [folder / METRICS_FILE, *(folder / "tensorboard").iterdir()]:
                (self._home / file.relative_to(folder)).write_bytes(file.read_bytes())

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


class Progress:
    """Shows figures, speed and time left: a bar on a terminal, else one log line per report."""

    def __init__(
        self,
        num_steps: int,
        step: int,
        *,
        tokens_per_step: int,
        flops_per_token: float,
    ) -> None:
        self._num_steps = num_steps
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * jax.device_count() if peak else None
        self._bar: Any = None
        self._visible = jax.process_index() == 0
        if self._visible and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=step, unit="step", dynamic_ncols=True)
        self.restart(step)

    def restart(self, step: int) -> None:
        """Start the clock at `step`: what came before (compilation, validation) does not count."""
        self._step, self._time = step, time.perf_counter()

    def update(self, step: int, figures: Mapping[str, float]) -> dict[str, float]:
        """Show the figures after `step` steps; return tokens_per_second and, if known, mfu.

        Both are of the steps since the last call (or restart); mfu is a fraction of 1. A bar has
        room for figures["loss"] alone.
        """
        now = time.perf_counter()
        seconds = max(now - self._time, 1e-9) / max(step - self._step, 1)
        self._step, self._time = step, now
        rates = {"tokens_per_second": self._tokens_per_step / seconds}
        if self._peak:
            rates["mfu"] = rates["tokens_per_second"] * self._flops_per_token / self._peak
        left = (self._num_steps - step) * seconds
        speed = _speed(rates, left)
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"{_words({'loss': figures['loss']})} | {speed}", refresh=False
            )
            self._bar.update(step - self._bar.n)
        elif self._visible:
            logging.info("step %d/%d | %s | %s", step, self._num_steps, _words(figures), speed)
        return rates

    def validated(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a validation after `step` steps, and restart the clock."""
        if self._visible:
            logging.info("step %d/%d | validation: %s", step, self._num_steps, _words(figures))
        self.restart(step)

    def close(self) -> None:
        """Leave the bar as it is and free the line."""
        if self._bar is not None:
            self._bar.close()


def _words(figures: Mapping[str, float]) -> str:
    return " | ".join(f"{name} {float(value):.5g}" for name, value in figures.items())


def _speed(rates: Mapping[str, float], seconds_left: float) -> str:
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{rates['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in rates:
        parts.append(f"MFU {100 * rates['mfu']:.1f} %")
    return " | ".join([*parts, f"{hours}:{minutes:02}:{seconds:02} left"])


def _drop_after(path: epath.Path, step: int) -> None:
    """Keep the whole lines of `path` up to `step`: a killed run may leave half a line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    write_atomically(path, "".join(kept))


def check_wandb() -> None:
    """Raise InputError unless the package wandb is installed."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError(
            "logging.wandb = True needs the package wandb: pip install 'gidd-jax[wandb]'"
        )


def _start_wandb(home: epath.Path, folder: epath.Path, project: str) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    # Kept in the workdir, so that a resumed run continues in the same W&B run.
    path = home / "wandb_run_id"
    with named_failures(home):
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex)
        name = path.read_text()
    run = wandb.init(project=project, id=name, resume="allow", dir=str(folder))
    run.define_metric("*", step_metric=_WANDB_AXIS)
    return run
