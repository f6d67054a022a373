"""What a compiled program costs a chip, read from its text: FLOPs, bytes of HBM, bytes between chips, time.

XLA's own `cost_analysis` counts the body of a loop once, and nothing of a Pallas kernel. Here a loop counts as often
as it runs: its condition compares a counter with a constant, or the caller knows. An operation takes the longer of
its FLOPs at the chip's peak and its bytes at HBM's bandwidth (the roofline, Williams et al., 2009); operations follow
one another, and collectives run beside them. Elementwise work, latencies and what overlaps badly are free: the time
is an optimistic one.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from proxmo_jax.plan.chips import Chip
from proxmo_jax.plan.hlo import Computation, Instruction, Module
from proxmo_jax.policy.decoding import PROMPT_PART

NOTHING = set(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id iota domain opt-barrier"
    " broadcast add-dependency async-update async-done copy-done slice-done dynamic-slice-done all-gather-done"
    " all-reduce-done collective-permute-done send-done recv-done".split()
)
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that they write into their first
VIEWS = ("bitcast", "copy", "get-tuple-element")  # an operand as it is
SPLASH = {"fwd": 4, "dq": 6, "dkv": 8}  # FLOPs for each pair of tokens and dimension: 2, 3 and 4 products


@dataclass
class Cost:
    """Of one chip.

    Attributes:
        flops: of matrix products and attention kernels.
        bytes: read from and written to HBM.
        sent: bytes that arrive from other chips.
        busy: seconds of the roofline without collectives.
        cycles: the compiler's estimate of its operations' cycles, where it makes one.
        unknown_loops: loops that were counted once because nothing says how often they run.
    """

    flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    busy: float = 0.0
    cycles: float = 0.0
    unknown_loops: int = 0

    def add(self, other: "Cost", times: float = 1.0) -> None:
        """Add another cost, so many times."""
        for name in ("flops", "bytes", "sent", "busy", "cycles"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.unknown_loops += other.unknown_loops

    def seconds(self, chip: Chip) -> float:
        """The roofline estimate of the time."""
        return max(self.busy, self.sent / chip.axis_bandwidth)

    def compiler_seconds(self, chip: Chip) -> float:
        """The compiler's estimate of the time, with collectives beside its operations."""
        return max(self.cycles / chip.clock, self.sent / chip.axis_bandwidth)


@dataclass
class Analysis:
    """Costs of a program.

    Attributes:
        module: its text, parsed.
        chip: what it runs on.
        loops: how often loops run that depend on data, the outermost first.
    """

    module: Module
    chip: Chip
    loops: tuple[float, ...] = ()
    known: dict[tuple[str, int], Cost] = field(default_factory=dict)

    def total(self) -> Cost:
        """Of the whole program."""
        return self.of(self.module.entry, 0)

    def of(self, name: str, depth: int) -> Cost:
        """Of a computation inside so many loops of unknown length."""
        if (name, depth) not in self.known:
            cost, computation = Cost(), self.module.computations[name]
            for instruction in computation.instructions.values():
                self.count(cost, computation, instruction, depth)
            self.known[name, depth] = cost
        return self.known[name, depth]

    def count(self, cost: Cost, within: Computation, i: Instruction, depth: int) -> None:
        """Add an instruction."""
        computations = self.module.computations
        if i.kind == "while":
            body, condition = i.attribute("body"), i.attribute("condition")
            assert body is not None
            assert condition is not None
            times = trips(computations[condition], computations[body], within, i)
            deeper = depth + (times is None)
            if times is None:
                times = self.loops[depth] if depth < len(self.loops) else 1.0
                cost.unknown_loops += depth >= len(self.loops)
            cost.add(self.of(body, deeper), times)
            cost.add(self.of(condition, deeper), times)
        elif i.kind == "conditional":
            names = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            every = re.findall(r"%([\w.\-]+)", names[1]) if names else []
            every = every or [n for n in (i.attribute("true_computation"), i.attribute("false_computation")) if n]
            if PROMPT_PART in i.rest:
                every = every[-1:]  # all prompts are as long as they may be
            for name in every:
                cost.add(self.of(name, depth), 1 / len(every))
        elif i.kind == "call" or i.kind == "async-start":
            if name := i.attribute("to_apply") or i.attribute("calls"):
                cost.add(self.of(name, depth))
        elif i.kind not in NOTHING:
            self.operation(cost, within, i)

    def operation(self, cost: Cost, within: Computation, i: Instruction) -> None:
        """Add one operation, a fusion or a kernel."""
        fused = self.module.computations.get(i.attribute("calls") or "") if i.kind == "fusion" else None
        flops = sum(product_flops(c, o) for c, o in self.inside(within, i, fused)) + kernel_flops(within, i)
        moved = self.moved(within, i, fused)
        cost.sent += sum(received(o) for c, o in self.inside(within, i, fused) if begins_collective(c, o))
        seconds = max(flops / self.chip.flops, moved / self.chip.bandwidth)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
        cost.flops += flops
        cost.bytes += moved
        cost.busy += seconds
        cost.cycles += float(cycles[1]) if cycles else seconds * self.chip.clock

    def inside(self, within: Computation, i: Instruction, fused: Computation | None) -> Iterator[tuple]:
        """The operations of an instruction, with their computations: those of a fusion, or itself."""
        if fused is None:
            yield within, i
            return
        for o in fused.instructions.values():
            inner = self.module.computations.get(o.attribute("calls") or "") if o.kind == "fusion" else None
            yield from self.inside(fused, o, inner)

    def moved(self, within: Computation, i: Instruction, fused: Computation | None) -> float:
        """Bytes that an operation reads from and writes to HBM."""
        if i.kind == "copy-start":
            return sum(a.bytes for a in i.arrays[:2] if a.in_hbm)
        if i.kind in ("dynamic-slice", "slice", "gather", "slice-start", "dynamic-slice-start"):
            return 2 * sum(a.bytes for a in i.arrays[:1])
        if i.kind in IN_PLACE:
            return 2 * sum(a.bytes for a in within.instructions[i.operands[IN_PLACE[i.kind]]].arrays)
        if i.kind.endswith("-start"):
            return 0.0
        read = 0.0
        for number, name in enumerate(i.operands):
            operand = within.instructions.get(name)
            if operand is None or not operand.arrays or not all(a.in_hbm for a in operand.arrays):
                continue
            whole = sum(a.bytes for a in operand.arrays)
            read += whole if fused is None else self.used(fused, fused.parameters[number], whole)
        if fused is None:
            return read + sum(a.bytes for a in i.arrays if a.in_hbm)
        results = fused.root.operands if fused.root.kind == "tuple" else [fused.root.name]
        for array, name in zip(i.arrays, results, strict=False):
            read += self.stored(fused, fused.instructions[name], array.bytes) if array.in_hbm else 0.0
        return read

    def used(self, fused: Computation, source: Instruction, whole: float) -> float:
        """Bytes of a fusion's operand that it reads."""
        total = 0.0
        for user in fused.users[source.name]:
            if user.kind in ("dynamic-slice", "slice", "gather"):
                total += sum(a.bytes for a in user.arrays)
            elif user.kind in IN_PLACE and user.operands[0] == source.name:
                continue
            elif user.kind in VIEWS:
                total += self.used(fused, user, whole)
            elif user.kind == "tuple" or user.kind.startswith("all-") or "AsyncCollective" in user.rest:
                continue  # handed on
            elif user.kind == "fusion" and (inner := self.module.computations.get(user.attribute("calls") or "")):
                places = [n for n, name in enumerate(user.operands) if name == source.name]
                total += sum(self.used(inner, inner.parameters[n], whole) for n in places)
            else:
                return whole
        return min(total, whole)

    def stored(self, fused: Computation, result: Instruction, whole: float) -> float:
        """Bytes of a fusion's result that it writes."""
        while result.kind in VIEWS and result.operands[0] in fused.instructions:
            result = fused.instructions[result.operands[0]]
        if result.kind in IN_PLACE:
            return min(sum(a.bytes for a in fused.instructions[result.operands[IN_PLACE[result.kind]]].arrays), whole)
        inner = self.module.computations.get(result.attribute("calls") or "") if result.kind == "fusion" else None
        if inner is not None and inner.root.kind != "tuple":
            return self.stored(inner, inner.root, whole)
        return 0.0 if result.kind == "parameter" else whole


def trips(condition: Computation, body: Computation, within: Computation, loop: Instruction) -> float | None:
    """How often a loop runs whose condition compares a counter with a constant; None if it is not such a one."""
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):  # XLA's compiler for CPUs says so
        return float(said[1])
    root = condition.root
    if root.kind != "compare" or "direction=LT" not in root.rest:
        return None
    counter, limit = (condition.instructions[name] for name in root.operands)
    index = re.search(r"index=(\d+)", counter.rest)
    if counter.kind != "get-tuple-element" or limit.kind != "constant" or index is None:
        return None
    start = within.instructions[loop.operands[0]]
    first = _constant(within, start.operands[int(index[1])]) if start.kind == "tuple" else None
    step = None
    if body.root.kind == "tuple":
        following = body.instructions[body.root.operands[int(index[1])]]
        if following.kind == "add":
            step = next((c for c in (_constant(body, name) for name in following.operands) if c is not None), None)
    return max(math.ceil((float(limit.rest) - (first or 0.0)) / (step or 1.0)), 0)


def _constant(within: Computation, name: str) -> float | None:
    """The value of a number, if it is a constant."""
    found = within.instructions.get(name)
    while found is not None and found.kind in ("copy", "bitcast"):
        found = within.instructions.get(found.operands[0])
    return float(found.rest) if found is not None and found.kind == "constant" else None


def product_flops(within: Computation, i: Instruction) -> float:
    """FLOPs of a matrix product, which is a convolution in a program for a TPU; 0 for anything else."""
    if i.kind == "dot":
        left = within.instructions[i.operands[0]].arrays[0].shape
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        summed = math.prod(left[int(d)] for d in axes[1].split(",") if d) if axes else 1
        return 2.0 * math.prod(i.arrays[0].shape) * summed
    if i.kind != "convolution":
        return 0.0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels is not None, i.rest[:200]
    left, right = (within.instructions[name].arrays[0].shape for name in i.operands[:2])
    size = dict(zip(labels[2], right, strict=True))
    inputs, result = dict(zip(labels[1], left, strict=True)), dict(zip(labels[3], i.arrays[0].shape, strict=True))
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    total = 2.0 * result["b"] * result["f"] * size["i"] / (int(groups[1]) if groups else 1)
    for d in sorted(label for label in size if label.isdigit()):

        def of(name: str, default: str, d: str = d) -> str:
            return fields[name].split("x")[int(d)] if name in fields else default

        low = int(of("pad", "0_0").split("_")[0])
        stride, spread, dilation = (int(of(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        total *= _valid(inputs[d], size[d], result[d], low, stride, spread, dilation)
    return total


def _valid(inputs: int, window: int, results: int, low: int, stride: int, spread: int, dilation: int) -> int:
    """Pairs of result and window along a dimension that meet an input, not padding."""
    count, last = 0, (inputs - 1) * spread
    for w in range(window):
        offset = w * dilation - low
        if stride == 1 and spread == 1:
            count += max(min(results - 1, last - offset) - max(0, -offset) + 1, 0)
            continue
        for r in range(results):
            at = r * stride + offset
            count += 0 <= at <= last and at % spread == 0
    return count


def kernel_flops(within: Computation, i: Instruction) -> float:
    """FLOPs of a splash attention kernel, from its name and operands: blocks past the diagonal are not computed."""
    found = re.match(r"splash_mha_(fwd|dq|dkv)", i.name)
    if i.kind != "custom-call" or not found:
        return 0.0
    operands = [a for name in i.operands for a in within.instructions[name].arrays]
    masks = [a.shape for a in operands if len(a.shape) >= 3 and a.bytes == math.prod(a.shape)]
    *rows, length, size = max((a.shape for a in operands if a.bytes == 2 * math.prod(a.shape)), key=math.prod)
    blocks = masks[0][-1] if masks else 1
    return SPLASH[found[1]] * math.prod(rows) * length**2 * size * (blocks + 1) / (2 * blocks)


def begins_collective(within: Computation, i: Instruction) -> bool:
    """Whether an operation is a collective, and not the rest of one that runs beside several fusions."""
    if i.kind.removesuffix("-start") not in COLLECTIVES:
        return False
    part = "async_collective_fusion_config" in i.rest
    return not part or any("AsyncCollectiveStart" in o.rest for o in within.instructions.values())


def received(i: Instruction) -> float:
    """Bytes that a chip receives in a collective by a ring algorithm."""
    kind, every = i.kind.removesuffix("-start"), [a.bytes for a in i.arrays]
    if kind == "collective-permute":
        return every[0]
    result = sum(every)
    if i.kind.endswith("-start"):  # its type is (operands, results, ...)
        result = every[1] if kind == "all-gather" else every[0]
    n = group_size(i.rest)
    share = (n - 1) / n
    return result * {"all-reduce": 2 * share, "reduce-scatter": n * share}.get(kind, share)


def group_size(rest: str) -> int:
    """Chips of a group of a collective."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found[1].split(","))
    return 1
