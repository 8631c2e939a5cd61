"""The real training step, compiled ahead of time for devices that need not exist."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from gidd_jax import hardware
from gidd_jax.hardware import Chip
from gidd_jax.ops.attention import MOST_SCORES, automatic
from gidd_jax.own_process import read_source
from gidd_jax.parallel import sharding
from gidd_jax.planning.estimate import Estimate, find_kernels, read_estimate
from gidd_jax.planning.roofline import Topology
from gidd_jax.settings import Settings
from gidd_jax.training.build import build_objective
from gidd_jax.training.metrics import hidden_units
from gidd_jax.training.noising import Noised
from gidd_jax.training.objective import Objective
from gidd_jax.training.optimizer import learning_rate, make_optimizer
from gidd_jax.training.programs import compile_step, state_maker
from gidd_jax.training.step import TrainState, abstract_params


class Temporaries(NamedTuple):
    """Bytes of one device that a step needs beyond the state, and how they were found.

    accepted: whether the chip's own compiler takes the step; None where another compiled it.
    estimate: that compiler's estimate of the time, where it makes one.
    """

    bytes: int
    way: str
    accepted: bool | None
    estimate: Estimate | None = None


class Compiled(NamedTuple):
    """A program as JAX sees it, and as the devices' compiler made it."""

    traced: Any
    program: Any

    @property
    def temporaries(self) -> int:
        """Bytes of one device that the program needs beyond what it is given."""
        return self.program.memory_analysis().temp_size_in_bytes

    def estimate(self, chip: Chip | None) -> Estimate | None:
        """Return the compiler's estimate of the program's time; None where it makes none."""
        if chip is None or not chip.ghz:
            return None
        kernels = find_kernels(self.traced.jaxpr, chip.unit)
        return read_estimate(self.program.as_text(), kernels)


class Builder:
    """The real state and step of a run for any mesh."""

    def __init__(self, settings: Settings, vocab_size: int, mask_id: int) -> None:
        self.settings, self._vocabulary = settings, (vocab_size, mask_id)
        self._own = read_source(settings.process.name)
        self._optimizer = make_optimizer(
            settings.optimizer, settings.model, settings.train.num_steps
        )

    def objective(self, attention: str) -> Objective:
        model = dataclasses.replace(self.settings.model, attention=attention)
        settings = dataclasses.replace(self.settings, model=model)
        return build_objective(settings, *self._vocabulary, self._own)

    def state(self, mesh: Mesh) -> TrainState:
        """The description of the state on a mesh: arrays that do not exist, with shardings."""
        objective = self.objective("xla")
        return state_maker(self.settings, objective, self._optimizer, mesh)[1]

    def compile(
        self, mesh: Mesh, batch_size: int, attention: str, backend: str, kind: str
    ) -> Compiled:
        """Compile the training step; backend and kind are what the code takes the devices for."""
        objective = self.objective(attention)
        rate = learning_rate(self.settings.optimizer, self.settings.train.num_steps)
        state = self.state(mesh)
        shape = (batch_size, self.settings.model.max_seq_len)
        batch = {
            "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
            "mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
        }
        if self.settings.data.has_marks:
            batch["given"] = batch["mask"]
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = compile_step(self.settings, objective, self._optimizer, rate, state, mesh)
        # Nothing will run: optimised machine code for a CPU would only take longer.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        # The devices may be a description that cannot hold an array: only their mesh is current.
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            nn.logical_axis_rules(sharding.RULES),
            taken_for(backend, kind),
        ):
            traced = step.trace(state, batch, key)
            return Compiled(traced, traced.lower().compile(compiler_options=options))


def temporaries(build: Builder, topology: Topology, mesh: Mesh) -> Temporaries:
    """Return what the compiler plans beyond the state on one device.

    Compiled for the devices of the mesh where those are what is planned for, by the TPU's compiler
    for a described slice where libtpu is installed, and otherwise for virtual CPU devices: an upper
    bound, for attention is not fused there and 16-bit products are computed in float32.
    """
    batch_size, attention = build.settings.train.batch_size, build.settings.model.attention
    if topology.here or topology.chip is None:
        backend, kind = jax.default_backend(), hardware.device_kind()
        compiled = build.compile(mesh, batch_size, attention, backend, kind)
        way = "compiled for these devices"
        return Temporaries(compiled.temporaries, way, None, compiled.estimate(topology.chip))
    reason = ""
    if topology.chip.torus:
        try:
            described, kind = described_mesh(topology, mesh), topology.chip.kinds[0]
            compiled = build.compile(described, batch_size, attention, "tpu", kind)
        except Exception as error:  # of any kind: libtpu is missing, or refuses slice or step
            words = str(error).strip().splitlines()[0]
            if (found := re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", words)) is not None:
                needed = float(found[1]) * 1024 ** (1 + "KMGT".index(found[2]))
                way = "by the TPU's own compiler, which refuses the step for want of memory"
                return Temporaries(round(needed), way, False)
            reason = f" (the TPU's compiler did not do it: {words[:100]})"
        else:
            way = "compiled by the TPU's own compiler for the described slice"
            return Temporaries(compiled.temporaries, way, True, compiled.estimate(topology.chip))
    # Copies of the model beyond two change no array of a device: fewer devices compile sooner.
    copies = min(mesh.shape["data"], 2)
    sizes = (copies, mesh.shape["fsdp"], mesh.shape["tensor"])
    part = sharding.make_mesh(*sizes, devices=list(mesh.devices.flat)[: math.prod(sizes)])
    rows = batch_size // mesh.shape["data"] * copies
    compiled = build.compile(part, rows, "xla", "tpu" if topology.chip.torus else "gpu", "")
    way = f"at most; compiled for {part.size} CPU devices with the same arrays on each{reason}"
    return Temporaries(compiled.temporaries, way, None)


def compile_for_one(topology: Topology, program: Any, *arguments: Any, **static: Any) -> Compiled:
    """Compile a jitted program for one described TPU chip; the arguments give shapes and dtypes.

    Raises what libtpu raises, or ImportError.
    """
    mesh = sharding.make_mesh(topology.devices, 1, 1, jax.devices("cpu")[: topology.devices])
    chip = SingleDeviceSharding(described_mesh(topology, mesh).devices.flat[0])
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=chip), arguments
    )
    assert topology.chip is not None
    with taken_for("tpu", topology.chip.kinds[0]):
        traced = program.trace(*shapes, **static)
        return Compiled(traced, traced.lower().compile())


def kept_bytes(build: Builder, topology: Topology, mesh: Mesh) -> int:
    """Return the bytes of activations that a micro batch's backward pass reads, on one device.

    By the shapes of what jax.vjp keeps: no compiler can do with less, and there are temporaries
    beside it. The scores of attention [..., L, L] (and one more for a learned key) do not count
    where they are computed again, by a kernel or by a CPU row by row; arrays with an axis of heads
    or hidden units are split over tensor.
    """
    model, train = build.settings.model, build.settings.train
    with taken_for("tpu"):  # whose plain attention is the same for two rows and for four
        small, large = (_residuals(build, rows) for rows in (2, 4))
    backend, form = _backend(topology), attention_form(build.settings, topology)
    # By blocks a row is its noisy and its clean tokens.
    L = model.max_seq_len * (2 if train.block_length else 1)
    scores = train.batch_size // train.micro_batches * model.num_heads * L**2
    annealed = build.settings.adapt.attention_steps > 0  # by a bias on all of the scores
    by_row = backend == "cpu" and mesh.size == 1 and scores > MOST_SCORES and not annealed
    is_recomputed = by_row or form in ("cudnn", "splash")
    split = {model.num_heads, hidden_units(model)}
    total = 0
    for a, b in zip(small, large, strict=True):  # arrays that do not grow are not activations
        # Features [rows, L, D] may have D = L: they have no axis of heads beside that of rows.
        by_heads = a.shape[: max(a.ndim - 3, 0)] != b.shape[: max(b.ndim - 3, 0)]
        is_scores = by_heads and a.shape[-2:] in ((L, L), (L, L + 1))
        if not (is_recomputed and is_scores):
            ways = mesh.shape["tensor"] if split & set(a.shape) else 1
            total += (b.size - a.size) * a.dtype.itemsize // (2 * ways)
    return (
        total * train.batch_size // (train.micro_batches * mesh.shape["data"] * mesh.shape["fsdp"])
    )


def attention_form(settings: Settings, topology: Topology) -> str:
    """Return which form of attention a run takes on the devices (`ops.attention`)."""
    model = settings.model
    if settings.adapt.attention_steps:  # the steps that need most
        return "xla"
    if model.name == "gidd" and not model.attention:
        # No kernel takes its masks, of prompts and blocks, and cuDNN none of its soft cap.
        has_mask = settings.data.has_givens or settings.train.block_length > 0
        if has_mask or _backend(topology) == "gpu":
            return "xla"
    head_dim = model.head_dim if model.name == "llama" else 0
    head_dim, dtype = head_dim or model.hidden_size // model.num_heads, jnp.dtype(model.dtype)
    return model.attention or automatic(_backend(topology), dtype, model.max_seq_len, head_dim)


def _backend(topology: Topology) -> str:
    if topology.chip is None:
        return "cpu"
    return "tpu" if topology.chip.torus else "gpu"


def _residuals(build: Builder, rows: int) -> list[Any]:
    """Return the shapes and dtypes of what the backward pass of `rows` sequences reads."""
    objective = build.objective("xla").at(jnp.int32(0))
    shape = (rows, build.settings.model.max_seq_len)
    tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    # Of times of positions the network keeps more than of rows'.
    by_position = build.settings.process.has_position_times
    times: Any = jax.ShapeDtypeStruct(shape if by_position else shape[:1], jnp.float32)
    given: Any = None
    if build.settings.data.has_givens:
        given = jax.ShapeDtypeStruct(shape, jnp.bool_)
    lengths: Any = None
    if build.settings.data.short_rows:
        lengths = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    noised = Noised(tokens, times, given, lengths)
    autoregressive = objective.process is None
    losses = jax.ShapeDtypeStruct((rows, shape[1] - autoregressive), jnp.float32)

    def backward(params: Any, x: Any, noised: Any, coefficient: Any) -> Any:
        def loss(params: Any) -> Any:
            return objective.summed_loss(params, x, noised, coefficient)[0]

        return jax.vjp(loss, params)[1]

    backward_pass = jax.eval_shape(backward, abstract_params(objective), tokens, noised, losses)
    return jax.tree.leaves(backward_pass)


def described_mesh(topology: Topology, mesh: Mesh) -> Mesh:
    """Return the mesh over a described TPU slice; raises what libtpu raises, or ImportError."""
    from jax.experimental import topologies

    assert topology.chip is not None
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ImportError("pip install libtpu to have it")
    # There is no TPU host to ask about itself; what it would say only silences libtpu's errors.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    # A v4 chip is one device, as in a real run, not one for each of its cores.
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"
    if topology.devices == 1:  # a host of several chips is what is described otherwise
        options["chips_per_host_bounds"] = [1, 1, 1]
    described = topologies.get_topology_desc(
        f"{topology.chip.name}:{topology.shape}", platform="tpu", **options
    )
    return sharding.make_mesh(*mesh.shape.values(), devices=described.devices)


@contextlib.contextmanager
def taken_for(backend: str, kind: str = "") -> Iterator[None]:
    """Let code that asks for the backend hear this one: it chooses chunks and layouts by it.

    Kernels are chosen by the kind of device (`hardware.device_kind`), '' where the program is
    compiled for other devices than those it is meant for.
    """
    real, real_kind = jax.default_backend, hardware.device_kind
    jax.default_backend, hardware.device_kind = lambda: backend, lambda: kind
    try:
        yield
    finally:
        jax.default_backend, hardware.device_kind = real, real_kind
