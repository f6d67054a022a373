"""A plan: the programs of a run compiled for a slice, and what an iteration of them takes."""

import contextlib
import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from proxmo_jax.agent.batches import response_room
from proxmo_jax.agent.settings import Config, check_devices, check_hosts, micro_batches, need
from proxmo_jax.agent.throughput import Work
from proxmo_jax.plan.chips import GIB, Topology, devices_of_a_host
from proxmo_jax.plan.costs import Analysis, Cost
from proxmo_jax.plan.hlo import parse
from proxmo_jax.plan.programs import Case, Program, bytes_on_a_chip, programs
from proxmo_jax.policy.attention import BLOCK
from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.policy.sharding import make_mesh

COMPILERS = 2  # programs that are compiled at the same time
ON_MESH = {"log-probs", "update"}  # programs that training calls with the mesh set


@dataclass(frozen=True)
class Lengths:
    """What is assumed of episodes.

    Attributes:
        turns: turns of an episode.
        prompt: tokens of a prompt, on average.
        response: tokens of a response, on average.
        longest: tokens of the longest response of a turn, which the others wait for.
    """

    turns: int
    prompt: int
    response: int
    longest: int


@dataclass
class ProgramPlan:
    """A compiled program, or one that does not fit.

    Attributes:
        name: what it does.
        calls: how often an iteration calls it.
        fits: whether it fits the chip's HBM beside what else is kept there.
        peak: bytes of HBM while it runs, all that is kept included; where it could not be compiled, its arguments, what
            is kept besides, and the compiler's number for its temporaries.
        temporaries: bytes of its temporaries; 0 where it could not be compiled.
        flops: of a chip and call.
        bytes: read from and written to HBM.
        received: bytes from other chips.
        seconds: roofline estimate of a call.
        collective_seconds: of a call, if nothing else ran.
        compiler_seconds: of a call, by the compiler's estimate of its operations.
        compile_seconds: how long it took to compile here.
        problem: the compiler's message, if it could not be compiled.
        parts: seconds of its parts, of prefill and decoding.
    """

    name: str
    calls: float
    fits: bool = False
    peak: float = 0.0
    temporaries: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    received: float = 0.0
    seconds: float = 0.0
    collective_seconds: float = 0.0
    compiler_seconds: float = 0.0
    compile_seconds: float = 0.0
    problem: str = ""
    parts: dict[str, float] = field(default_factory=dict)


@dataclass
class Plan:
    """What a run needs of a slice; bytes, FLOPs and seconds are those of a chip.

    Attributes:
        model: as it was named.
        topology: name of the slice.
        recipe: where the settings are from.
        chips: their number.
        mesh: sizes of the axes.
        settings: those that decide what fits.
        lengths: assumed of the episodes.
        hbm: bytes a program can use.
        held: bytes that are kept on a chip all the time, by name.
        sampler: bytes of the sampler's parameters.
        cache: bytes of its KV cache.
        programs: in the order in which they run.
        fits: whether all do.
        advice: what to change if it does not fit, or where chips idle.
        seconds: roofline estimate of an iteration, without the environments.
        compiler_seconds: the same by the compiler's estimate.
        shares: of the rollout, the estimator and the update in `seconds`.
        tokens_per_second: tokens trained on, per second and chip.
        response_tokens_per_second: sampled in the rollout, per second and chip.
        mfu: model FLOPs of the iteration over what the chips could do in `seconds`.
        update_mfu: that of the update alone.
        compiler_update_mfu: the same by the compiler's estimate.
    """

    model: str
    topology: str
    recipe: str
    chips: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    lengths: Lengths
    hbm: float
    held: dict[str, float]
    sampler: float
    cache: float
    programs: list[ProgramPlan] = field(default_factory=list)
    fits: bool = False
    advice: list[str] = field(default_factory=list)
    seconds: float = 0.0
    compiler_seconds: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    response_tokens_per_second: float = 0.0
    mfu: float = 0.0
    update_mfu: float = 0.0
    compiler_update_mfu: float = 0.0


PARTS = {"estimator": "estimator", "packing": "update", "log-probs": "update", "update": "update"}  # others: rollout


def make_plan(
    config: Config,
    policy: PolicyConfig,
    where: Topology,
    devices: Sequence[Any],
    lengths: Lengths,
    recipe: str = "",
    only: Sequence[str] = (),
    on_program: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Compile the programs of a run for a slice, and add up what they take.

    Args:
        config: the run's settings.
        policy: shape of its policy.
        where: the slice.
        devices: its devices.
        lengths: assumed of the episodes.
        recipe: where the settings are from, for the report.
        only: names of programs; (): all.
        on_program: called with the name of each program when it is compiled.

    Returns:
        The plan.

    Raises:
        UserError: for settings that the devices do not divide; nothing is compiled then.
    """
    check_devices(config, len(devices), len({device.process_index for device in devices}))
    mesh = make_mesh(0, config.mesh.fsdp, config.mesh.tensor, devices=devices)
    case = Case(config, policy, mesh, tuple(devices_of_a_host(list(devices), where)))
    check_hosts(config, case.hosts)
    held = {name: bytes_on_a_chip(tree) for name, tree in case.held.items()}
    makers = programs(case)
    for name in only:
        need(name in makers, f"--only: this run has the programs {', '.join(makers)}; got {name!r}")
    wanted = {name: make() for name, make in makers.items() if not only or name in only}
    calls = calls_of(case, lengths)

    def run(program: Program) -> ProgramPlan:
        with jax.set_mesh(mesh) if program.name in ON_MESH else contextlib.nullcontext():
            found = plan_program(program, case, where, held, lengths, calls[program.name])
        on_program(program.name)
        return found

    # The longest to compile come first.
    order = sorted(wanted.values(), key=lambda p: "update turn log-probs".find(p.name.split()[0]) % 99)
    with ThreadPoolExecutor(COMPILERS) as pool:
        done = {found.name: found for found in pool.map(run, order)}
    plan = Plan(
        model=config.model.path,
        topology=where.name,
        recipe=recipe,
        chips=where.count,
        mesh=dict(mesh.shape),
        settings=settings_of(case),
        lengths=lengths,
        hbm=where.chip.hbm,
        held=held,
        sampler=bytes_on_a_chip(case.decoding_shapes),
        cache=case.cache_bytes,
        programs=[done[name] for name in wanted],
    )
    plan.fits = all(p.fits for p in plan.programs)
    plan.advice = advice(plan, case)
    if not any(p.problem for p in plan.programs):
        add_times(plan, case, where)
    return plan


def settings_of(case: Case) -> dict[str, Any]:
    """The settings that decide what fits, as a run would take them."""
    config = case.config
    return {
        "rollout.max_num_seqs": config.rollout.max_num_seqs,
        "rollout.gather_weights": config.rollout.gather_weights,
        "optimizer.rows_per_batch": config.optimizer.rows_per_batch,
        "optimizer.row_length": config.optimizer.row_length,
        "optimizer.micro_batch_tokens": config.optimizer.micro_batch_tokens,
        "micro_batches": micro_batches(config, case.devices),
        "optimizer.moments_dtype": config.optimizer.moments_dtype,
        "model.param_dtype": config.model.param_dtype,
        "model.dtype": config.model.dtype,
        "model.remat": config.model.remat,
        "model.attention": case.policy.attention,
        "model.lora_rank": config.model.lora_rank,
    }


def turns_in_a_row(case: Case, lengths: Lengths) -> int:
    """Turns that a packed row holds."""
    by_tokens = case.config.optimizer.row_length // (lengths.prompt + lengths.response)
    return max(min(by_tokens, response_room(case.config) // max(lengths.response, 1)), 1)


def calls_of(case: Case, lengths: Lengths) -> dict[str, float]:
    """How often an iteration calls each program."""
    rows = math.ceil(case.episodes * lengths.turns / turns_in_a_row(case, lengths))
    batches = math.ceil(rows / case.config.optimizer.rows_per_batch)
    return {
        "merge adapters": 1,
        "gather weights": 1,
        "turn": lengths.turns,
        "estimator": 1,
        "packing": batches,
        "log-probs": batches,
        "update": batches * case.config.optimizer.num_iterations,
    }


def plan_program(
    program: Program, case: Case, where: Topology, held: dict[str, float], lengths: Lengths, calls: float
) -> ProgramPlan:
    """Compile a program and read its memory and costs; `held` are bytes by name."""
    began, others = time.time(), sum(size for name, size in held.items() if name not in program.held)
    found = ProgramPlan(program.name, calls)
    try:
        compiled, text = compiled_with_text(program.function.lower(*program.arguments, **program.options), case)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found.compile_seconds, found.problem = time.time() - began, reason(str(error))
        found.peak = others + bytes_on_a_chip(program.arguments) + needed(str(error))
        return found
    found.compile_seconds = time.time() - began
    memory, chip = compiled.memory_analysis(), where.chip
    found.temporaries = memory.temp_size_in_bytes
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    found.peak = others + own + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    found.fits = found.peak <= chip.hbm
    samples = program.name == "turn"
    module = parse(text)
    cost = Analysis(module, chip, case.loops(lengths.longest) if samples else ()).total()
    found.flops, found.bytes, found.received = cost.flops, cost.bytes, cost.sent
    found.seconds, found.compiler_seconds = cost.seconds(chip), cost.compiler_seconds(chip)
    found.collective_seconds = cost.sent / chip.axis_bandwidth
    if samples:
        prefill = Analysis(module, chip, prefill_loops(case)).total()
        decode = Cost()
        decode.add(cost)
        decode.add(prefill, -1.0)
        found.parts = {"prefill": prefill.seconds(chip), "decode": decode.seconds(chip)}
    return found


def compiled_with_text(lowered: Any, case: Case) -> tuple[Any, str]:
    """The compiled program and its text, which libtpu writes into a folder: jaxlib 0.10 refuses to read some programs
    for v6e (async-update with several operands)."""
    if case.mesh.devices.flat[0].platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (path,) = Path(folder).glob("*.after_codegen.txt")
        return compiled, path.read_text(encoding="utf-8")


def prefill_loops(case: Case) -> tuple[float, ...]:
    """`Case.loops` without a step of decoding."""
    return (*case.loops(1)[:-1], 0.0)


def reason(message: str) -> str:
    """The sentence of the compiler that says what is too large."""
    return next((line.strip() for line in message.splitlines() if "hbm" in line.lower()), message.strip())[:300]


def needed(message: str) -> float:
    """Bytes of temporaries that a program needs, by the compiler's message that it does not fit; 0: unknown."""
    found = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT])\)", message)
    return float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]] if found else 0.0


def add_times(plan: Plan, case: Case, where: Topology) -> None:
    """Fill in what follows from the times of the programs; that of an iteration only if all are there."""
    lengths, chip, work = plan.lengths, where.chip, Work.of(case.policy)
    turns = case.episodes * lengths.turns
    of_turn = np.array([lengths.prompt]), np.array([lengths.response])
    training = turns * case.config.optimizer.num_iterations * work.training(*of_turn)
    peak = plan.chips * chip.flops
    for program in plan.programs:
        if program.name == "update":
            plan.update_mfu = training / (program.calls * program.seconds * peak)
            plan.compiler_update_mfu = training / (program.calls * program.compiler_seconds * peak)
    if {p.name for p in plan.programs} != set(programs(case)):
        return
    parts = {"rollout": 0.0, "estimator": 0.0, "update": 0.0}
    for program in plan.programs:
        parts[PARTS.get(program.name, "rollout")] += program.calls * program.seconds
        plan.compiler_seconds += program.calls * program.compiler_seconds
    plan.seconds = sum(parts.values())
    plan.shares = {name: seconds / plan.seconds for name, seconds in parts.items()}
    plan.tokens_per_second = turns * (lengths.prompt + lengths.response) / plan.seconds / plan.chips
    plan.response_tokens_per_second = turns * lengths.response / parts["rollout"] / plan.chips
    passes = 1 + (case.config.loss.kl_coef > 0) + (case.config.loss.old_log_probs == "trainer")
    plan.mfu = (training + passes * turns * work.forward(*of_turn)) / (plan.seconds * peak)


def advice(plan: Plan, case: Case) -> list[str]:
    """What to change where something does not fit, and where devices compute padding."""
    config, found = case.config, []
    training = [p for p in plan.programs if not p.fits and PARTS.get(p.name) == "update"]
    sampling = [p for p in plan.programs if not p.fits and PARTS.get(p.name, "rollout") == "rollout"]
    lower = []
    if (training or sampling) and sum(plan.held.values()) > 0.5 * plan.hbm:
        if case.mesh.shape["data"] > 1:
            lower.append(f"--mesh.fsdp {config.mesh.fsdp * case.mesh.shape['data']} (now {config.mesh.fsdp})")
        if config.optimizer.moments_dtype == "float32":
            lower.append("--optimizer.moments-dtype bfloat16")
        if not config.model.lora_rank:
            lower.append("--model.lora-rank 32")
        held = sum(plan.held.values()) / GIB
        found.append(f"what is kept takes {held:.2f} GiB of {plan.hbm / GIB:.2f}: {', '.join(lower) or 'more chips'}")
    if training:
        knobs = []
        if case.policy.attention == "dense" and config.optimizer.row_length % BLOCK == 0:
            knobs.append("--model.attention splash")
        if config.model.remat != "full":
            knobs.append("--model.remat full")
        if config.optimizer.micro_batch_tokens > config.optimizer.row_length:
            knobs.append(f"--optimizer.micro-batch-tokens {config.optimizer.row_length}")
        knobs.append("a larger --mesh.fsdp or --mesh.tensor")
        found.append(f"{_names(training)} does not fit: {', '.join(knobs)}")
    if sampling:
        knobs, devices = [], case.local.shape["data"] * case.local.shape["fsdp"]
        half = case.slots // 2 // devices * devices
        if half:
            knobs.append(f"--rollout.max-num-seqs {half}")
        if config.rollout.gather_weights and case.mesh.shape["fsdp"] > 1:
            knobs.append("--rollout.gather-weights False (slower)")
        knobs.append("a larger --mesh.tensor")
        found.append(f"{_names(sampling)} does not fit: {', '.join(knobs)}")
    prompts = case.episodes // case.hosts
    if case.rows > prompts:
        of_host = " of a host" if case.hosts > 1 else ""
        found.append(
            f"a turn{of_host} has {prompts} prompts on {case.rows} rows: {1 - prompts / case.rows:.0%} of the"
            " sampler computes padding; a larger --mesh.tensor or --rollout.num-groups fills it"
        )
    return found


def _names(found: Sequence[ProgramPlan]) -> str:
    return " and ".join(p.name for p in found)
