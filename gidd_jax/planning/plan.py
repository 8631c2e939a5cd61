"""What a run will need, before it is started: memory, work, traffic and the least time of a step.

The state's bytes are exact: they follow from its abstract arrays and their shardings. Activations
are what the compiler plans for the real training step, compiled for devices that need not exist.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gidd_jax.data.arrays import with_marks
from gidd_jax.data.sources import run_tokenizer
from gidd_jax.hardware import find_chip
from gidd_jax.parallel import sharding
from gidd_jax.planning.ahead import Builder, attention_form, kept_bytes, temporaries
from gidd_jax.planning.estimate import Estimate
from gidd_jax.planning.roofline import Roofline, Sent, Topology, parse_topology, roofline
from gidd_jax.settings import Settings
from gidd_jax.training.metrics import (
    flops_per_token,
    hidden_units,
    num_columns,
    recomputed_flops_per_token,
)
from gidd_jax.training.scaling_laws import Advice, advise

HERE = "here"  # the topology of `--plan` without a value
_FORWARD_TWICE = ("full", "attention")  # of model.remat
_FLOAT32 = {"vocab_embed", "modulation", "final_modulation", "time_embed"}  # whatever model.dtype


class Memory(NamedTuple):
    """Bytes of one device by kind.

    gradients: one set, and with micro batches the sum of them too. activations: everything else
    that the step needs at once. kept: the least of them, what the backward pass reads.
    """

    parameters: int
    optimizer: int
    ema: int
    gradients: int
    activations: int
    kept: int

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer + self.ema

    @property
    def total(self) -> int:
        return self.state + self.gradients + self.activations

    @property
    def least(self) -> int:
        return self.state + self.gradients + self.kept


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs of each device, and of all of them per step.

    way: how the activations were found; accepted: the word of the chip's own compiler on whether
    the step fits, None where it was not asked. notes: what a user should know of the layout.
    flops: those of the model per token; device_flops: what one device computes in a step,
    recomputation included; bytes_moved: its memory traffic. estimate: of the step's time by the
    chip's own compiler, None where it makes none. advice: the laws' batch and rate for the run's
    tokens, None for networks that they do not know.
    """

    topology: Topology
    mesh: dict[str, int]
    model: str
    parameters: int
    memory: Memory
    way: str
    accepted: bool | None
    notes: list[str]
    tokens_per_step: int
    num_steps: int
    flops: float
    device_flops: float
    bytes_moved: float
    sent: list[Sent]
    estimate: Estimate | None
    advice: Advice | None

    @property
    def time(self) -> Roofline | None:
        """The roofline of a step; None for chips of which nothing is known."""
        chip = self.topology.chip
        return chip and roofline(chip, self.device_flops, self.bytes_moved, self.sent)

    @property
    def estimated_step(self) -> float | None:
        """Seconds of a step by the compiler's estimate, or of its traffic where that takes longer.

        None without an estimate.
        """
        chip, time = self.topology.chip, self.time
        if self.estimate is None or chip is None or time is None:
            return None
        return max(self.estimate.seconds(chip), time.interconnect)

    def mfu(self, step: float) -> float:
        """Return the share of the chips' peak that the model's FLOPs are of, in a step's time."""
        chip = self.topology.chip
        assert chip is not None
        rate = self.tokens_per_step / step
        return rate * self.flops / (chip.peak_flops * self.topology.devices)

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None where that is not known."""
        chip = self.topology.chip
        if chip is None or self.accepted is False:
            return self.accepted
        if self.memory.total <= chip.memory:
            return True
        # Its compiler may take a step whose arrays, summed up, are too many: no proof of either.
        return None if self.accepted or self.memory.least <= chip.memory else False


def set_devices(name: str) -> None:
    """Make the CPU as many devices as the topology has; before anything touches a device.

    Raises InputError for a name that is not a topology.
    """
    if name != HERE:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", parse_topology(name).devices)


def make_plan(settings: Settings, name: str) -> Plan:
    """Return the plan of a run on a topology (a name of `parse_topology`, or HERE).

    Needs as many devices as `set_devices` makes. Raises InputError for what the run would refuse:
    a mesh that does not fit the devices, a batch that does not split. Writes nothing.
    """
    settings = with_marks(settings)
    tokenizer = run_tokenizer(settings.data, write=False)
    return plan_for(settings, name, tokenizer.vocab_size, tokenizer.mask_id)


def plan_for(settings: Settings, name: str, vocab_size: int, mask_id: int) -> Plan:
    """Return the plan of a run whose tokenizer has these sizes, whatever settings.data says."""
    topology, devices = _devices(name)
    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor, devices)
    rows = settings.train.batch_size // settings.train.micro_batches
    sharding.check_batch_size(rows, mesh)
    build = Builder(settings, vocab_size, mask_id)
    state = build.state(mesh)
    parameters = device_bytes((state.params, state.base))
    gradients = device_bytes(state.params) * (2 if settings.train.micro_batches > 1 else 1)
    extra = temporaries(build, topology, mesh)
    memory = Memory(
        parameters=parameters,
        optimizer=device_bytes(state.opt_state),
        ema=device_bytes(state.ema),
        gradients=gradients,
        activations=max(extra.bytes - gradients, 0),
        kept=kept_bytes(build, topology, mesh),
    )
    tokens = settings.train.batch_size * settings.model.max_seq_len
    flops = flops_per_token(settings, vocab_size)
    keeps_attention = attention_form(settings, topology) == "splash"
    again = recomputed_flops_per_token(settings, keeps_attention)
    computed = flops + again
    return Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        model=f"{settings.model.name} {settings.model.num_layers} x {settings.model.hidden_size}",
        parameters=sum(leaf.size for leaf in jax.tree.leaves((state.params, state.base))),
        memory=memory,
        way=extra.way,
        accepted=extra.accepted,
        notes=_layout_notes(settings, vocab_size, mesh),
        tokens_per_step=tokens,
        num_steps=settings.train.num_steps,
        flops=flops,
        device_flops=computed * tokens / mesh.size,
        bytes_moved=bytes_moved(settings, memory, state.params, mesh),
        sent=bytes_sent(settings, state.params, mesh),
        estimate=extra.estimate,
        advice=_advice(settings),
    )


def _advice(settings: Settings) -> Advice | None:
    """Return what the scaling paper's laws say; they are fitted under CompleteP alone."""
    if settings.model.parametrization != "completep":
        return None
    seq_len = settings.model.max_seq_len
    return advise(settings.train.num_steps * settings.train.batch_size * seq_len, seq_len)


def device_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of abstract (or real) arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bytes_moved(settings: Settings, memory: Memory, params: Any, mesh: Mesh) -> float:
    """Return the memory traffic of one device in a step, at the least.

    2 * state (the update reads and writes it) + for each micro batch: 2 * its gradients, the
    layers' weights, gathered over fsdp, once per pass in the dtype of the products (two passes,
    three with remat = full or attention), and 2 * what the backward pass reads (written, read).
    """
    passes = 3 if settings.model.remat in _FORWARD_TWICE else 2
    gathered = sum(
        _gathered_bytes(settings, path, leaf, mesh)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    )
    each = 2 * memory.parameters + passes * gathered + 2 * memory.kept
    return 2 * memory.state + settings.train.micro_batches * each


def bytes_sent(settings: Settings, params: Any, mesh: Mesh) -> list[Sent]:
    """Return what each device sends in a step, estimated from the shardings.

    A ring over n devices sends (n-1)/n of the whole array in a gather or a reduce-scatter, twice
    that in an all-reduce. For each micro batch: parameters split over fsdp are gathered in the
    forward and in the backward pass, their gradients reduce-scattered over fsdp and all-reduced
    over data; gradients of other parameters are all-reduced over both. A compiler that all-reduces
    the former, too, as the TPU's does, sends a third more over fsdp. With tensor = t each layer
    all-reduces its activations [rows, L, D] twice per pass (with remat = full or attention the
    forward pass counts twice), the embedding and the gradient of the last features once. Arrays
    travel in the dtype of the products, those of embedding and time conditioning in float32.
    """
    d, f, t = (mesh.shape[axis] for axis in sharding.MESH_AXES)
    parts, model = settings.train.micro_batches, settings.model
    gather = split = whole = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        size = _gathered_bytes(settings, path, leaf, mesh)
        if f > 1 and "fsdp" in leaf.sharding.spec:
            gather += 3 * size * (f - 1) / f
            split += 2 * (size / f) * (d - 1) / d
        else:
            whole += 2 * size * (d * f - 1) / (d * f)
    rows = settings.train.batch_size / (parts * d * f)
    itemsize = jnp.dtype(model.dtype).itemsize
    activations = rows * model.max_seq_len * model.hidden_size * itemsize
    times = model.num_layers * (6 if model.remat in _FORWARD_TWICE else 4) + 2
    sums = times * 2 * activations * (t - 1) / t
    return [
        Sent("parameters and gradients over fsdp", t, f, parts * gather),
        Sent("gradients over data", f * t, d, parts * split),
        Sent("gradients over data and fsdp", t, d * f, parts * whole),
        Sent("activations over tensor", 1, t, parts * sums),
    ]


def _devices(name: str) -> tuple[Topology, Sequence[Any]]:
    if name == HERE:
        devices = jax.devices()
        kind = devices[0].device_kind
        return Topology(f"this machine ({kind})", find_chip(kind), len(devices), here=True), devices
    topology = parse_topology(name)
    return topology, jax.devices("cpu")[: topology.devices]


def _gathered_bytes(settings: Settings, path: Any, leaf: Any, mesh: Mesh) -> float:
    """Return the bytes of a parameter on one device while a layer uses it, gathered over fsdp."""
    is_float32 = any(getattr(entry, "key", None) in _FLOAT32 for entry in path)
    itemsize = 4 if is_float32 else jnp.dtype(settings.model.dtype).itemsize
    ways = mesh.shape["fsdp"] if "fsdp" in leaf.sharding.spec else 1
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * ways * itemsize


def _layout_notes(settings: Settings, vocab_size: int, mesh: Mesh) -> list[str]:
    """Say what a mesh does not divide: the run works, but holds it whole on every device."""
    model, rules = settings.model, dict(sharding.RULES)
    sizes = {
        "vocab": ("vocabulary", num_columns(model, vocab_size)),
        "heads": ("model.num_heads", model.num_heads),
        "mlp": ("hidden units of the MLP", hidden_units(model)),
        "embed": ("model.hidden_size", model.hidden_size),
    }
    notes = []
    for logical, (words, size) in sizes.items():
        axis = str(rules[logical])
        if size % mesh.shape[axis]:
            notes.append(
                f"not split: {words} = {size} is no multiple of mesh.{axis} = {mesh.shape[axis]}, "
                "so every device holds these parameters whole"
            )
    return notes
