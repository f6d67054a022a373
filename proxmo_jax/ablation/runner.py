"""Run a study: train small agents under many settings and seeds in parallel, and write a report from the numbers.

    proxmo ablate train --study components --seeds 16
    proxmo ablate train --study components --quick

Cells of the same sizes share a compiled program. Runs with the same static settings of the estimator are stacked and
mapped, `chunk` runs at a time, sharded over the devices. Each finished chunk is stored, so that an interrupted study
resumes where it stopped. `study.write` describes the output.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from rich.console import Console

from envs_bridge.household.game import TASK_TYPES, build_game
from envs_bridge.household.generate import LEVELS, make_game
from proxmo_jax.ablation import vector_household as vh
from proxmo_jax.ablation.study import CURVES, Cell, Results, Study, write
from proxmo_jax.ablation.tuning import seeds_of, trials, tuned, write_rates
from proxmo_jax.ablation.vector_agent import Knobs, Spec, make_run
from proxmo_jax.agent.report import progress_bar, terminal
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.types import Settings

# Modules that the results of a run depend on. Found by name, since `proxmo_jax.estimator.estimator` is a function, too.
SOURCES = (
    "proxmo_jax.ablation.vector_agent",
    "proxmo_jax.ablation.vector_household",
    "proxmo_jax.estimator.estimator",
    "proxmo_jax.estimator.history",
    "proxmo_jax.estimator.partial_sums",
    "proxmo_jax.estimator.proximity",
    "proxmo_jax.estimator.states",
    "proxmo_jax.estimator.types",
    "proxmo_jax.training.losses",
    "envs_bridge.household.engine",
    "envs_bridge.household.game",
    "envs_bridge.household.generate",
    "envs_bridge.household.lexicon",
)
STUDIES = ("components", "temperature", "modulation", "success_rate", "difficulty", "noise", "methods")


@dataclass(frozen=True)
class Config:
    """Train every setting of a study from many seeds."""

    study: str = "components"
    """components, temperature, modulation, success_rate, difficulty, noise or methods."""
    seeds: int | None = None
    """Default: 32 for methods, 16 for the others."""
    quick: bool = False
    """Two seeds, few iterations and houses: a test that the study runs."""
    out: Path = Path("runs/ablations")
    """The study gets a folder in it; an interrupted study there is resumed."""
    chunk: int = 4
    """Runs trained in parallel on each device; on a CPU more are no faster (BENCHMARKS.md, Ablations)."""
    houses: int = 240
    """Houses for training; about half as many held-out houses are added for evaluation."""
    learning_rate: float = 0.01
    """Of the studies that do not tune it (methods does)."""
    entropy: float = 0.01


def main(config: Config, study: Study | None = None, console: Console | None = None) -> Path:
    """Run or resume a study and return its folder. Raises UserError for invalid settings."""
    console = console or terminal()
    study = study or load(config.study)
    check(config, study)
    began, folder = time.time(), config.out / (study.name + ("_quick" if config.quick else ""))
    folder.mkdir(parents=True, exist_ok=True)
    remember_programs(folder)
    if study.learning_rates:
        found = train_all(config, trials(study), folder, console, seeds_of(study, quick=config.quick))
        study, rates = tuned(study, found)
        write_rates(folder / "tuning.csv", rates)
    results = train_all(config, study, folder, console)
    houses = house_count(config), held_out_count(house_count(config))
    write(folder, study, results, houses=houses, quick=config.quick, seconds=time.time() - began)
    console.print(f"{folder}/ holds results.csv, summary.csv, curves.png and report.md.", soft_wrap=True)
    return folder


def load(name: str) -> Study:
    """A study by its name. Raises UserError for an unknown name."""
    if name not in STUDIES:
        raise UserError(f"--study must be one of {', '.join(STUDIES)}; got {name!r}")
    return importlib.import_module(f"proxmo_jax.ablation.studies.{name}").STUDY


def check(config: Config, study: Study) -> None:
    """Raise UserError for options and studies that cannot be run."""
    for name, count in (("seeds", config.seeds), ("chunk", config.chunk)):
        if count is not None and count < 1:
            raise UserError(f"--{name} must be at least 1, got {count}")
    if config.houses < 30:
        raise UserError(f"--houses must be at least 30, got {config.houses}: each task type needs some")
    if not 0.0 < config.learning_rate < np.inf:
        raise UserError(f"--learning-rate must be above 0, got {config.learning_rate:g}")
    if not 0.0 <= config.entropy < np.inf:
        raise UserError(f"--entropy must be at least 0, got {config.entropy:g}")
    check_study(study)


def check_study(study: Study) -> None:
    """Raise UserError for cells that cannot be trained, told apart or compared."""
    labels = [cell.label for cell in study.cells]
    if len(set(labels)) < len(labels) or not labels:
        raise UserError(f"study {study.name}: needs cells of different labels, got {', '.join(labels) or 'none'}")
    for cell in study.cells:
        of = cell.settings
        if of.aggregation == "similar" or of.entropy or of.values_over == "batch":
            raise UserError(
                f"study {study.name}: {cell.label} needs similar texts, entropies or values over the batch; agents"
                " trained as arrays have none of them"
            )
    if study.reference:
        of_methods: dict[str, list[str]] = {study.reference: []}
        for cell in study.cells:
            of_methods.setdefault(cell.method, []).append(cell.case)
        if len({tuple(sorted(set(cases))) for cases in of_methods.values()}) > 1 or any(
            len(set(cases)) < len(cases) for cases in of_methods.values()
        ):
            raise UserError(f"study {study.name}: each method needs one cell in each case, {study.reference} included")


def use_every_core() -> None:
    """Make JAX on a CPU use one virtual device per core, since runs are independent. Call it before JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = (
            f"{flags} --xla_force_host_platform_device_count={min(os.cpu_count() or 1, 8)}".strip()
        )


def before_jax_starts(_: object) -> None:
    """Called by the command line with the command's settings."""
    use_every_core()


def remember_programs(folder: Path) -> None:
    """Cache compiled programs next to the study's results, so that a resumed study does not compile again."""
    jax.config.update("jax_compilation_cache_dir", str(folder.parent.resolve() / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


def spec_of(config: Config, study: Study, cell: Cell) -> Spec:
    """The static sizes of a cell's runs."""
    iterations = 20 if config.quick else study.iterations
    return Spec(
        groups=cell.groups, members=cell.members, turns=cell.turns, iterations=iterations,
        eval_every=5 if config.quick else 10, paraphrases=cell.paraphrase > 0, states=cell.states,
    )  # fmt: skip


def choices_of(settings: Settings) -> Settings:
    """The static settings only: equal for settings that differ in numbers."""
    return jax.tree.map(lambda _: 1.0, settings)


def numbers_of(settings: Settings) -> Settings:
    """The numbers only, with default static settings: these are stacked over the runs of a program."""
    return jax.tree.unflatten(jax.tree.structure(Settings()), jax.tree.leaves(settings))


def house_count(config: Config) -> int:
    """Number of houses for training."""
    return 60 if config.quick else config.houses


def held_out_count(count: int) -> int:
    """Number of held-out houses for `count` training houses: whole rollouts of 64 episodes if there are enough."""
    return max(64 * (count // 100), 12)


def make_houses(level: str, count: int, *, paraphrases: bool = True) -> tuple[vh.Houses, vh.Houses, vh.Texts]:
    """Generate the houses of a study.

    Args:
        level: easy, medium, hard, or several joined by `+`, which alternate.
        count: number of training houses; task types alternate, too.
        paraphrases: whether the texts include paraphrases.

    Returns:
        (training houses, held-out houses, texts).

    Raises:
        UserError: an unknown level.
    """
    levels = level.split("+")
    unknown = set(levels) - set(LEVELS)
    if unknown:
        raise UserError(f"level: need {', '.join(LEVELS)} or some joined by '+'; got {level!r}")
    sizes = {"train": count, "valid_unseen": held_out_count(count)}
    games = [
        build_game(make_game(split, i, 0, levels[i // 6 % len(levels)], TASK_TYPES[i % 6])[1])
        for split, size in sizes.items()
        for i in range(size)
    ]
    houses, texts = vh.build(games, paraphrases=paraphrases)
    return jax.tree.map(lambda x: x[:count], houses), jax.tree.map(lambda x: x[count:], houses), texts


def train_all(
    config: Config, study: Study, folder: Path, console: Console, seeds: Sequence[int] | None = None
) -> Results:
    """Train every cell from every seed (by default those from 0); finished chunks are read from disk."""
    seeds = range(2 if config.quick else config.seeds or study.seeds) if seeds is None else seeds
    programs: dict[tuple[str, Spec], dict[Settings, list[int]]] = {}
    for number, cell in enumerate(study.cells):
        kinds = programs.setdefault((cell.level, spec_of(config, study, cell)), {})
        kinds.setdefault(choices_of(cell.settings), []).append(number)
    found: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    with progress_bar(console) as bar:
        task = bar.add_task(study.name, total=len(study.cells) * len(seeds), note="")
        for (level, spec), kinds in programs.items():
            size = chunk_size([len(cells) * len(seeds) for cells in kinds.values()], config.chunk)
            program = None
            for kind, cells in enumerate(kinds.values()):
                pairs = [(cell, seed) for cell in cells for seed in seeds]
                for start in range(0, len(pairs), size):
                    part = pairs[start : start + size]
                    path = folder / "chunks" / f"{fingerprint(config, study, spec, part)}.npz"
                    if not path.exists():
                        bar.update(task, note=f"{level}, {study.cells[cells[0]].settings.aggregation}")
                        program = program or compiled(config, level, spec, list(kinds))
                        save(path, run_chunk(config, study, program, kind, part, size))
                    found |= read(path, part)
                    bar.update(task, advance=len(part))
    every = spec_of(config, study, study.cells[0]).eval_every

    def stacked(name: str) -> np.ndarray:
        return np.stack([[found[c, s][name] for s in seeds] for c in range(len(study.cells))])

    evaluated = stacked("eval")
    return Results(
        [cell.label for cell in study.cells], every * np.arange(evaluated.shape[2]), evaluated, stacked("by_kind"),
        {name: stacked(name) for name in CURVES},
    )  # fmt: skip


def chunk_size(counts: Sequence[int], at_most: int) -> int:
    """The cheapest number of runs per chunk, a multiple of the number of devices.

    The last chunk of a kind is padded by repeating its last run, and a single run takes more than twice its time
    among several (BENCHMARKS.md, Ablations). Hence the cost of a chunk is its size plus two runs per device.

    Args:
        counts: number of runs of each kind.
        at_most: runs per device.
    """
    devices = jax.device_count()

    def cost(size: int) -> int:
        return sum(-(-count // size) for count in counts) * (size + 2 * devices)

    return min((devices * each for each in range(1, at_most + 1)), key=cost)


def compiled(config: Config, level: str, spec: Spec, kinds: Sequence[Settings]):
    """(Knobs [N], keys [N], kind) -> curves [N, ...], with runs sharded over the devices; see `make_run`."""
    houses = make_houses(level, house_count(config), paraphrases=spec.paraphrases)
    return over_devices(make_run(*houses, spec, kinds))


def over_devices(run):
    """The function of `make_run`, mapped over runs, sharded over the devices and jitted."""
    mesh, split, whole = Mesh(np.array(jax.devices()), ("runs",)), PartitionSpec("runs"), PartitionSpec()
    mapped = jax.vmap(run, (0, 0, None))
    return jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=(split, split, whole), out_specs=split, check_vma=False))


def run_chunk(
    config: Config, study: Study, program, kind: int, part: list[tuple[int, int]], size: int
) -> dict[str, np.ndarray]:
    """The curves of (cell, seed) pairs of one kind; the last pair is repeated to pad the chunk."""
    filled = part + part[-1:] * (size - len(part))
    knobs = [
        Knobs(numbers_of(cell.settings), cell.learning_rate or config.learning_rate, config.entropy, cell.paraphrase)
        for cell in (study.cells[c] for c, _ in filled)
    ]
    stacked = jax.tree.map(lambda *x: jnp.asarray(x, jnp.float32), *knobs)
    keys = jnp.stack([jax.random.key(seed) for _, seed in filled])
    return {name: np.asarray(x)[: len(part)] for name, x in program(stacked, keys, jnp.int32(kind)).items()}


def fingerprint(config: Config, study: Study, spec: Spec, part: list[tuple[int, int]]) -> str:
    """The file name of a chunk: a hash of what its results depend on, the settings and the source of `SOURCES`.

    Other modules and JAX itself are not included: delete `chunks` after they change.
    """
    words = dict.fromkeys(("label", "baseline", "tuned_with", "method", "case"), "")
    cells = [(dataclasses.asdict(study.cells[c]) | words, s) for c, s in part]
    what = [str(spec), cells, config.houses, config.learning_rate, config.entropy, config.quick, source()]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def source() -> str:
    """A hash of the code of the agent, its household, the estimator and the loss."""
    return hash_of([source_file(name) for name in SOURCES])


def source_file(module: str) -> Path:
    """The file a module is read from."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin)


def hash_of(files: Sequence[Path]) -> str:
    """One hash of the contents of files."""
    each = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hashlib.sha256(" ".join(each).encode()).hexdigest()


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def read(path: Path, part: list[tuple[int, int]]) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """The curves of each (cell, seed) pair of a stored chunk."""
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files}
    return {pair: {name: x[i] for name, x in arrays.items()} for i, pair in enumerate(part)}
