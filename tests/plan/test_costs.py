"""Costs of a program read from its text, against sums by hand and against a program compiled here."""

import jax
import jax.numpy as jnp
import pytest

from proxmo_jax.plan.chips import CHIPS, Chip
from proxmo_jax.plan.costs import Analysis, group_size
from proxmo_jax.plan.hlo import parse

CHIP = Chip(flops=1e6, hbm=1e9, bandwidth=1e3, links=4e3, ports=4, axes=2, matrix_units=1, source="")
# As libtpu writes it: a loop by steps of 2 to 7 reads a layer of stacked weights, multiplies, writes one place of a
# cache and gathers; S(1) is on the chip. A collective that runs beside several fusions is in each of them.
PROGRAM = """HloModule small, is_scheduled=true, entry_computation_layout={(bf16[4,8,128]{2,1,0})->f32[]}

%read (a: bf16[4,8,128], b: s32[]) -> bf16[1,8,128] {
  %a = bf16[4,8,128]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,8,128]{2,1,0} dynamic-slice(%a, %b, %zero, /*index=3*/%zero), dynamic_slice_sizes={1,8,128}
}

%write (c: bf16[64,128], d: s32[], e: bf16[1,128]) -> bf16[64,128] {
  %c = bf16[64,128]{1,0} parameter(0)
  %d = s32[] parameter(1)
  %e = bf16[1,128]{1,0} parameter(2)
  ROOT %update = bf16[64,128]{1,0} dynamic-update-slice(%c, %e, %d, %d)
}

%start (f: bf16[4,16]) -> (bf16[4,16], bf16[16,16]) {
  %f = bf16[4,16]{1,0} parameter(0)
  %gather.1 = bf16[16,16]{1,0} all-gather(%f), channel_id=7, replica_groups=[2,4]<=[8], async_collective_fusion_config
  ROOT %begin = (bf16[4,16]{1,0}, bf16[16,16]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (g: bf16[4,16]) -> bf16[16,16] {
  %g = bf16[4,16]{1,0} parameter(0)
  ROOT %gather.2 = bf16[16,16] all-gather(%g), channel_id=7, replica_groups=[2,4]<=[8], async_collective_fusion_config
}

%condition (h: (s32[], bf16[4,8,128], bf16[64,128], bf16[4,16])) -> pred[] {
  %limit = s32[] constant(7)
  %h = (s32[], bf16[4,8,128]{2,1,0}, bf16[64,128]{1,0}, bf16[4,16]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%h), index=0
  ROOT %less = pred[]{:T(512)S(6)} compare(%at, %limit), direction=LT
}

%body (i: (s32[], bf16[4,8,128], bf16[64,128], bf16[4,16])) -> (s32[], bf16[4,8,128], bf16[64,128], bf16[4,16]) {
  %i = (s32[], bf16[4,8,128]{2,1,0}, bf16[64,128]{1,0}, bf16[4,16]{1,0}) parameter(0)
  %j = s32[]{:S(6)} get-tuple-element(%i), index=0
  %k = bf16[4,8,128]{2,1,0} get-tuple-element(%i), index=1
  %l = bf16[64,128]{1,0} get-tuple-element(%i), index=2
  %m = bf16[4,16]{1,0} get-tuple-element(%i), index=3
  %two = s32[]{:S(6)} constant(2)
  %layer = bf16[1,8,128]{2,1,0:S(1)} fusion(%k, %j), calls=%read, backend_config={"estimated_cycles":"100"}
  %x = bf16[16,8]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %y = bf16[8,128]{1,0:S(1)} bitcast(%layer)
  %product = f32[16,128]{1,0:T(8,128)S(1)} convolution(%x, %y), dim_labels=bf_io->bf
  %row = bf16[1,128]{1,0:T(2,128)(2,1)S(1)} slice(%y), slice={[0:1], [0:128]}
  %cache = bf16[64,128]{1,0} fusion(%l, %j, %row), kind=kLoop, calls=%write
  %begun = (bf16[4,16]{1,0:S(1)}, bf16[16,16]{1,0:S(1)}) fusion(%m), kind=kOutput, calls=%start
  %done = bf16[16,16]{1,0:S(1)} fusion(%m), kind=kOutput, calls=%goes_on
  %next = s32[]{:S(6)} add(%j, %two)
  ROOT %result = (s32[], bf16[4,8,128]{2,1,0}, bf16[64,128]{1,0}, bf16[4,16]{1,0}) tuple(%next, %k, %cache, %m)
}

ENTRY %main (w: bf16[4,8,128], v: bf16[64,128], u: bf16[4,16]) -> bf16[64,128] {
  %w = bf16[4,8,128]{2,1,0} parameter(0)
  %v = bf16[64,128]{1,0} parameter(1)
  %u = bf16[4,16]{1,0} parameter(2)
  %one = s32[] constant(1)
  %tuple = (s32[], bf16[4,8,128]{2,1,0}, bf16[64,128], bf16[4,16]) tuple(%one, %w, %v, %u)
  %loop = (s32[], bf16[4,8,128]{2,1,0}, bf16[64,128], bf16[4,16]) while(%tuple), condition=%condition, body=%body
  ROOT %last = bf16[64,128]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    cost = Analysis(parse(PROGRAM), CHIP).total()
    rounds = 3  # 1, 3, 5
    assert cost.flops == rounds * 2 * 16 * 8 * 128
    assert cost.sent == rounds * 16 * 16 * 2 * 3 / 4  # once, not once for each fusion that it runs beside
    read, written, small = 8 * 128 * 2, 128 * 2, 2 * 4 * 16 * 2
    assert rounds * (read + written) <= cost.bytes <= rounds * (read + written + small + 128 * 4)
    assert cost.unknown_loops == 0
    # The product takes 32.8 ms of FLOPs and no HBM, the layer 2 s of HBM.
    assert cost.busy == pytest.approx(rounds * 2 * 16 * 8 * 128 / 1e6 + cost.bytes / 1e3, rel=0.2)
    assert cost.seconds(CHIP) == max(cost.busy, cost.sent / 1e3)
    assert cost.cycles >= rounds * 100


def test_a_loop_that_depends_on_data_runs_as_often_as_is_said():
    program = PROGRAM.replace("compare(%at, %limit), direction=LT", "and(%at, %limit)")
    once, never, ten = (Analysis(parse(program), CHIP, loops).total() for loops in ((), (0.0,), (10.0,)))
    assert once.unknown_loops == 1
    assert ten.unknown_loops == never.flops == 0
    assert ten.flops == 10 * once.flops


@pytest.mark.parametrize("fused", [False, True])
def test_a_scatter_moves_its_updates(fused):
    """It works in place: neither what it is written into nor its copy counts."""
    parameters = "(a: bf16[64,128], i: s32[4,1], u: bf16[4,128]) -> bf16[64,128] {\n"
    parameters += "  %a = bf16[64,128]{1,0} parameter(0)\n  %i = s32[4,1]{1,0} parameter(1)\n"
    parameters += "  %u = bf16[4,128]{1,0} parameter(2)\n"
    scatter = "  ROOT %s = bf16[64,128]{1,0} scatter(%a, %i, %u), update_window_dims={1}, to_apply=%set\n}\n"
    program = f"ENTRY %main {parameters}{scatter}"
    if fused:
        call = "  ROOT %f = bf16[64,128]{1,0} fusion(%a, %i, %u), kind=kCustom, calls=%fused\n}\n"
        program = f"%fused {parameters}{scatter}ENTRY %main {parameters}{call}"
    updates, places = 4 * 128 * 2, 4 * 4
    assert 2 * updates <= Analysis(parse(program), CHIP).total().bytes <= 2 * updates + places


def test_branches_are_as_likely_as_one_another():
    flops = "  ROOT %p = f32[4,4]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n"
    none = "  ROOT %r = f32[4,4]{1,0} copy(%s)\n}\n"
    program = (
        "%one (q: f32[4,4]) -> f32[4,4] {\n  %q = f32[4,4]{1,0} parameter(0)\n" + flops
        + "%two (s: f32[4,4]) -> f32[4,4] {\n  %s = f32[4,4]{1,0} parameter(0)\n" + none
        + "ENTRY %main (t: f32[4,4], u: s32[]) -> f32[4,4] {\n"
        "  %t = f32[4,4]{1,0} parameter(0)\n  %u = s32[] parameter(1)\n"
        "  ROOT %v = f32[4,4]{1,0} conditional(%u, %t, %t), branch_computations={%two, %one}\n}\n"
    )  # fmt: skip
    assert Analysis(parse(program), CHIP).total().flops == 64
    prompts = program.replace("%one}", '%one}, metadata={op_name="jit(sample)/while/body/prompt_part/cond"}')
    assert Analysis(parse(prompts), CHIP).total().flops == 128  # the last one: all prompts are as long as they may be


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups=[2,8]<=[8,2]T(1,0)", 8),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", 8),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
    ],
)
def test_groups_of_collectives(groups, size):
    assert group_size(f"channel_id=3, {groups}, dimensions={{1}}") == size


def test_a_product_spread_over_a_window_counts_what_meets_no_padding():
    """The compiler writes products over two axes as convolutions with padding, whose zeros are not multiplied."""
    program = (
        "ENTRY %main (a: bf16[7,16,5], b: bf16[5,7,3]) -> f32[16,7,3] {\n  %a = bf16[7,16,5]{2,1,0} parameter(0)\n"
        "  %b = bf16[5,7,3]{2,1,0} parameter(1)\n  ROOT %c = f32[16,7,3]{2,1,0} convolution(%a, %b), window={size=7"
        " pad=6_6 rhs_reversal=1}, dim_labels=0bf_i0o->b0f\n}\n"
    )
    seven_by_seven = Analysis(parse(program.replace("f32[16,7,3]{2,1,0} conv", "f32[16,13,3]{2,1,0} conv")), CHIP)
    assert seven_by_seven.total().flops == 2 * 16 * 3 * 5 * 49


def test_a_program_compiled_here_has_the_flops_of_its_mathematics():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    shapes = jax.ShapeDtypeStruct((48, 32), jnp.float32), jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)
    text = jax.jit(jax.grad(layers, argnums=(0, 1))).lower(*shapes).compile().as_text()
    assert Analysis(parse(text), CHIPS["v5e"]).total().flops == 3 * 5 * 2 * 48 * 32 * 32
