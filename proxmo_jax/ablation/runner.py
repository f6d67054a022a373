"""Studies: whole agents trained under many settings and seeds at once, and a page written from the numbers.

    proxmo ablate train --study components --seeds 16
    python -m proxmo_jax.ablation.studies.components --quick

Cells of the same sizes are one program; those with the same choices of the estimator are stacked and mapped, `chunk`
runs at a time, split over the devices there are. Every finished chunk is kept, so that a study cut off goes on where it
was. `study.write` says what is left behind.
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
from proxmo_jax.ablation.vector_agent import Knobs, Spec, make_run
from proxmo_jax.agent.report import progress_bar, terminal
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.types import Settings

# What the results of a run depend on. Named, not imported: `proxmo_jax.estimator.estimator` is a function and a module.
SOURCES = (
    "proxmo_jax.ablation.vector_agent",
    "proxmo_jax.ablation.vector_household",
    "proxmo_jax.estimator.estimator",
    "proxmo_jax.estimator.partial_sums",
    "proxmo_jax.estimator.proximity",
    "proxmo_jax.estimator.types",
    "proxmo_jax.training.losses",
    "envs_bridge.household.engine",
    "envs_bridge.household.game",
    "envs_bridge.household.generate",
    "envs_bridge.household.lexicon",
)
STUDIES = ("components", "temperature", "modulation", "success_rate", "difficulty", "noise")


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
    """Houses to train in; about half as many, never trained in, to be evaluated in."""
    learning_rate: float = 0.01
    entropy: float = 0.01


def main(config: Config, study: Study | None = None, console: Console | None = None) -> Path:
    """Run or go on with a study; returns its folder. Raises UserError for settings that cannot work."""
    console = console or terminal()
    study = study or load(config.study)
    check(config, study)
    began, folder = time.time(), config.out / (study.name + ("_quick" if config.quick else ""))
    folder.mkdir(parents=True, exist_ok=True)
    remember_programs(folder)
    results = train_all(config, study, folder, console)
    houses = house_count(config), held_out_count(house_count(config))
    write(folder, study, results, houses=houses, quick=config.quick, seconds=time.time() - began)
    console.print(f"{folder}/ holds results.csv, summary.csv, curves.png and report.md.", soft_wrap=True)
    return folder


def load(name: str) -> Study:
    """A study by its name. Raises UserError for one there is not."""
    if name not in STUDIES:
        raise UserError(f"--study must be one of {', '.join(STUDIES)}; got {name!r}")
    return importlib.import_module(f"experiments.ablation_{name}").STUDY


def check(config: Config, study: Study) -> None:
    for name in ("seeds", "chunk"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(config, name)}")
    if config.houses < 30:
        raise UserError(f"--houses must be at least 30, got {config.houses}: each task type needs some")
    if not 0.0 < config.learning_rate < np.inf:
        raise UserError(f"--learning-rate must be above 0, got {config.learning_rate:g}")
    if not 0.0 <= config.entropy < np.inf:
        raise UserError(f"--entropy must be at least 0, got {config.entropy:g}")
    labels = [cell.label for cell in study.cells]
    if len(set(labels)) < len(labels) or not labels:
        raise UserError(f"study {study.name}: needs cells of different labels, got {', '.join(labels) or 'none'}")


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


def choices_of(settings: Settings) -> Settings:
    """The static choices alone: equal for settings that differ in numbers only."""
    return jax.tree.map(lambda _: 1.0, settings)


def numbers_of(settings: Settings) -> Settings:
    """The numbers alone, under the default choices: what runs of one program are stacked from."""
    return jax.tree.unflatten(jax.tree.structure(Settings()), jax.tree.leaves(settings))


def house_count(config: Config) -> int:
    """Houses to train in."""
    return 60 if config.quick else config.houses


def held_out_count(count: int) -> int:
    """Houses to be evaluated in beside so many to train in: whole rollouts of 64 attempts, where there are enough."""
    return max(64 * (count // 100), 12)


def make_houses(level: str, count: int, *, paraphrases: bool = True) -> tuple[vh.Houses, vh.Houses, vh.Texts]:
    """(train, held out, texts): houses of the level or of several in turn, the six task types in turn; texts with the
    pieces of their paraphrases or without."""
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


def train_all(config: Config, study: Study, folder: Path, console: Console) -> Results:
    """Every cell from every seed; finished chunks are read back."""
    seeds = 2 if config.quick else config.seeds
    programs: dict[tuple[str, Spec], dict[Settings, list[int]]] = {}
    for number, cell in enumerate(study.cells):
        kinds = programs.setdefault((cell.level, spec_of(config, study, cell)), {})
        kinds.setdefault(choices_of(cell.settings), []).append(number)
    found: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    with progress_bar(console) as bar:
        task = bar.add_task(study.name, total=len(study.cells) * seeds, note="")
        for (level, spec), kinds in programs.items():
            size = chunk_size([len(cells) * seeds for cells in kinds.values()], config.chunk)
            program = None
            for kind, cells in enumerate(kinds.values()):
                pairs = [(cell, seed) for cell in cells for seed in range(seeds)]
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
        return np.stack([[found[c, s][name] for s in range(seeds)] for c in range(len(study.cells))])

    evaluated = stacked("eval")
    return Results(
        [cell.label for cell in study.cells], every * np.arange(evaluated.shape[2]), evaluated, stacked("by_kind"),
        {name: stacked(name) for name in CURVES},
    )  # fmt: skip


def chunk_size(counts: Sequence[int], at_most: int) -> int:
    """Runs of a chunk, a multiple of the devices, that cost least: a kind's last chunk is filled up by repeating its
    last run, and small chunks are slow. A run alone takes more than twice what it takes among sixteen (BENCHMARKS.md,
    Ablations), hence a chunk counts as two runs more on each device than it holds.

    counts: runs of each kind; at_most: on each device.
    """
    devices = jax.device_count()

    def cost(size: int) -> int:
        return sum(-(-count // size) for count in counts) * (size + 2 * devices)

    return min((devices * each for each in range(1, at_most + 1)), key=cost)


def compiled(config: Config, level: str, spec: Spec, kinds: Sequence[Settings]):
    """(Knobs [N], keys [N], kind) -> curves [N, ...], the runs split over the devices; see `make_run`."""
    houses = make_houses(level, house_count(config), paraphrases=spec.paraphrases)
    return over_devices(make_run(*houses, spec, kinds))


def over_devices(run):
    """`make_run`'s function mapped over runs, and jitted."""
    mesh, split, whole = Mesh(np.array(jax.devices()), ("runs",)), PartitionSpec("runs"), PartitionSpec()
    mapped = jax.vmap(run, (0, 0, None))
    return jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=(split, split, whole), out_specs=split, check_vma=False))


def run_chunk(
    config: Config, study: Study, program, kind: int, part: list[tuple[int, int]], size: int
) -> dict[str, np.ndarray]:
    """The curves of these (cell, seed) pairs, all of one kind; the last is repeated to fill the chunk up."""
    filled = part + part[-1:] * (size - len(part))
    knobs = [
        Knobs(numbers_of(cell.settings), config.learning_rate, config.entropy, cell.paraphrase)
        for cell in (study.cells[c] for c, _ in filled)
    ]
    stacked = jax.tree.map(lambda *x: jnp.asarray(x, jnp.float32), *knobs)
    keys = jnp.stack([jax.random.key(seed) for _, seed in filled])
    return {name: np.asarray(x)[: len(part)] for name, x in program(stacked, keys, jnp.int32(kind)).items()}


def fingerprint(config: Config, study: Study, spec: Spec, part: list[tuple[int, int]]) -> str:
    """A name for a chunk's results by what they depend on: the settings, and the source of `SOURCES`. Other modules and
    JAX itself are left out: remove `chunks` when those have changed."""
    cells = [(dataclasses.asdict(study.cells[c]) | {"label": "", "baseline": ""}, s) for c, s in part]
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
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def read(path: Path, part: list[tuple[int, int]]) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files}
    return {pair: {name: x[i] for name, x in arrays.items()} for i, pair in enumerate(part)}


def from_command_line(study: Study) -> None:
    """A study's own command: `python -m experiments.ablation_NAME [--quick] [--seeds N] ...`."""
    import tyro

    from proxmo_jax.policy.sharding import keep_freed_memory

    keep_freed_memory()
    use_every_core()
    config = tyro.cli(Config, default=Config(study=study.name), description=study.question)
    main(dataclasses.replace(config, study=study.name), study)
