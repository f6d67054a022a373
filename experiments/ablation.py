"""Studies: whole agents trained under many settings and seeds at once, and a page written from the numbers.

    proxmo ablate train --study components --seeds 16
    python -m experiments.ablation_components --quick

Cells of one program (the same sizes and static choices of the estimator) are stacked and mapped, `chunk` runs at a
time, split over the devices there are. Every finished chunk is kept, so that a study cut off goes on where it was.
What is left behind: results.csv (every evaluation of every run), summary.csv, curves.png, report.md.
"""

import csv
import dataclasses
import hashlib
import importlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from rich.console import Console

from envs_bridge.household.game import TASK_TYPES, build_game
from envs_bridge.household.generate import LEVELS, make_game
from experiments import vector_household as vh
from experiments.vector_agent import Knobs, Spec, make_run
from proxmo_jax.report import progress_bar
from proxmo_jax.types import Settings

STUDIES = ("components", "temperature", "modulation", "success_rate", "difficulty", "noise")


@dataclass(frozen=True)
class Cell:
    """One setting of a study. level: easy, medium, hard, or several joined by `+`, in equal shares."""

    label: str
    settings: Settings
    level: str = "easy"
    groups: int = 8
    members: int = 8
    turns: int = 20
    paraphrase: float = 0.0
    baseline: str = ""
    """Label of the cell that this one is compared with; default: the study's first."""


@dataclass(frozen=True)
class Study:
    """question: what the study asks, one sentence. cells: the first is what the others are compared with."""

    name: str
    question: str
    cells: Sequence[Cell]
    iterations: int = 160
    remark: str = ""


@dataclass(frozen=True)
class Config:
    """Train every setting of a study from many seeds."""

    study: str = "components"
    """components, temperature, modulation, success_rate, difficulty or noise."""
    seeds: int = 16
    quick: bool = False
    """Two seeds, few iterations and houses: whether it runs, not what it finds."""
    out: Path = Path("runs/ablations")
    """Folder; the study's own is made in it, and gone on with if it is there."""
    chunk: int = 16
    """Runs that are trained at once on each device."""
    houses: int = 240
    """Houses to train in; two fifths as many, never trained in, to be evaluated in."""
    learning_rate: float = 0.01
    entropy: float = 0.01


@dataclass
class Results:
    """eval float32 [cells, seeds, points], success on held-out houses; by_kind [cells, seeds, 6], at the end; curves:
    means over the iterations between evaluations [cells, seeds, points - 1]."""

    labels: list[str]
    iterations: np.ndarray
    eval: np.ndarray
    by_kind: np.ndarray
    curves: dict[str, np.ndarray] = field(default_factory=dict)


def main(config: Config, study: Study | None = None, console: Console | None = None) -> Path:
    """Run or go on with a study; returns its folder. Raises ValueError for settings that cannot work."""
    console = console or Console()
    study = study or load(config.study)
    check(config, study)
    began, folder = time.time(), config.out / (study.name + ("_quick" if config.quick else ""))
    folder.mkdir(parents=True, exist_ok=True)
    remember_programs(folder)
    results = train_all(config, study, folder, console)
    write(folder, config, study, results, time.time() - began)
    console.print(f"{folder}/ holds results.csv, summary.csv, curves.png and report.md.", soft_wrap=True)
    return folder


def load(name: str) -> Study:
    """A study by its name. Raises ValueError for one there is not."""
    if name not in STUDIES:
        raise ValueError(f"--study must be one of {', '.join(STUDIES)}; got {name!r}")
    return importlib.import_module(f"experiments.ablation_{name}").STUDY


def check(config: Config, study: Study) -> None:
    for name in ("seeds", "chunk"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(config, name)}")
    if config.houses < 30:
        raise ValueError(f"--houses must be at least 30, got {config.houses}: each task type needs some")
    labels = [cell.label for cell in study.cells]
    if len(set(labels)) < len(labels) or not labels:
        raise ValueError(f"study {study.name}: needs cells of different labels, got {', '.join(labels) or 'none'}")


def use_every_core() -> None:
    """Where JAX runs on a CPU: as many virtual devices as there are cores, since runs need nothing of each other. To be
    called before JAX has started."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = (
            f"{flags} --xla_force_host_platform_device_count={min(os.cpu_count() or 1, 8)}".strip()
        )


def remember_programs(folder: Path) -> None:
    """Keep compiled programs beside the study's results: a study that goes on does not compile again."""
    jax.config.update("jax_compilation_cache_dir", str(folder.parent.resolve() / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


def spec_of(config: Config, study: Study, cell: Cell) -> Spec:
    iterations = 20 if config.quick else study.iterations
    return Spec(
        groups=cell.groups, members=cell.members, turns=cell.turns, iterations=iterations,
        eval_every=5 if config.quick else 10, paraphrases=cell.paraphrase > 0,
    )  # fmt: skip


def program_of(config: Config, study: Study, cell: Cell) -> tuple:
    """Cells of equal programs are trained together."""
    static = tuple(
        getattr(cell.settings, f.name) for f in dataclasses.fields(Settings) if f.metadata.get("static")
    )  # fmt: skip
    return cell.level, spec_of(config, study, cell), static


def make_houses(level: str, count: int) -> tuple[vh.Houses, vh.Houses, vh.Texts]:
    """(train, held out, texts): houses of the level or of several in turn, the six task types in turn."""
    levels = level.split("+")
    unknown = set(levels) - set(LEVELS)
    if unknown:
        raise ValueError(f"level: need {', '.join(LEVELS)} or some joined by '+'; got {level!r}")
    sizes = {"train": count, "valid_unseen": max(2 * count // 5, 12)}
    games = [
        build_game(make_game(split, i, 0, levels[i // 6 % len(levels)], TASK_TYPES[i % 6])[1])
        for split, size in sizes.items()
        for i in range(size)
    ]
    houses, texts = vh.build(games)
    return jax.tree.map(lambda x: x[:count], houses), jax.tree.map(lambda x: x[count:], houses), texts


def train_all(config: Config, study: Study, folder: Path, console: Console) -> Results:
    """Every cell from every seed; finished chunks are read back."""
    seeds = 2 if config.quick else config.seeds
    programs: dict[tuple, list[int]] = {}
    for number, cell in enumerate(study.cells):
        programs.setdefault(program_of(config, study, cell), []).append(number)
    found: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    with progress_bar(console) as bar:
        task = bar.add_task(study.name, total=len(study.cells) * seeds, note="")
        for key, cells in programs.items():
            pairs = [(cell, seed) for cell in cells for seed in range(seeds)]
            size = min(config.chunk * jax.device_count(), -(-len(pairs) // jax.device_count()) * jax.device_count())
            program = None
            for start in range(0, len(pairs), size):
                part = pairs[start : start + size]
                path = folder / "chunks" / f"{fingerprint(config, study, key, part)}.npz"
                if not path.exists():
                    bar.update(task, note=f"{key[0]}, {study.cells[cells[0]].settings.aggregation}")
                    program = program or compiled(config, key)
                    save(path, run_chunk(config, study, program, part, size))
                found |= read(path, part)
                bar.update(task, advance=len(part))
    every = spec_of(config, study, study.cells[0]).eval_every

    def stacked(name: str) -> np.ndarray:
        return np.stack([[found[c, s][name] for s in range(seeds)] for c in range(len(study.cells))])

    evaluated = stacked("eval")
    return Results(
        [cell.label for cell in study.cells], every * np.arange(evaluated.shape[2]), evaluated, stacked("by_kind"),
        {name: stacked(name) for name in ("success", "mixed", "turns", "log_prob")},
    )  # fmt: skip


def compiled(config: Config, key: tuple):
    """(Knobs [N], keys [N]) -> curves [N, ...], the runs split over the devices."""
    level, spec, _ = key
    run = jax.vmap(make_run(*make_houses(level, 60 if config.quick else config.houses), spec))
    mesh = Mesh(np.array(jax.devices()), ("runs",))
    split = PartitionSpec("runs")
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(split, split), out_specs=split, check_vma=False))


def run_chunk(config: Config, study: Study, program, part: list[tuple[int, int]], size: int) -> dict[str, np.ndarray]:
    """The curves of these (cell, seed) pairs; the last is repeated to fill the chunk up."""
    filled = part + part[-1:] * (size - len(part))
    knobs = [
        Knobs(cell.settings, config.learning_rate, config.entropy, cell.paraphrase)
        for cell in (study.cells[c] for c, _ in filled)
    ]
    stacked = jax.tree.map(lambda *x: jnp.asarray(x, jnp.float32), *knobs)
    keys = jnp.stack([jax.random.key(seed) for _, seed in filled])
    return {name: np.asarray(x)[: len(part)] for name, x in program(stacked, keys).items()}


def fingerprint(config: Config, study: Study, key: tuple, part: list[tuple[int, int]]) -> str:
    """A name for a chunk's results by everything that they depend on."""
    cells = [(dataclasses.asdict(study.cells[c]) | {"label": "", "baseline": ""}, s) for c, s in part]
    what = [str(key), cells, config.houses, config.learning_rate, config.entropy, config.quick]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def read(path: Path, part: list[tuple[int, int]]) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files}
    return {pair: {name: x[i] for name, x in arrays.items()} for i, pair in enumerate(part)}


# What a study found.


def bootstrap(values: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high): the mean over seeds [S] and its 95% percentile bootstrap interval."""
    index = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[index].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def measures(results: Results) -> dict[str, np.ndarray]:
    """Per run [cells, seeds]: success at the end (the last three evaluations), its mean over the run, and the
    iterations to 80% (the run's length where it is never reached)."""
    reached = results.eval >= 0.8
    first = np.where(reached.any(2), reached.argmax(2), results.eval.shape[2] - 1)
    return {
        "end": results.eval[:, :, -3:].mean(2),
        "mean": results.eval.mean(2),
        "to_80": results.iterations[first].astype(float),
    }


def write(folder: Path, config: Config, study: Study, results: Results, seconds: float) -> None:
    """Tables, figure and page."""
    with (folder / "results.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["cell", "seed", "iteration", "success"])
        for c, label in enumerate(results.labels):
            for s in range(results.eval.shape[1]):
                for i, value in zip(results.iterations, results.eval[c, s], strict=True):
                    table.writerow([label, s, int(i), f"{value:.4f}"])
    found = measures(results)
    rows = []
    for c, (cell, label) in enumerate(zip(study.cells, results.labels, strict=True)):
        base = results.labels.index(cell.baseline) if cell.baseline else 0
        row: dict[str, str] = {"cell": label, "compared with": results.labels[base] if c != base else ""}
        for name, values in found.items():
            row |= zip((name, f"{name} low", f"{name} high"), map(number, bootstrap(values[c])), strict=True)
            difference = bootstrap(values[c] - values[base])
            names = (f"{name} difference", f"{name} difference low", f"{name} difference high")
            row |= zip(names, map(number, difference) if c != base else ("", "", ""), strict=True)
        rows.append(row)
    with (folder / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure(folder / "curves.png", study, results)
    (folder / "report.md").write_text(page(config, study, results, rows, seconds))


def number(value: float) -> str:
    return f"{value:.4f}"


def figure(path: Path, study: Study, results: Results) -> None:
    """Success on held-out houses, mean over seeds with its bootstrap interval; a panel for each baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[int]] = {}
    for c, cell in enumerate(study.cells):
        panels.setdefault(cell.baseline or study.cells[0].label, []).append(c)
    shown = [
        [c for c in cells if results.labels[c] != base] for base, cells in panels.items()
    ]  # fmt: skip
    shown = [[results.labels.index(base), *cells] for base, cells in zip(panels, shown, strict=True)]
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    drawn, axes = plt.subplots(lines, columns, figsize=(5.2 * columns + 1, 3.8 * lines), sharey=True, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, cells in zip(axes.flat, shown, strict=False):
        for i, c in enumerate(cells):
            colour = "black" if i == 0 else plt.get_cmap("viridis" if len(cells) > 6 else "tab10")(
                (i - 1) / max(len(cells) - 2, 1) if len(cells) > 6 else i - 1
            )  # fmt: skip
            low, high = np.array([bootstrap(x, 1000)[1:] for x in results.eval[c].T]).T
            axis.plot(results.iterations, results.eval[c].mean(0), color=colour, label=results.labels[c], lw=1.6)
            axis.fill_between(results.iterations, low, high, color=colour, alpha=0.12, lw=0)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    for line in axes:
        line[0].set_ylabel("success, held-out houses")
        line[0].set_ylim(0, 1)
    drawn.suptitle(f"{study.name}: {results.eval.shape[1]} seeds, mean and 95% interval")
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def page(config: Config, study: Study, results: Results, rows: list[dict[str, str]], seconds: float) -> str:
    """The study as Markdown; its sentences are made from the numbers."""
    seeds = results.eval.shape[1]
    lines = [
        f"# {study.name}", "", study.question, "",
        f"{seeds} seeds, {int(results.iterations[-1])} iterations, {60 if config.quick else config.houses} houses to"
        f" train in and {max(2 * (60 if config.quick else config.houses) // 5, 12)} others to be evaluated in;"
        " commands are sampled there, as in training. The policy is a small network that scores the possible commands"
        " (`experiments/vector_agent.py` says what that leaves out). Intervals: 95%, bootstrap over seeds;"
        " differences are between runs of the same seed. `end`: mean of the last three evaluations; `mean`: over"
        " the whole run;"
        " `to 80%`: iterations until the first evaluation of 80%.", "",
        "| setting | end | mean | to 80% | compared with | difference of the means |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        end, mean = (
            f"{float(row[n]):.1%} ({float(row[n + ' low']):.1%} to {float(row[n + ' high']):.1%})"
            for n in ("end", "mean")
        )
        other = row["compared with"]
        difference = (
            f"{float(row['mean difference']):+.1%} ({float(row['mean difference low']):+.1%} to"
            f" {float(row['mean difference high']):+.1%})"
            if other
            else ""
        )
        lines.append(f"| {row['cell']} | {end} | {mean} | {float(row['to_80']):.0f} | {other} | {difference} |")
    lines += ["", "![learning curves](curves.png)", "", "## What was found", ""]
    lines += [f"- {sentence}" for sentence in findings(rows)]
    kinds = ["| setting | " + " | ".join(TASK_TYPES) + " |", "|---" * 7 + "|"]
    for label, rates in zip(results.labels, results.by_kind.mean(1), strict=True):
        kinds.append(f"| {label} | " + " | ".join(f"{rate:.0%}" for rate in rates) + " |")
    lines += ["", "## By task type, at the end", "", *kinds]
    if study.remark:
        lines += ["", study.remark]
    if config.quick:
        lines += ["", "**A quick run: too short to find anything.**"]
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"
    lines += ["", f"Took {seconds:.0f} s on {device} (this call; chunks done before are not in it)."]
    return "\n".join(lines) + "\n"


def findings(rows: list[dict[str, str]]) -> list[str]:
    """One sentence for each comparison: what can be told apart, and what cannot."""
    sentences = []
    for row in rows:
        other = row["compared with"]
        if not other:
            continue
        parts = []
        for name, words in (("mean", "over the whole run"), ("end", "at the end")):
            middle, low, high = (float(row[f"{name} difference{x}"]) for x in ("", " low", " high"))
            told = "better" if low > 0 else "worse" if high < 0 else "not told apart"
            size = f"{middle:+.1%}, {low:+.1%} to {high:+.1%}"
            parts.append(f"{told} {words} ({size})")
        sentences.append(f"{row['cell']} against {other}: {', '.join(parts)}.")
    return sentences


def from_command_line(study: Study) -> None:
    """A study's own command: `python -m experiments.ablation_NAME [--quick] [--seeds N] ...`."""
    import tyro

    from proxmo_jax.sharding import keep_freed_memory

    keep_freed_memory()
    use_every_core()
    config = tyro.cli(Config, default=Config(study=study.name), description=study.question)
    main(dataclasses.replace(config, study=study.name), study)
