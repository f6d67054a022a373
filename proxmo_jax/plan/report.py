"""A plan as text for the terminal, and as tables for a page."""

from proxmo_jax.plan.chips import GIB
from proxmo_jax.plan.iteration import Plan, ProgramPlan


def size(number: float) -> str:
    """Bytes in GiB."""
    return f"{number / GIB:.2f}"


def duration(seconds: float) -> str:
    """Seconds with three digits, in their unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1 or unit == "ms":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def percent(share: float) -> str:
    """A share with three digits."""
    return f"{100 * share:.3g}%" if share >= 1e-4 or not share else "<0.01%"


def mesh(plan: Plan) -> str:
    """The mesh as in --mesh: data,fsdp,tensor."""
    return ",".join(str(plan.mesh[axis]) for axis in ("data", "fsdp", "tensor"))


def text(plan: Plan) -> str:
    """A plan for the terminal."""
    lengths = plan.lengths
    lines = [
        f"{plan.model} on {plan.topology}, {plan.chips} chips, mesh {mesh(plan)} (data, fsdp, tensor)"
        + (f", settings of {plan.recipe}" if plan.recipe else ""),
        "A plan from compiled programs and published peak numbers, not a measurement.",
        "",
        f"GiB of a chip's {size(plan.hbm)}:",
    ]
    held = {**plan.held, "sampler's parameters": plan.sampler, "KV cache": plan.cache}
    lines += [f"  {name:<22} {size(number):>8}" for name, number in held.items()]
    lines += [
        "",
        f"  {'program':<16}{'calls':>6}{'peak GiB':>10}{'temp.':>7}{'TFLOP':>9}{'GB HBM':>9}{'GB ICI':>8}  time",
    ]
    for p in plan.programs:
        lines.append(program_line(p))
    lines.append("")
    if plan.seconds:
        shares = ", ".join(f"{name} {percent(share)}" for name, share in plan.shares.items())
        lines += [
            f"An iteration takes at least {duration(plan.seconds)} ({shares}), by the compiler's estimate of its"
            f" operations {duration(plan.compiler_seconds)}; environments not counted.",
            f"{plan.tokens_per_second:,.0f} tokens/s/chip trained on, {plan.response_tokens_per_second:,.0f} response"
            f" tokens/s/chip sampled; MFU at most {plan.mfu:.1%}, of the update {plan.update_mfu:.1%}"
            f" ({plan.compiler_update_mfu:.1%} by the compiler's estimate).",
            f"Assumed: {lengths.turns} turns, prompts of {lengths.prompt} and responses of {lengths.response} tokens,"
            f" the longest of a turn {lengths.longest}.",
        ]
    lines.append("It fits." if plan.fits else "It does not fit.")
    return "\n".join([*lines, *plan.advice])


def program_line(p: ProgramPlan) -> str:
    """A line of the table of programs."""
    start = f"  {p.name:<16}{p.calls:>6g}{size(p.peak):>10}"
    if p.problem:
        return f"{start}  does not compile: {p.problem}"
    parts = "".join(f", {name} {duration(seconds)}" for name, seconds in p.parts.items())
    numbers = f"{p.flops / 1e12:>9.3g}{p.bytes / 1e9:>9.3g}{p.received / 1e9:>8.3g}"
    fits = "" if p.fits else "  DOES NOT FIT"
    return f"{start}{size(p.temporaries):>7}{numbers}  {duration(p.seconds)}{parts}{fits}"


COLUMNS = (
    "model | slice | mesh | kept | update | rollout | iteration | rollout / estimator / update | tokens/s/chip"
    " | update MFU"
)


def markdown(plans: list[Plan]) -> str:
    """Plans as a table of a page: GiB of a chip, optimistic times."""
    lines = [f"| {COLUMNS} |", f"|{'---|' * (COLUMNS.count('|') + 1)}"]
    for plan in plans:
        peaks = {
            part: max((p.peak for p in plan.programs if p.name in names), default=0.0)
            # kept plans may have a "first turn", which was a program of its own until November 2026
            for part, names in {"update": ("update", "log-probs"), "rollout": ("turn", "first turn")}.items()
        }
        cells = [plan.model, plan.topology, mesh(plan).replace(",", ", "), size(sum(plan.held.values()))]
        cells += [size(peaks[part]) for part in ("update", "rollout")]
        if plan.seconds and plan.fits:
            shares = " / ".join(percent(plan.shares[name]) for name in ("rollout", "estimator", "update"))
            cells += [duration(plan.seconds), shares, f"{plan.tokens_per_second:,.0f}", f"{plan.update_mfu:.0%}"]
        else:
            cells += ["does not fit", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
