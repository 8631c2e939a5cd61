"""The training run: built from settings, resumed from its workdir, stopped cleanly."""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from time import perf_counter as clock
from typing import Any

import jax
from absl import logging
from clu import parameter_overview, profiler
from etils import epath

from gidd_jax.checkpoints.checkpoint import Checkpointer, find_checkpoint
from gidd_jax.checkpoints.same_tokenizer import check_same_tokenizer
from gidd_jax.checkpoints.storage import is_remote, run_folder
from gidd_jax.checkpoints.workdir import agree, lock_workdir, open_workdir
from gidd_jax.data.arrays import with_marks
from gidd_jax.data.pipeline import TrainBatches, ValidationBatches, validation_batches
from gidd_jax.data.rows import ANSWERS
from gidd_jax.data.sources import run_tokenizer
from gidd_jax.errors import DivergenceError, InputError
from gidd_jax.likelihood import perplexity
from gidd_jax.parallel import sharding
from gidd_jax.parallel.distributed import refused_together
from gidd_jax.settings import Settings
from gidd_jax.training.build import build_objective
from gidd_jax.training.metrics import (
    MetricWriter,
    Progress,
    check_wandb,
    flops_per_token,
)
from gidd_jax.training.objective import Params
from gidd_jax.training.optimizer import learning_rate, make_optimizer
from gidd_jax.training.programs import compile_evaluation, compile_step, state_maker
from gidd_jax.training.step import TrainState

PROFILED_STEPS = 5
MOST_PADDING = 0.5  # share of the rows from which a run is told how to have less


def train(
    settings: Settings,
    workdir: str | epath.PathLike,
    allow_config_change: bool = False,
    profile: bool = False,
    allow_code: bool = False,
    start: Callable[[jax.sharding.Mesh | None], Params] | None = None,
) -> dict[str, Any]:
    """Train to settings.train.num_steps, continuing from the newest checkpoint in the workdir.

    `profile` writes a trace of PROFILED_STEPS steps, the second of this start and those after it,
    into the workdir's tensorboard folder. `allow_code` runs the recorded text of a process of the
    user's own whose file is gone. `start` makes the parameters that a new run begins with, on the
    mesh. Returns the figures of the last validation. Raises InputError for bad input before
    anything is written, DivergenceError when a loss or a gradient is not finite.
    """
    settings = with_marks(settings)
    own = agree(workdir, settings, allow_config_change=allow_config_change, allow_code=allow_code)
    if profile and is_remote(workdir):
        raise InputError(f"--profile needs a local --workdir: {workdir}")
    if settings.logging.wandb:
        check_wandb()
    num_steps, batch_size = settings.train.num_steps, settings.train.batch_size
    seq_len = settings.model.max_seq_len
    optimizer = make_optimizer(settings.optimizer, settings.model, num_steps)
    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    sharding.check_batch_size(batch_size // settings.train.micro_batches, mesh)
    hosts = (jax.process_index(), jax.process_count())
    tokenizer = run_tokenizer(settings.data)  # last of what is checked: it may write a file
    objective = build_objective(settings, tokenizer.vocab_size, tokenizer.mask_id, own)
    data = (settings.data, tokenizer, seq_len, batch_size)
    batches = TrainBatches(*data, settings.seed, *hosts)
    validation = validation_batches(*data, *hosts, max_batches=settings.train.eval_batches)
    init_key, run_key, eval_key = jax.random.split(jax.random.key(settings.seed), 3)

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(batches))
        stack.enter_context(sharding.activate(mesh))
        stack.enter_context(lock_workdir(workdir))
        checkpointer = stack.enter_context(
            Checkpointer(
                workdir,
                every=settings.checkpoint.every,
                max_to_keep=settings.checkpoint.max_to_keep,
                config=settings.to_dict(),
                tokenizer=tokenizer,
                process=None if own is None else own.record(settings.process.options),
            )
        )
        stopping = stack.enter_context(stop_requests(checkpointer))
        make_state, abstract_state = state_maker(settings, objective, optimizer, mesh)
        if checkpointer.latest_step() is None:
            with refused_together():
                params = None if start is None else start(mesh)
            state = make_state(init_key, params)
        else:
            state, position = checkpointer.restore(abstract_state)
            check_same_tokenizer(find_checkpoint(workdir), tokenizer, settings)
            batches.set_state(position)
            logging.info("Continuing from step %d of %s", state.step, workdir)
        open_workdir(workdir, settings, tokenizer, own)
        describe_data(batches, validation, settings.data.row_mode != ANSWERS)
        logging.info("\n%s", parameter_overview.get_parameter_overview(state.params))

        first = int(state.step)
        writer = stack.enter_context(
            MetricWriter(
                workdir,
                resume_step=first,
                wandb_project=settings.logging.wandb_project if settings.logging.wandb else None,
            )
        )
        writer.write_hparams(settings.to_dict())
        progress = Progress(
            num_steps,
            first,
            tokens_per_step=batch_size * seq_len,
            flops_per_token=flops_per_token(settings, tokenizer.vocab_size),
        )
        stack.enter_context(contextlib.closing(progress))
        reporter = Reporter(settings, writer, progress, checkpointer, workdir)
        rate = learning_rate(settings.optimizer, num_steps)
        parts = (optimizer, rate, abstract_state, mesh)
        step_fn = compile_step(settings, objective, *parts)
        annealed = settings.adapt.attention_steps
        eval_fn = compile_evaluation(settings, objective, abstract_state, mesh)
        figures: dict[str, Any] = {}
        profiled_until = 0  # the first step compiles
        if profile and num_steps < first + 2:
            logging.warning("no trace: --profile needs two steps that are still to be made")

        started = clock()
        for step in range(first + 1, num_steps + 1):
            if annealed and step > annealed:  # full attention from here on, which kernels know
                step_fn, annealed = compile_step(settings, objective.unannealed(), *parts), 0
            if profile and step == first + 2:
                profiler.start(str(run_folder(workdir) / "tensorboard"))
                profiled_until = min(step + PROFILED_STEPS - 1, num_steps)
            batch = put_batch(next(batches), mesh)
            state, metrics = step_fn(state, batch, run_key)
            reporter.add(step, metrics)
            if step == first + 1:
                jax.block_until_ready(state)
                logging.info("Compiled and ran the first step in %.1f s", clock() - started)
                progress.restart(step)
            if step == profiled_until:
                jax.block_until_ready(state)
                profiler.stop()
            every = settings.train.eval_every
            if step == num_steps or (every and step % every == 0):
                reporter.flush()
                figures = evaluate(eval_fn, state, validation, eval_key, mesh)
                writer.write_scalars(step, {f"eval/{name}": v for name, v in figures.items()})
                progress.validated(step, figures)
            # Asked once: a signal after this line is heard after the next step.
            stop = stopping(step)
            if stop and step < profiled_until:
                profiler.stop()
            if stop or step == num_steps or step % settings.checkpoint.every == 0:
                reporter.flush()  # a state made of numbers that are not finite is not saved
                writer.flush()  # before the step: its metrics are there when it is
                checkpointer.save(step, state, batches.get_state(), force=True)
            if stop:
                checkpointer.wait()
                logging.info("Stopped after step %d: the same command continues from there", step)
                break
        if first >= num_steps:
            figures = evaluate(eval_fn, state, validation, eval_key, mesh)
        return figures


def describe_data(batches: TrainBatches, validation: ValidationBatches, is_packable: bool) -> None:
    """Log what the rows are like, and warn where they leave little to learn from or to measure."""
    share = batches.padding_share()
    if share > MOST_PADDING:
        logging.warning(
            "%.0f %% of the training rows is padding: lower model.max_seq_len%s",
            100 * share,
            ", or set data.mode=packed, which joins documents" if is_packable else "",
        )
    else:
        logging.info("%.0f %% of the training rows is padding", 100 * share)
    if validation.surprise:
        logging.warning("there will be no eval/bits_per_byte: %s", validation.surprise)


def put_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Make global arrays of this process's rows."""
    return jax.make_array_from_process_local_data(sharding.batch_sharding(mesh), batch)


def evaluate(
    eval_fn: Callable[..., Any],
    state: TrainState,
    validation: ValidationBatches,
    key: jax.Array,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Return loss and bound in nats per token, perplexity and bits per byte of the validation set.

    Uses the moving average of the parameters where there is one. A figure per token is NaN where no
    token is scored, one per byte where the scored tokens stand for no byte.
    """
    params = state.params if state.ema is None else state.ema
    sums: Any = None
    for number, batch in enumerate(validation):
        rows = put_batch(batch, mesh)
        part = eval_fn(params, state.base, rows, jax.random.fold_in(key, number))
        sums = part if sums is None else jax.tree.map(lambda a, b: a + b, sums, part)
    sums = {name: float(value) for name, value in sums.items()}
    tokens = sums.pop("tokens")
    if not tokens:
        return dict.fromkeys([*sums, "perplexity", "bits_per_byte"], math.nan)
    figures = {name: value / tokens for name, value in sums.items()}
    # An autoregressive model does not score the first token of a row: nor do its bytes count.
    num_bytes = validation.num_bytes * tokens / validation.num_tokens
    figures["perplexity"] = perplexity(figures["nelbo"])
    bits = sums["nelbo"] / math.log(2)
    figures["bits_per_byte"] = bits / num_bytes if num_bytes else math.nan
    return figures


class Reporter:
    """Averages the metrics of steps and writes them, one step late: the device never waits."""

    def __init__(
        self,
        settings: Settings,
        writer: MetricWriter,
        progress: Progress,
        checkpointer: Checkpointer,
        workdir: str | epath.PathLike,
    ) -> None:
        self._every = settings.logging.every
        self._writer, self._progress = writer, progress
        self._checkpointer, self._workdir = checkpointer, workdir
        self._skip_above = settings.optimizer.skip_above
        self._skipped = 0
        self._pending: tuple[int, Any] | None = None
        self._average: Any = None

    def add(self, step: int, metrics: Any) -> None:
        """Take the metrics of a step that may still run, and report the step before it."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Report the last step; raises DivergenceError if its loss or gradient is not finite."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        loss, norm = float(metrics.loss.compute()), float(metrics.grad_norm.compute())
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise DivergenceError(
                    f"the {name} of step {step} is {value}: the run stopped; {self._advice()}"
                )
        if self._skip_above and norm > self._skip_above:
            self._skipped += 1
            logging.warning("step %d skipped: gradient norm %.4g", step, norm)
        self._average = metrics if self._average is None else self._average.merge(metrics)
        if step % self._every == 0:
            values = {name: float(value) for name, value in self._average.compute().items()}
            values |= self._progress.update(step, values)
            if self._skip_above:
                values["skipped_steps"] = self._skipped  # since this start
            self._writer.write_scalars(step, {f"train/{name}": v for name, v in values.items()})
            self._average = None

    def _advice(self) -> str:
        self._checkpointer.wait()  # the last good one may still be on its way to disk
        try:
            good = find_checkpoint(self._workdir).folder
        except InputError:
            return "there is no checkpoint yet; lower optimizer.learning_rate"
        return (
            f"the last good checkpoint is {good}; lower optimizer.learning_rate and continue "
            "from it"
        )


@contextlib.contextmanager
def stop_requests(checkpointer: Checkpointer) -> Iterator[Callable[[int], bool]]:
    """Give a function of the step: whether SIGTERM or Ctrl-C asked the run to stop after it.

    A second signal acts at once. Under jax.distributed the processes must stop after the same
    step: JAX's own handler of SIGTERM tells them all, and Ctrl-C acts at once.
    """
    if jax.distributed.is_initialized():
        yield checkpointer.reached_preemption
        return
    stop = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    handled = [signal.SIGINT, signal.SIGTERM] if is_main else []
    old = {number: signal.getsignal(number) for number in handled}

    def handle(number: int, frame: Any) -> None:
        del frame
        stop.set()
        signal.signal(number, old[signal.Signals(number)])

    for number in handled:
        signal.signal(number, handle)
    try:
        yield lambda step: stop.is_set()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
