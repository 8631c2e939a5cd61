"""The plan of a run against real arrays, hand-made sums and the compiler; its command's errors."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import VOCAB_SIZE, contents, tiny_config, tiny_settings

from benchmarks.collectives import total_bytes
from gidd_jax.cli import load_config
from gidd_jax.errors import InputError
from gidd_jax.hardware import CHIPS
from gidd_jax.ops import attention
from gidd_jax.parallel import sharding
from gidd_jax.planning import ahead
from gidd_jax.planning.ahead import Builder, Temporaries, kept_bytes, temporaries
from gidd_jax.planning.plan import Memory, bytes_moved, bytes_sent, make_plan
from gidd_jax.planning.report import describe
from gidd_jax.planning.roofline import Roofline, Sent, parse_topology, roofline
from gidd_jax.settings import Settings
from gidd_jax.training.build import build_objective
from gidd_jax.training.metrics import flops_per_token, recomputed_flops_per_token
from gidd_jax.training.optimizer import make_optimizer
from gidd_jax.training.programs import state_maker

GOLDEN = json.loads((Path(__file__).parents[1] / "data/golden/c05_param_counts.json").read_text())
CHIP = {chip.name: chip for chip in CHIPS}
MASK = VOCAB_SIZE - 1

# Runs the command once per line of arguments, each time in a fork that has imported everything.
MANY = """
import json, os, runpy, sys
import gidd_jax.planning.plan
for number, argv in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[1]}/{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["train", *argv]
        runpy.run_module("gidd_jax.train", run_name="__main__", alter_sys=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def settings(folder):
    return tiny_settings(folder)


@pytest.fixture(scope="module")
def plan(settings):
    return make_plan(settings, "8xH100")


@pytest.fixture(scope="module")
def whole_step(settings):
    """The step compiled for all devices of the plan."""
    return builder(settings).compile(sharding.make_mesh(8, 1, 1), 8, "xla", "gpu", "").program


@pytest.fixture
def uncompiled(monkeypatch, plan):
    """The compiler's word on the plan stands for every plan: compiling takes seconds."""
    size = plan.memory.activations + plan.memory.gradients
    found = Temporaries(size, plan.way, plan.accepted)
    monkeypatch.setattr("gidd_jax.planning.plan.temporaries", lambda *_: found)


def builder(settings):
    return Builder(settings, VOCAB_SIZE, MASK)


def real_state(settings, mesh):
    objective = build_objective(settings, VOCAB_SIZE, MASK)
    optimizer = make_optimizer(settings.optimizer, settings.model, settings.train.num_steps)
    make_state, _ = state_maker(settings, objective, optimizer, mesh)
    with sharding.activate(mesh):
        return make_state(jax.random.key(0))


def bytes_on_first_device(tree):
    first = jax.devices()[0]
    shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


@pytest.mark.usefixtures("uncompiled")
def test_state_bytes_are_those_of_real_arrays(folder):
    settings = tiny_settings(
        folder,
        **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "optimizer.ema_decay": 0.9},
    )
    plan = make_plan(settings, "v5e-8")
    state = real_state(settings, sharding.make_mesh(2, 2, 2))
    assert plan.memory.parameters == bytes_on_first_device(state.params)
    assert plan.memory.gradients == plan.memory.parameters
    assert plan.memory.optimizer == bytes_on_first_device(state.opt_state)
    assert plan.memory.ema == bytes_on_first_device(state.ema) > 0
    assert plan.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert plan.memory.parameters < 0.4 * 4 * plan.parameters  # a quarter, and what is not split


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["muon", "psgd"])
def test_state_bytes_of_other_optimizers(folder, name):
    settings = tiny_settings(folder, **{"optimizer.name": name, "mesh.fsdp": 8, "mesh.data": 1})
    described = builder(settings).state(sharding.make_mesh(1, 8, 1)).opt_state
    real = [
        jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        for leaf in jax.tree.leaves(described)
    ]
    planned = make_plan(settings, "8xH100").memory
    assert planned.optimizer == bytes_on_first_device(real) > 0
    assert planned.ema == 0


@pytest.mark.parametrize(("config", "key"), [("gidd", "total"), ("ar", "ar_llama_total")])
def test_parameters_of_the_paper(config, key):
    golden = GOLDEN["small"]
    settings = Settings.from_config(load_config(f"{config}:small"))
    build = Builder(settings, golden["vocab_size"], golden["vocab_size"] - 1)
    params = build.state(sharding.make_mesh(1, 8, 1)).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == golden[key]


def test_work_of_a_step(settings, plan):
    assert plan.flops == flops_per_token(settings, VOCAB_SIZE)
    assert plan.tokens_per_step == 8 * 16
    assert plan.device_flops == plan.flops * 128 / 8  # nothing is computed twice
    # 2 layers of width 32 at 16 tokens: 12 D^2 weights, and attention of 4 L D.
    weights, attention = 2 * 2 * 12 * 32**2, 2 * 4 * 16 * 32
    again = {
        (name, keeps): recomputed_flops_per_token(
            dataclasses.replace(settings, model=dataclasses.replace(settings.model, remat=name)),
            keeps_attention=keeps,
        )
        for name in ("none", "full", "attention", "dots")
        for keeps in (False, True)
    }
    assert again[("none", False)] == again[("none", True)] == again[("dots", True)] == 0
    assert again[("full", False)] == again[("full", True)] == weights + attention
    assert again[("dots", False)] == attention
    assert again[("attention", False)] == weights + attention
    assert again[("attention", True)] == weights


def test_step_time_by_hand():
    work = [Sent("a", 1, 8, 450e6), Sent("b", 8, 4, 50e6), Sent("alone", 1, 1, 0.0)]
    time = roofline(CHIP["H100"], 989e9, 6.7e9, work)
    assert time == pytest.approx((1e-3, 2e-3, 2e-3))  # 1 ms by NVLink and 1 ms by the network
    assert roofline(CHIP["H100"], 989e10, 6.7e9, work).limit == "compute"
    assert Roofline(1.0, 3.0, 2.0).step == 3.0
    assert Roofline(1.0, 3.0, 2.0).limit == "memory"


def test_bandwidth_of_a_ring():
    assert CHIP["H200"].bandwidth(1, 8) == CHIP["H200"].bandwidth(4, 2) == 450e9
    assert CHIP["H200"].bandwidth(8, 2) == 50e9  # one of each node takes part
    assert CHIP["H200"].bandwidth(4, 4) == 100e9  # two do: two rings, two network cards
    assert CHIP["H200"].bandwidth(1, 16) == 400e9
    assert CHIP["v5e"].bandwidth(16, 16) == 200e9  # a slice is one node


def test_bytes_moved_by_hand(folder):
    mesh = sharding.make_mesh(4, 2, 1)
    changes = {"train.micro_batches": 2, "model.remat": "full", "train.batch_size": 16}
    settings = tiny_settings(folder, **changes)
    params = builder(settings).state(mesh).params
    memory = Memory(parameters=100, optimizer=200, ema=0, gradients=200, activations=90, kept=50)
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))  # gathered, in float32
    moved = 2 * 300 + 2 * (2 * 100 + 3 * whole + 2 * 50)
    assert bytes_moved(settings, memory, params, mesh) == pytest.approx(moved)


def sent_on(settings, *sizes):
    mesh = sharding.make_mesh(*sizes)
    state = builder(settings).state(mesh)
    return state.params, [s.bytes for s in bytes_sent(settings, state.params, mesh)]


def test_bytes_sent_by_hand(folder):
    settings = tiny_settings(folder)
    params, data = sent_on(settings, 8, 1, 1)
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert data == pytest.approx([0, 0, whole * 2 * 7 / 8, 0])
    params, both = sent_on(settings, 2, 4, 1)
    leaves = jax.tree.leaves(params)
    split = sum(4 * leaf.size for leaf in leaves if "fsdp" in leaf.sharding.spec)
    assert 0.8 * whole < split < whole
    rest = (whole - split) * 2 * 7 / 8
    assert both == pytest.approx([split * 3 * 3 / 4, split / 4 * 2 * 1 / 2, rest, 0])
    tensor = sent_on(settings, 1, 1, 8)[1]
    assert tensor[:3] == [0, 0, 0]
    assert tensor[3] == pytest.approx((2 * 4 + 2) * 2 * 7 / 8 * (8 * 16 * 32 * 4))


def test_the_compiled_step_sums_the_gradients_that_the_plan_sends(settings, whole_step):
    sent = sum(sent_on(settings, 8, 1, 1)[1])
    assert total_bytes(whole_step.as_text()) * 2 * 7 / 8 == pytest.approx(sent, rel=0.02)


def test_copies_beyond_two_do_not_change_the_memory_of_one(plan, whole_step):
    planned = plan.memory.activations + plan.memory.gradients
    assert planned == pytest.approx(whole_step.memory_analysis().temp_size_in_bytes, rel=0.02)
    assert "compiled for 2 CPU devices" in plan.way
    assert jax.default_backend() == "cpu"  # while it compiled for a GPU it was said to be one


def test_kept_activations_by_hand(folder, monkeypatch):
    changes = {"model.dtype": "bfloat16", "train.batch_size": 64, "mesh.data": -1}
    mesh = sharding.make_mesh(8, 1, 1)

    def kept(topology, mesh=mesh, **more):
        build = builder(tiny_settings(folder, **(changes | more)))
        return kept_bytes(build, parse_topology(topology), mesh)

    tpu, gpu = kept("v5e-8"), kept("8xH100")
    # Probabilities of 2 layers, 8 rows, 4 heads, in float32 and bfloat16: a GPU's kernel has none.
    assert tpu - gpu == 2 * 8 * 4 * 16 * 16 * (4 + 2)
    assert kept("8xH100", **{"model.attention": "xla"}) == tpu
    assert kept("8xH100", **{"train.micro_batches": 2}) == gpu // 2
    full = kept("8xH100", **{"model.remat": "full"})
    three = kept("8xH100", **{"model.remat": "full", "model.num_layers": 3})
    assert three - full == 8 * 16 * 32 * 2  # a layer keeps what it reads: [rows, L, D] in bfloat16
    # A CPU here that goes row by row in attention changes nothing for other devices.
    with monkeypatch.context() as patch:
        patch.setattr(attention, "MOST_SCORES", 3 * 4 * 16 * 16)
        assert (kept("v5e-8"), kept("8xH100")) == (tpu, gpu)
    # Tensor splits what has heads or hidden units: the rest stays.
    tensor = kept("8xH100", sharding.make_mesh(2, 1, 4))
    assert gpu < tensor < 4 * gpu


def test_scores_of_a_learned_key_and_of_blocks_are_counted_where_they_are_kept(folder):
    """Features of a width as large as the context are none; 2 layers, 8 rows of a device."""
    changes = {"model.name": "gidd", "train.batch_size": 64, "mesh.data": -1}
    changes |= {"model.max_seq_len": 16, "model.hidden_size": 16, "model.num_heads": 2}
    mesh, topology = sharding.make_mesh(8, 1, 1), parse_topology("v5e-8")

    def kept(**more):
        return kept_bytes(builder(tiny_settings(folder, **(changes | more))), topology, mesh)

    xla, splash = (kept(**{"model.attention": form}) for form in ("xla", "splash"))
    # Four arrays of a layer in float32, and of the mask one more, with its booleans.
    assert xla - splash == 8 * 2 * 16 * 17 * (2 * 4 * 4 + 4 + 1)


def test_fits_or_not(plan):
    def fits(accepted=None, **memory):
        sizes = plan.memory._replace(optimizer=0, ema=0, gradients=0, **memory)
        return dataclasses.replace(plan, memory=sizes, accepted=accepted)

    assert "not" not in describe(fits(parameters=10, activations=int(50e9), kept=0))
    assert fits(parameters=10, activations=int(70e9), kept=0).fits is True
    tight = describe(fits(parameters=10, activations=int(70e9), kept=0))
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in tight
    assert "may fit" in describe(fits(parameters=10, activations=int(90e9), kept=int(60e9)))
    large = fits(parameters=10, activations=int(90e9), kept=int(80e9))
    assert large.fits is False
    assert "does not fit" in describe(large)
    assert fits(accepted=False, parameters=10, activations=10, kept=0).fits is False
    assert fits(accepted=True, parameters=10, activations=10, kept=0).fits is True
    taken = fits(accepted=True, parameters=10, activations=int(90e9), kept=int(80e9))
    assert taken.fits is None
    assert "may fit: the compiler takes the step, though this sum" in describe(taken)
    cpu = dataclasses.replace(plan, topology=parse_topology("cpu-8"))
    assert cpu.fits is None
    assert cpu.time is None
    assert "no roofline" in describe(cpu)


@pytest.mark.usefixtures("uncompiled")
def test_the_text(settings, plan):
    text = describe(plan)
    assert text == describe(make_plan(settings, "8xH100"))
    for part in (
        "dit 2 x 32 on 8xH100 (8 devices, data=8 fsdp=1 tensor=1)",
        f"parameters            {plan.parameters:,}\n",
        "which has 80.000 GB",
        ": fits\n",
        f"run: 20 steps, {20 * 128 / 1e9:,.3f} billion tokens, at least 0.0 s",
    ):
        assert part in text
    rate = plan.tokens_per_step / plan.time.step
    assert f"at most             {rate:,.0f} tokens/s" in text
    assert f"MFU {100 * rate * plan.flops / (8 * 989e12):.1f} %" in text


@pytest.mark.usefixtures("uncompiled")
def test_what_the_mesh_does_not_divide_is_said(folder):
    mesh = {"mesh.data": 1, "mesh.tensor": 8}
    notes = make_plan(tiny_settings(folder, "ar", **mesh), "cpu-8").notes
    assert [note.split(" = ")[0] for note in notes] == [
        "not split: vocabulary",
        "not split: model.num_heads",
    ]


def test_a_plan_knows_what_arrays_mark_and_writes_no_characters(tmp_path, monkeypatch):
    """The network of marked rows is told times of positions, and keeps more for its gradient."""
    planned = []
    monkeypatch.setattr("gidd_jax.planning.plan.plan_for", lambda *found: planned.append(found))
    given = np.arange(16) < np.full((8, 1), 4)
    np.savez(tmp_path / "rows.npz", ids=np.zeros((8, 16), int), given=given)
    data = {"data.path": str(tmp_path / "rows.npz"), "data.frame": "none"}
    marked = tiny_settings(tmp_path, **data, **{"data.tokenizer": "ids:3"})
    make_plan(marked, "cpu-8")
    assert planned[0][0].data.marked
    (tmp_path / "text.txt").write_text("abcd\nbcde\n")
    data = {"data.path": str(tmp_path / "text.txt"), "data.validation": "last:1"}
    data["data.tokenizer"] = f"chars:{tmp_path / 'made.chars'}"
    before = contents(tmp_path)
    make_plan(tiny_settings(tmp_path, **data), "cpu-8")
    assert planned[1][2:] == (5 + 3, 5)
    assert contents(tmp_path) == before
    kept = [
        sum(leaf.size for leaf in ahead._residuals(builder(settings), 2))
        for settings in (planned[0][0], marked)
    ]
    assert kept[0] > kept[1]


@pytest.mark.parametrize(
    ("name", "chip", "devices", "shape"),
    [
        ("1xL40S", "L40S", 1, ""),
        ("8xH200", "H200", 8, ""),
        ("64xA100-40GB", "A100-40GB", 64, ""),
        ("v5e-1", "v5e", 1, "1x1"),
        ("v5e-256", "v5e", 256, "16x16"),
        ("v6e-32", "v6e", 32, "4x8"),
        ("v4-8", "v4", 4, "2x2x1"),
        ("v4-128", "v4", 64, "4x4x4"),
        ("v5p-256", "v5p", 128, "4x4x8"),
    ],
)
def test_topologies(name, chip, devices, shape):
    topology = parse_topology(name)
    assert topology.chip is CHIP[chip]
    assert (topology.devices, topology.shape) == (devices, shape)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "8",
            "8xH300",
            "0xH100",
            "9xH100",
            "16xL40S",
            "2048xH100",
            "H100-8",
            "8xcpu",
            "8xv5e",
        ),
        *("v5e-2", "v5e-12", "v5e-512", "v4-4", "v4-9", "v3-8", "cpu-0", "cpu-2000"),
    ],
)
def test_other_topologies_are_refused(name):
    with pytest.raises(InputError, match=r"--plan=.*8xH200.*v5e-N.*cpu-N"):
        parse_topology(name)


REFUSAL = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (38.45G) exceeds available HBM (15.75G). HLO module: jit_step."
)


def test_what_the_tpu_compiler_says_counts(settings, monkeypatch):
    def refuse(topology, mesh):
        raise RuntimeError(REFUSAL)

    monkeypatch.setattr(ahead, "described_mesh", refuse)
    topology, mesh = parse_topology("v5e-8"), sharding.make_mesh(8, 1, 1)
    found = temporaries(builder(settings), topology, mesh)
    assert found == Temporaries(round(38.45 * 2**30), found.way, False)
    assert "refuses" in found.way


def test_a_described_slice(settings):
    """With libtpu, which needs no TPU: the TPU's program moves no less than is kept."""
    pytest.importorskip("libtpu")
    mesh, topology = sharding.make_mesh(4, 2, 1), parse_topology("v5e-8")
    found = temporaries(builder(settings), topology, mesh)
    assert found.accepted
    assert kept_bytes(builder(settings), topology, mesh) < found.bytes


def test_the_command(folder, tmp_path):
    work, logs = tmp_path / "work", tmp_path / "logs"
    work.mkdir()
    logs.mkdir()
    values = tiny_config(folder).to_json()
    (work / "config.py").write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({values!r}))\n"
    )
    before = contents(work)
    commands = [
        ["--plan=cpu-4", f"--out={tmp_path / 'plan.json'}"],
        ["--plan", "--config.mesh.fsdp=3"],
        ["--plan=8xH300"],
        ["--plan=16xH100"],
        ["--plan=v6e-16", "--config.mesh.fsdp=3"],
        ["--plan=cpu-4", "--out=plan.txt"],
        ["--out=plan.json"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(logs)],
        input=json.dumps([["--config=config.py", *command] for command in commands]),
        cwd=work,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    out = (logs / "0.out").read_text()
    errors = [(logs / f"{i}.err").read_text() for i in range(len(commands))]
    assert done.stdout.split() == ["0", *"222222"], errors
    assert "on cpu-4 (4 devices, data=4 fsdp=1 tensor=1)" in out
    assert "number of devices, 1;" in errors[1]  # those of this machine
    assert "8xH200" in errors[2]
    assert "batch of 8 rows does not split over mesh.data * mesh.fsdp = 16" in errors[3]
    assert "mesh.fsdp=3" in errors[4]
    assert "--out must end in .json: plan.txt" in errors[5]
    assert "--out belongs to --plan" in errors[6]
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert f"parameters            {report['parameters']:,}\n" in out
    for error in errors[1:]:
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1
    assert contents(work) == before
