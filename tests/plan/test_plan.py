"""`proxmo plan`: known shapes, slices, meshes that cannot be, and a small run compiled for a TPU."""

import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import plan_tables
from proxmo_jax import cli
from proxmo_jax.agent.settings import Config, check_devices, micro_batches
from proxmo_jax.agent.throughput import Work
from proxmo_jax.errors import UserError
from proxmo_jax.plan import command
from proxmo_jax.plan.chips import CHIPS, topology
from proxmo_jax.plan.iteration import Lengths, Plan, ProgramPlan, advice, calls_of, make_plan, needed
from proxmo_jax.plan.programs import Case, bytes_on_a_chip, programs
from proxmo_jax.plan.report import markdown, text
from proxmo_jax.plan.search import candidates, rough_seconds, with_mesh
from proxmo_jax.plan.shapes import shape
from proxmo_jax.policy.decoder import PolicyConfig, parameter_shapes
from proxmo_jax.policy.sharding import make_mesh

POLICY = PolicyConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=6, head_dim=16, dtype="bfloat16", remat="full",
)  # fmt: skip
LENGTHS = Lengths(4, 64, 16, 32)


def settings(**changes) -> Config:
    """A small run: 8 groups of 4 attempts of at most 4 turns."""
    config = Config()
    parts = {
        "rollout": {"num_groups": 8, "group_size": 4, "max_turns": 4, "max_response_length": 32},
        "optimizer": {"rows_per_batch": 16, "row_length": 256, "micro_batch_tokens": 256},
    }
    for part, values in changes.items():
        parts[part] = {**parts.get(part, {}), **values}
    made = {part: dataclasses.replace(getattr(config, part), **values) for part, values in parts.items()}
    return dataclasses.replace(config, **made)


def case(policy=POLICY, **changes) -> Case:
    config = settings(**changes)
    return Case(config, policy, make_mesh(0, config.mesh.fsdp, config.mesh.tensor))


# What the model cards on Hugging Face say.
@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-14b", 14_770_033_664),
        ("qwen2.5-32b", 32_763_876_352),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_known_shapes_have_the_published_number_of_parameters(model, count):
    small = shape(model)
    one = dataclasses.replace(small, num_hidden_layers=1)  # the others are like it, and take time to trace
    sizes = {
        part: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for part, tree in parameter_shapes(one).items()
    }
    layers = sizes.pop("layers")
    assert sum(sizes.values()) + small.num_hidden_layers * layers == count


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "--topology must be one of v5e, v5p, v6e and sizes, such as .* got 'v5e'"),
        ("h100:8", "got 'h100:8'"),
        ("v5e:4x4x4", "a v5e slice has 2 sizes, got 'v5e:4x4x4'"),
        ("v5p:4x0x4", "a v5p slice has 3 sizes"),
    ],
)
def test_slices_that_cannot_be(name, message):
    with pytest.raises(UserError, match=message):
        topology(name)


def test_meshes_that_cannot_be_are_refused_before_anything_compiles():
    where = topology("v5e:4x4")
    with pytest.raises(UserError, match="data 2 x fsdp 16 x tensor 1 is 32 devices, need the 16 of v5e:4x4"):
        with_mesh(settings(), "2,16,1", where)
    with pytest.raises(UserError, match=r"--mesh must be the sizes of data, fsdp and tensor, .* got '16'"):
        with_mesh(settings(), "16", where)
    with pytest.raises(UserError, match=r"'gpt-2' is neither a folder with a config.json nor one of the known shapes"):
        shape("gpt-2")
    for changes, message in (
        ({"optimizer": {"rows_per_batch": 12}}, "rows-per-batch must be a multiple of the 8 devices, got 12"),
        ({"rollout": {"max_num_seqs": 12}}, "max-num-seqs must be a multiple of the 8 devices, or 0"),
        ({"mesh": {"fsdp": 3}}, "--mesh.fsdp 3 x --mesh.tensor 1 must divide the 8 devices"),
        ({"mesh": {"tensor": 4}}, "mesh: does not divide kv_heads 2 by tensor 4"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(settings(**changes), POLICY, where, jax.devices(), LENGTHS)
    with pytest.raises(UserError, match=r"--only: this run has the programs .*update.*; got 'updates'"):
        make_plan(settings(), POLICY, where, jax.devices(), LENGTHS, only=("updates",))


def test_rows_that_do_not_divide_are_refused_by_the_update():
    """By the library's functions, too: a sentence, not a page of `shard_map`."""
    here = case(mesh={"fsdp": 8})
    update = programs(here)["update"]()
    for options, message in (
        ({"micro_batches": 5}, "16 rows of a mini-batch cannot be cut into 5 equal parts"),
        (
            {"micro_batches": 4, "config": dataclasses.replace(POLICY, attention="splash")},
            "has 4 rows, need a multiple",
        ),
    ):
        with jax.set_mesh(here.mesh), pytest.raises(UserError, match=message):
            update.function.eval_shape(*update.arguments, **{**update.options, **options})


def test_micro_batches_of_a_slice_that_is_not_here():
    """Rows of each device keep to the budget, and are the same on each."""
    config = settings(optimizer={"rows_per_batch": 64, "row_length": 4096, "micro_batch_tokens": 8192})
    assert [micro_batches(config, count) for count in (8, 16, 32, 64)] == [4, 2, 1, 1]


def test_programs_take_what_a_run_gives_them():
    """Shapes of one program are those that the others make; nothing is compiled."""
    here = case(mesh={"fsdp": 2, "tensor": 2})
    made = {name: make() for name, make in programs(here).items()}
    assert list(made) == ["gather weights", "turn", "estimator", "packing", "log-probs", "update"]
    with jax.set_mesh(here.mesh):
        results = {name: p.function.eval_shape(*p.arguments, **p.options) for name, p in made.items()}

    def like(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert like(results["packing"]) == like(made["update"].arguments[1])
    assert like(results["gather weights"]) == like(here.decoding_shapes)
    assert like(results["update"][0]) == like(made["update"].arguments[0])
    assert results["turn"].tokens.shape == (32, 32)
    assert results["log-probs"][0].shape == made["update"].arguments[1].reference.shape
    assert results["estimator"].joint.shape == (8, 4, 4)
    adapted = case(dataclasses.replace(POLICY, lora_rank=4), mesh={"fsdp": 2})
    assert bytes_on_a_chip(adapted.held["trained parameters"]) < bytes_on_a_chip(adapted.held["reference"]) / 4
    assert next(iter(programs(adapted))) == "merge adapters"


def test_what_is_kept_is_what_lies_on_a_device():
    here = case(mesh={"fsdp": 2, "tensor": 2})
    params = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), here.held["reference"])
    shards = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params)]
    assert bytes_on_a_chip(here.held["reference"]) == sum(shards)
    assert bytes_on_a_chip(here.held["optimiser"]) == pytest.approx(2 * sum(shards), abs=64)


def test_calls_of_an_iteration():
    here = case()
    # 128 turns, two in a row, which has room for 32 response tokens: 4 mini-batches of 16.
    calls = calls_of(here, LENGTHS)
    assert calls["update"] == calls["log-probs"] == 4
    assert calls["turn"] == 4
    waiting = case(rollout={"max_num_seqs": 16})
    refills, steps = waiting.loops(32)
    assert refills * steps == 2 * 31


def test_a_search_ranks_meshes_that_leave_room():
    policy = shape("qwen2.5-7b", dtype="bfloat16", remat="full", attention="splash")
    config = settings(optimizer={"rows_per_batch": 12, "row_length": 4608})
    where = topology("v6e:2x4")
    found = candidates(config, policy, where, jax.devices(), LENGTHS)
    assert {(w.mesh.fsdp, w.mesh.tensor) for w in found} == {(8, 1), (4, 1), (4, 2), (2, 2), (2, 4), (1, 4)}
    times = []
    for wanted in found:
        check_devices(wanted, 8)  # mini-batches were rounded up
        mesh = make_mesh(0, wanted.mesh.fsdp, wanted.mesh.tensor)
        times.append(rough_seconds(Case(wanted, policy, mesh), where, LENGTHS))
    assert times == sorted(times)
    with pytest.raises(UserError, match=r"no mesh of v5e:2x2 has room for what is kept, at least 28.* of 15.8"):
        candidates(config, policy, topology("v5e:2x2"), jax.devices()[:4], LENGTHS)


def test_what_does_not_fit_names_the_knob():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (32.80G) exceeds available HBM (15.75G). HLO module: jit_policy_step."
    )
    assert needed(message) == 32.8 * 2**30
    assert needed("RESOURCE_EXHAUSTED: something else") == 0
    here = case(POLICY, optimizer={"micro_batch_tokens": 512})
    plan = Plan("m", "v5e:4x2", "", 8, dict(here.mesh.shape), {}, LENGTHS, 100.0, {"trained parameters": 80.0}, 1, 1)
    plan.programs = [ProgramPlan("turn", 4), ProgramPlan("update", 3), ProgramPlan("estimator", 1, fits=True)]
    said = "; ".join(advice(plan, here))
    for knob in (
        "--mesh.fsdp 8 (now 1)", "--optimizer.moments-dtype bfloat16", "--model.lora-rank", "--model.attention splash",
        "--model.remat full", "--optimizer.micro-batch-tokens 256", "--rollout.max-num-seqs 16", "--mesh.tensor",
    ):  # fmt: skip
        assert knob in said
    plan.advice = advice(plan, here)
    plan.programs[1].problem, plan.programs[1].peak = "Ran out of memory on HBM", 3 * 2**30
    shown = text(plan)
    assert "not a measurement" in shown
    assert "update               3      3.00  does not compile: Ran out of memory on HBM" in shown
    assert shown.endswith("\n".join(["It does not fit.", *plan.advice]))
    assert "| m | v5e:4x2 | 8, 1, 1 | 0.00 | 3.00 | 0.00 | does not fit |" in markdown([plan])
    plan.programs = [ProgramPlan("turn", 4, fits=True)]
    assert advice(plan, here) == []


def test_without_the_compiler_a_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(command, "before_jax_starts", lambda config: None)
    assert cli.main(["plan", "--model", "qwen2.5-0.5b", "--topology", "v5e:2x2"]) == 2
    assert "needs Google's TPU compiler, libtpu: pip install 'proxmo-jax[plan]'" in capsys.readouterr().err


def planned(folder: Path, heads: int, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
    """The command in a process of its own, as JAX's devices cannot be chosen again in this one; what it wrote."""
    pytest.importorskip("libtpu", reason="libtpu (pip install libtpu) compiles for TPU without one")
    model = {
        "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": heads, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(model))
    run = (
        "--rollout.num-groups 8 --rollout.group-size 4 --rollout.max-turns 4 --rollout.max-prompt-length 512"
        " --rollout.max-response-length 64 --optimizer.row-length 1024 --optimizer.rows-per-batch 8"
        " --optimizer.micro-batch-tokens 2048 --recipe alfworld_qwen2.5_1.5b --json plan.json"
    ).split()
    done = subprocess.run(
        [sys.executable, "-m", "proxmo_jax", "plan", "--model", str(folder), *run, *options],
        capture_output=True, encoding="utf-8", cwd=folder, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (plan,) = json.loads((folder / "plan.json").read_text())["plans"]
    return done, plan


def test_each_host_of_a_slice_samples_on_its_own_chips(tmp_path):
    """Four hosts of four chips, each with two of the groups; on each all four chips share the heads."""
    _, plan = planned(tmp_path, 4, *"--topology v5e:4x4 --mesh 1,4,4 --only turn estimator packing".split())
    programs = {p["name"]: p for p in plan["programs"]}
    assert set(programs) == {"turn", "estimator", "packing"}
    assert all(p["fits"] for p in programs.values())
    work = Work.of(shape(str(tmp_path), dtype="bfloat16"))
    rows = 16  # of 8 episodes: no batch is smaller
    assert programs["turn"]["flops"] == pytest.approx(
        rows * work.forward(np.array([512]), np.array([64])) / 4, rel=0.25
    )


def test_a_token_reads_a_large_cache_once(tmp_path):
    """Also where a layer of it has no room in the chip's own memory."""
    lengths = "--rollout.group-size 64 --rollout.max-prompt-length 4096 --optimizer.row-length 4224".split()
    _, plan = planned(tmp_path, 2, *"--topology v5e:2x2 --mesh 1,4,1 --only turn".split(), *lengths)
    (turn,), steps = plan["programs"], 63
    places = 4096 + 64
    cache = 6 * 2 * (8 * 64 / 4) * 2 * 64 * places * 2
    assert plan["cache"] == cache
    seconds = steps * (cache + plan["sampler"]) / CHIPS["v5e"].bandwidth
    assert seconds * 0.95 < turn["parts"]["decode"] < seconds * 1.2
    assert turn["temporaries"] < 1.5 * cache


def test_a_small_run_is_planned_for_a_tpu(tmp_path):
    done, plan = planned(tmp_path, 2, "--topology", "v5e:2x2", "--mesh", "1,2,2")
    assert "It fits." in done.stdout
    programs = {p["name"]: p for p in plan["programs"]}
    policy = shape(str(tmp_path), dtype="bfloat16", remat="full")
    work, one = Work.of(policy), (np.array([512]), np.array([64]))
    # Products with weights: forward, again for the gradient, and twice that backwards; the head once, and for as many
    # tokens as a row holds. Attention, two products of which three of four blocks of 512 are computed: twice forward,
    # and with three and four products for the gradients of queries and of keys and values.
    tokens, answers = 8 * 1024, 8 * 256
    products, attention = 2 * work.matrices * tokens, 2 * work.attention * tokens * (1024 + 512)
    expected = (4 * products + (2 + 2 + 3 + 4) / 2 * attention + 3 * 2 * work.head * answers) / 4
    assert programs["update"]["flops"] == pytest.approx(expected, rel=0.05)
    assert programs["turn"]["flops"] == pytest.approx(32 * work.forward(*one) / 4, rel=0.25)
    assert 0 < programs["turn"]["parts"]["prefill"] < programs["turn"]["seconds"]
    assert all(p["fits"] and p["peak"] < 2**30 and p["compiler_seconds"] > 0 for p in programs.values())
    assert programs["update"]["received"] > 0
    assert sum(plan["shares"].values()) == pytest.approx(1)
    assert 0 < plan["shares"]["estimator"] < 0.1
    assert 0 < plan["mfu"] < 1
    assert 0 < plan["update_mfu"] < 1


def test_the_page_shows_commands_of_this_version_and_the_plans_that_are_kept():
    shown = plan_tables.PAGE.read_text(encoding="utf-8")
    lines = [line for line in shown.splitlines() if line.startswith("proxmo plan ")]
    assert len(lines) >= 4
    for line in lines:
        config = cli.parse(shlex.split(line)[1:], cli.find(["plan"]))
        where = topology(config.topology)
        run = with_mesh(config.run, config.mesh, where) if config.mesh else config.run
        shape(run.model.path)
        assert config.search or check_devices(run, where.count) is None
    assert plan_tables.page(shown) == shown
    for name in ("v5e", "v5p", "v6e"):
        assert f"| {name} | {CHIPS[name].flops / 1e12:.0f}e12 | {CHIPS[name].hbm / 2**30:.2f} GiB |" in shown
