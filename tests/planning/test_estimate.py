"""The compiler's estimate, read out of a program's text; the products that kernels hide from it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from gidd_jax.cli import load_config
from gidd_jax.hardware import CHIPS
from gidd_jax.ops.attention import OUTPUT_NAME, attention
from gidd_jax.planning.estimate import (
    NOWHERE,
    Estimate,
    Kernel,
    Operation,
    find_kernels,
    read_estimate,
)
from gidd_jax.planning.plan import _advice, make_plan
from gidd_jax.planning.report import as_report, describe
from gidd_jax.settings import Settings
from gidd_jax.training.scaling_laws import advise

V5E = next(chip for chip in CHIPS if chip.name == "v5e")
KERNEL = Kernel("attention", 2, 0.985e12, 1e6)
# As the TPU's compiler writes it: a loop of twelve rounds with a call in it, a loop whose counter
# goes up by two, one whose length depends on data, two branches, a fusion with no name of its own,
# and one from nowhere.
PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/train.py"
2 "/venv/lib/site-packages/flax/linen/module.py"
3 "/code/gidd_jax/models/layers.py"

FunctionNames
1 "main"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=8 end_line=8 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=104 end_line=110 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=3 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=3}

%fused (p: f32[8]) -> f32[8] {
  %add.1 = f32[8]{0} add(%p, %p), metadata={op_name="jit(step)/add" stack_frame_id=3}
  ROOT %c = f32[8]{0} copy(%add.1)
}

%called (p: f32[8]) -> f32[8] {
  %kernel = f32[8]{0} custom-call(%p), frontend_attributes={kernel_metadata={
"block": 512
}}
  ROOT %f = f32[8]{0} fusion(%p), calls=%fused, backend_config={"estimated_cycles":"10"}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %call = f32[8]{0} call(%g), to_apply=%called
  %d = f32[8]{0} fusion(%g), calls=%fused, metadata={op_name="jit(step)/while/dot_general" \
stack_frame_id=2}, backend_config={"estimated_cycles":"100"}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8]) tuple(/*index=0*/%next, %d), metadata={op_name="x(y)"}
}

%window (p: (f32[8], u32[])) -> (f32[8], u32[]) {
  %w = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"7"}
  %two = u32[]{:T(128)} constant(2)
  %after = u32[]{:T(128)} add(%i, %two), backend_config={}
  ROOT %t = (f32[8], u32[]) tuple(%w, %after)
}

%within (p: (f32[8], u32[])) -> pred[] {
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %most = u32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %most), direction=LT
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%until (p: (s32[], f32[8])) -> pred[] {
  %size = s32[]{:T(128)} constant(64)
  %done = s32[] multiply(%i, %size)
  ROOT %lt = pred[] compare(%done, %n), direction=LT
}

%cheap (p: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"1"}
}

%dear (p: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} negate(%p), metadata={op_name="jit(step)/neg" stack_frame_id=1}, \
backend_config={"estimated_cycles":"5"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %v = (f32[8], u32[]) while(%s), condition=%within, body=%window
  %u = (s32[], f32[8]) while(%t), condition=%until, body=%body
  %k = f32[8]{0} conditional(%b, %x, %y), branch_computations={%cheap, %dear}
  %z = f32[8]{0} conditional(%b, %x, %y), true_computation=%dear, false_computation=%cheap
  ROOT %r = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"3"}
}

"""


def test_costs_by_hand():
    estimate = read_estimate(PROGRAM, [KERNEL])
    rounds = 12 + 1  # the last loop does not say how many; that of windows: 0, 2, 4
    assert estimate.operations == [
        Operation("models/layers.py:104", "dot_general", rounds * (100 + 10)),
        Operation(NOWHERE, "", 3 * 7 + 3),
        Operation("/home/me/train.py:7", "neg", 5 + 5),
    ]
    assert estimate.cycles == 13 * 110 + 10 + 3 * 7 + 3
    assert (estimate.unknown, estimate.kernels) == (1, [KERNEL])


def test_a_program_without_estimates_has_none():
    assert read_estimate(PROGRAM.replace("estimated_cycles", "cycles"), []) is None


def test_seconds():
    # v5e: 1.5 GHz; half of 197 TFLOP/s for a kernel, or of 819 GB/s where that takes longer.
    assert Estimate(3e6, [], 0, [KERNEL]).seconds(V5E) == pytest.approx(2e-3 + 20e-3)
    mover = KERNEL._replace(bytes=819e7)
    assert Estimate(3e6, [], 0, [KERNEL, mover]).seconds(V5E) == pytest.approx(2e-3 + 60e-3)
    # So many matrix units at this clock are the peak that the maker states.
    units = {"v5e": 4, "v5p": 8, "v4": 8, "v6e": 4}
    for chip in CHIPS:
        if chip.ghz:
            peak = units[chip.name] * 2 * chip.unit**2 * 1e9 * chip.ghz
            assert chip.peak_flops == pytest.approx(peak, rel=0.01)


def test_products_of_a_kernel():
    def body(x, y, out):
        @pl.when(pl.program_id(0) > 0)
        def _():
            out[...] = x[...] @ y[...]

    def product(x, y):
        spec = pl.BlockSpec((128, 64), lambda i: (i, 0))
        return pl.pallas_call(
            body,
            grid=(3,),
            in_specs=[spec, pl.BlockSpec((64, 200), lambda i: (0, 0))],
            out_specs=pl.BlockSpec((128, 200), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((384, 200), jnp.float32),
            name="product",
        )(x, y)

    def five(x, y):
        def one(so_far, _):
            return so_far + jnp.sum(product(x, y) @ jnp.ones((200, 7))), None

        return jax.lax.scan(one, 0.0, None, length=5)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((384, 64), (64, 200))]
    # Products outside of kernels are the compiler's to estimate; 64 and 200 fill 128 and 256.
    moved = 4 * (384 * 64 + 64 * 200 + 384 * 200)
    kernel = Kernel("product", 5, 3 * 2 * 128 * 128 * 256, moved)
    assert find_kernels(jax.make_jaxpr(five)(*shapes), 128) == [kernel]


def test_products_of_attention():
    def loss(q):
        return jnp.sum(attention(q, q, q, implementation="splash"))

    q = jax.ShapeDtypeStruct((2, 512, 3, 64), jnp.bfloat16)

    def flops(program, unit):
        return sum(kernel.calls * kernel.flops for kernel in find_kernels(program, unit))

    program = jax.make_jaxpr(jax.grad(loss))(q)
    # Two products forward, five backward, each with one side of 64 that takes up a unit's width.
    for unit in (128, 256):
        assert flops(program, unit) == 7 * 2 * 2 * 3 * 512 * 512 * unit
    # Written down twice, the forward kernel runs once where its outputs are kept.
    policy = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME)
    again = jax.make_jaxpr(jax.value_and_grad(jax.checkpoint(loss, policy=policy)))(q)
    assert flops(again, 128) == flops(program, 128)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    from tiny_run import tiny_settings

    made = make_plan(tiny_settings(tmp_path_factory.mktemp("plan")), "v5e-8")
    return dataclasses.replace(made, estimate=None)  # which it has where libtpu is installed


def test_the_plan_shows_the_estimate(plan):
    assert plan.estimated_step is None
    assert as_report(plan)["estimate"] is None
    estimate = dataclasses.replace(read_estimate(PROGRAM, [KERNEL]), cycles=3e6)
    estimated = dataclasses.replace(plan, estimate=estimate)
    assert estimated.estimated_step == pytest.approx(22e-3)
    mfu = plan.flops * plan.tokens_per_step / (22e-3 * 8 * 197e12)
    assert estimated.mfu(22e-3) == pytest.approx(mfu)
    text = describe(estimated)
    assert "compiler's estimate 22.000 ms" in text
    assert "20.000 ms of it for kernels, assumed at 50 % of the chip's limits" in text
    assert "loops of unknown length, counted once: 1" in text
    assert "models/layers.py:104      0.001 ms  dot_general" in text
    report = as_report(estimated)["estimate"]
    assert (report["seconds"], report["mfu"]) == pytest.approx((22e-3, mfu))
    assert report["operations"][0]["source"] == "models/layers.py:104"
    # What devices send each other may take longer than what they compute.
    slow = dataclasses.replace(estimated, sent=[s._replace(bytes=1e12) for s in plan.sent])
    assert slow.estimated_step == slow.time.interconnect > 22e-3


def test_the_plan_says_what_the_laws_advise_where_they_hold(plan):
    assert plan.advice is None  # of another network
    assert as_report(plan)["advice"] is None
    assert "laws" not in describe(plan)
    advised = dataclasses.replace(plan, advice=advise(10**9, 2048))
    line = describe(advised).splitlines()[-1]
    assert line == (
        "laws of the scaling paper for 1.000 billion tokens: batch 49.1 rows (100,577 tokens), "
        "learning rate 0.443"
    )
    report = as_report(advised)["advice"]
    assert report["tokens"] == 10**9
    assert report["learning_rate"] == pytest.approx(0.443458516682758)


def test_the_laws_read_the_tokens_of_the_run():
    settings = Settings.from_config(load_config("gidd_scaling:25M,1e9"))
    advice = _advice(settings)
    assert advice == advise(settings.train.num_steps * settings.train.batch_size * 2048, 2048)
    model = dataclasses.replace(settings.model, parametrization="standard")
    assert _advice(dataclasses.replace(settings, model=model)) is None
