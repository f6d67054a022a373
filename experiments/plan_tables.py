"""The plans of docs/pods.md: what is not there yet is compiled, then the page's tables are written from the JSON files.

    python -m experiments.plan_tables            # minutes of CPU for each plan; needs pip install 'proxmo-jax[plan]'
    python -m experiments.plan_tables --tables   # only the tables

A plan that does not fit is a result, too, and is kept.
"""

import json
import subprocess
import sys
from pathlib import Path

from proxmo_jax.plan.iteration import Lengths, Plan, ProgramPlan
from proxmo_jax.plan.report import duration, markdown

ROOT = Path(__file__).parents[1]
PLANS, PAGE = ROOT / "docs" / "plans", ROOT / "docs" / "pods.md"
# Data, fsdp and tensor of each slice. More devices than a mini-batch has rows need a larger one.
MESHES = {
    "1.5b": {"v5e:4x4": "1,8,2", "v6e:4x4": "1,8,2", "v5p:4x4x4": "4,8,2", "v5e:16x16": "16,8,2"},
    "7b": {"v5e:4x4": "1,4,4", "v6e:4x4": "1,4,4", "v5p:4x4x4": "2,8,4", "v5e:16x16": "4,16,4"},
}
ROWS = {"alfworld": 64, "webshop": 24}
MORE = {"v5e:16x16": ["--rollout.num-groups", "64"]}  # a group for each of its 64 hosts


def wanted() -> dict[str, list[str]]:
    """Options of each plan by the name of its file, the most wanted first."""
    plans: dict[str, list[str]] = {}
    for topology in ("v5e:4x4", "v6e:4x4", "v5p:4x4x4", "v5e:16x16"):
        for size in ("7b", "1.5b"):
            for task in ("webshop", "alfworld"):
                mesh = MESHES[size][topology]
                data, fsdp, _ = map(int, mesh.split(","))
                rows = -(-ROWS[task] // (data * fsdp)) * data * fsdp
                plans[f"{task}_{size}_{topology.replace(':', '_')}"] = [
                    *("--recipe", f"{task}_qwen2.5_{size}", "--topology", topology, "--mesh", mesh),
                    *("--optimizer.rows-per-batch", str(rows)),
                    *MORE.get(topology, []),
                ]
    first = ["webshop_7b_v5e_4x4", "webshop_7b_v5e_16x16", "alfworld_1.5b_v5e_4x4"]
    return {name: plans[name] for name in [*first, *plans]} | PEERS


PEERS = {
    # 4 rows of 8,192 tokens a device; every token counts in the loss.
    "peer_maxtext": (
        "--model llama-3.1-8b --topology v6e:16x16 --mesh 1,256,1 --only update --rollout.num-groups 64"
        " --optimizer.rows-per-batch 1024"
        " --optimizer.row-length 8192 --optimizer.micro-batch-tokens 8192 --optimizer.response-share 1"
        " --rollout.max-prompt-length 32 --rollout.max-response-length 8160"
    ).split(),
    "peer_marin": (
        "--model qwen3-32b --topology v5p:4x4x8 --mesh 1,128,1 --only update --rollout.num-groups 32"
        " --optimizer.rows-per-batch 128"
        " --optimizer.row-length 32768 --optimizer.micro-batch-tokens 32768 --optimizer.response-share 1"
        " --rollout.max-prompt-length 32 --rollout.max-response-length 32736"
    ).split(),
    "peer_sglang": (
        "--model qwen3-8b --topology v6e:2x2 --mesh 1,1,4 --only turn --rollout.num-groups 32 --rollout.group-size 8"
        " --rollout.max-prompt-length 1024 --rollout.max-response-length 1024"
    ).split(),
}


def read(name: str) -> Plan | None:
    """A plan from its file, or None."""
    path = PLANS / f"{name}.json"
    if not path.is_file():
        return None
    (values,) = json.loads(path.read_text(encoding="utf-8"))["plans"]
    programs = [ProgramPlan(**program) for program in values.pop("programs")]
    return Plan(**{**values, "lengths": Lengths(**values["lengths"]), "programs": programs})


def peers() -> str:
    """What others measured beside what is planned for the same shape and slice."""
    lines = ["| measured by others | measured | roofline | by the compiler's estimate |", "|---|---|---|---|"]
    for name, label, measured in (
        ("peer_maxtext", "MaxText, Llama-3.1-8B, 256 v6e, training", "45.5% MFU"),
        ("peer_marin", "marin, Qwen3-32B, v5p-256 (128 chips), training", "21.1% MFU"),
        ("peer_sglang", "SGLang-JAX, Qwen3-8B, 4 v6e, 256 x (1,024 + 1,024)", "7,572 tokens/s"),
    ):
        plan = read(name)
        if plan is None:
            continue
        (program,) = plan.programs
        if program.problem:
            cells = ["does not compile", ""]
        elif program.name == "update":
            cells = [f"{plan.update_mfu:.1%} MFU", f"{plan.compiler_update_mfu:.1%} MFU"]
        else:
            tokens = 256 * plan.lengths.response
            both = (program.seconds, program.compiler_seconds)
            cells = [f"{tokens / seconds:,.0f} tokens/s ({duration(seconds)})" for seconds in both]
        lines.append(f"| {label} | {measured} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "None of these plans is there yet."


def tables() -> dict[str, str]:
    """The tables of the page by their names."""
    found = {}
    for task in ROWS:
        plans = [read(name) for name in sorted(wanted()) if name.startswith(task)]
        found[task] = markdown([plan for plan in plans if plan is not None])
    return {**found, "peers": peers()}


def page(text: str) -> str:
    """The page with its tables between their markers."""
    for name, table in tables().items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = before + start + table + end + rest.partition(end)[2]
    return text


def main(arguments: list[str]) -> None:
    """Compile what is missing, and write the page."""
    PLANS.mkdir(exist_ok=True)
    for name, options in {} if "--tables" in arguments else wanted().items():
        target = PLANS / f"{name}.json"
        if not target.is_file():
            print(name, *options, flush=True)
            subprocess.run([sys.executable, "-m", "proxmo_jax", "plan", *options, "--json", str(target)], check=False)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
