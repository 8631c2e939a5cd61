"""Metrics: averages, what is written where, speed and FLOPs by hand."""

import json
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gidd_jax.cli import load_config
from gidd_jax.hardware import peak_flops
from gidd_jax.settings import Settings
from gidd_jax.training import metrics
from gidd_jax.training.metrics import MetricWriter, Progress, StepMetrics, flops_per_token


def settings_of(config: str) -> Settings:
    return Settings.from_config(load_config(config))


def lines_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events_of(workdir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    return events


def test_step_metrics_average_over_steps_and_keep_the_last_rate():
    single = jax.jit(StepMetrics.single_from_model_output)
    merged = StepMetrics.empty()
    for i in range(4):
        values = {name: jnp.float32(i) for name in ("loss", "elbo", "kl", "is_div", "grad_norm")}
        merged = merged.merge(single(**values, learning_rate=jnp.float32(10 * i)))
    computed = merged.compute()
    assert computed.pop("learning_rate") == 30
    assert computed.keys() == {"loss", "elbo", "kl", "is_div", "grad_norm"}
    assert all(value == 1.5 for value in computed.values())


def test_scalars_go_to_jsonl_and_tensorboard(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(1, {"loss": jnp.float32(2.5), "rate": np.float64(0.1)})
        assert lines_of(tmp_path) == [{"step": 1, "loss": 2.5, "rate": 0.1}]  # at once
        writer.write_scalars(2, {"loss": float("nan")})
        writer.write_hparams({"model": {"num_layers": 3}})
    assert lines_of(tmp_path)[1] == {"step": 2, "loss": None}
    events = events_of(tmp_path)
    assert (events.Scalars("loss")[0].step, events.Scalars("loss")[0].value) == (1, 2.5)
    assert (
        b'"num_layers": 3' in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]
    )


def test_a_resumed_run_has_each_step_once(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 9):
            writer.write_scalars(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    with MetricWriter(tmp_path, resume_step=5) as writer:
        for step in range(6, 11):
            writer.write_scalars(step, {"loss": -step})
    expected = [(s, s if s <= 5 else -s) for s in range(1, 11)]
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == expected
    assert [(e.step, e.value) for e in events_of(tmp_path).Scalars("loss")] == expected


def test_a_new_run_in_the_folder_starts_a_new_file(tmp_path):
    for _ in range(2):
        with MetricWriter(tmp_path) as writer:
            writer.write_scalars(1, {"loss": 1})
    assert len(lines_of(tmp_path)) == 1


class WandbRun:
    """Keeps rows as W&B does: by a step that never falls; what comes with a smaller one is lost."""

    def __init__(self, step: int = 0):
        self.step, self.rows, self.axes, self.is_finished = step, {}, {}, False
        self.config = {}

    def log(self, values: dict, step: int | None = None) -> None:
        number = self.step if step is None else step
        if number < self.step:
            return
        self.rows.setdefault(number, {}).update(values)
        self.step = number + (step is None)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def finish(self) -> None:
        self.is_finished = True


def test_wandb_loses_no_step_of_a_run_that_goes_on_from_an_older_checkpoint(tmp_path, monkeypatch):
    started, runs = [], [WandbRun(), WandbRun(9)]

    def init(**options):
        started.append(options)
        return runs[len(started) - 1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume_step, last in ((0, 8), (4, 10)):
        with MetricWriter(tmp_path, resume_step=resume_step, wandb_project="p") as writer:
            for step in range(resume_step + 1, last + 1):
                writer.write_scalars(step, {"loss": 10 * resume_step + step})
                if step % 4 == 0:
                    writer.write_scalars(step, {"validation": 0.5})
    before, after = ([run.rows[i] for i in sorted(run.rows)] for run in runs)
    assert [(row["step"], row["loss"]) for row in before] == [(s, s) for s in range(1, 9)]
    assert [row["step"] for row in before if "validation" in row] == [4, 8]
    figures = [(row["step"], row["loss"]) for row in after if "loss" in row]
    assert figures == [(s, 40 + s) for s in range(5, 11)]
    assert [row["step"] for row in after if "validation" in row] == [8]
    assert started[0] == started[1]
    assert (started[0]["project"], started[0]["resume"]) == ("p", "allow")
    assert all(run.axes == {"*": "step"} and run.is_finished for run in runs)


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricWriter(tmp_path / "run", wandb_project="p") as writer:
        writer.write_scalars(1, {"loss": 1.0})
        writer.write_hparams({})
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_flops_by_hand():
    # tiny DiT: 8 layers of (4 + 8) 512^2 weights, 50,304 x 512 for the output; attention 4 L D.
    weights = 8 * 12 * 512**2 + 50304 * 512
    assert flops_per_token(settings_of("gidd:tiny"), 50259) == 6 * weights + 3 * 8 * 4 * 512 * 512
    # tiny Llama: three matrices in the MLP, no padding of the vocabulary, causal attention.
    weights = 8 * 16 * 512**2 + 50259 * 512
    assert flops_per_token(settings_of("ar:tiny"), 50259) == 6 * weights + 3 * 8 * 2 * 512 * 512


def test_flops_agree_with_the_compiler():
    """XLA counts the forward pass: twice the weights and attention, plus what is not a product."""
    from gidd_jax.training.build import build_model

    settings = settings_of("quickstart")
    model, network, vocab_size, batch = settings.model, build_model(settings, 500), 500, 8
    network = network.clone(scan_layers=False)  # XLA counts a loop's body once
    inputs = jnp.zeros((batch, model.max_seq_len), jnp.int32), jnp.ones(batch)
    variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    cost = jax.jit(network.apply).lower(variables, *inputs).cost_analysis()
    ours = flops_per_token(settings, vocab_size) / 3 * batch * model.max_seq_len
    assert ours <= cost["flops"] < 1.1 * ours


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_progress_measures_speed_use_and_time_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1e6)
    lines = []
    monkeypatch.setattr(metrics.logging, "info", lambda text, *args: lines.append(text % args))
    progress = Progress(1000, 10, tokens_per_step=512, flops_per_token=250.0)
    now = 160.0  # a minute of compilation
    progress.restart(11)
    now = 165.0
    rates = progress.update(21, {"loss": 3.25, "kl": 0.0123456})
    assert rates["tokens_per_second"] == pytest.approx(10 * 512 / 5)
    assert rates["mfu"] == pytest.approx(1024 * 250 / (1e6 * jax.device_count()))
    assert lines == [
        "step 21/1000 | loss 3.25 | kl 0.012346 | 1,024 tokens/s | MFU 3.2 % | 0:08:10 left",
    ]
    now = 265.0
    assert progress.update(31, {"loss": 3.0})["tokens_per_second"] == pytest.approx(51.2)
    now = 965.0
    progress.validated(31, {"nelbo": 4.0, "tokens": 7})
    assert lines[-1] == "step 31/1000 | validation: nelbo 4 | tokens 7"
    now = 1065.0  # the validation's time does not count
    assert progress.update(41, {"loss": 3.0})["tokens_per_second"] == pytest.approx(51.2)
    progress.close()


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    progress = Progress(20, 10, tokens_per_step=512, flops_per_token=1.0)
    time.sleep(0.15)
    rates = progress.update(15, {"loss": 1.5, "kl": 2.0})
    progress.close()
    assert "mfu" not in rates  # the CPU's peak is unknown
    assert "15/20" in screen.getvalue()
    assert "loss 1.5 |" in screen.getvalue()
    assert "kl" not in screen.getvalue()
