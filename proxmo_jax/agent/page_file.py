"""Write a page that shows rollouts turn by turn, with what every estimator gives each turn. Open it in a browser.

proxmo report runs/household                    # learning curves and the kept rollouts, to runs/household/page.html
proxmo report runs/household --iteration 40     # the rollout of one iteration
proxmo report steps.jsonl                       # steps of any trainer, to steps.html
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from proxmo_jax.agent.curves import curves
from proxmo_jax.agent.kept_rollouts import kept
from proxmo_jax.agent.report import read_metrics, terminal, watched
from proxmo_jax.agent.run_files import stored_config
from proxmo_jax.agent.settings import Config as RunConfig
from proxmo_jax.agent.settings import of_preset
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.packing import column
from proxmo_jax.estimator.presets import PRESETS
from proxmo_jax.estimator.steps_file import read_steps
from proxmo_jax.estimator.types import Settings
from proxmo_jax.estimator.words import Vocabulary
from proxmo_jax.page.build import Parts, page
from proxmo_jax.page.estimates import estimate, selection, taken
from proxmo_jax.paths import write_whole

MAX_TURNS = 20_000


@dataclass(frozen=True)
class Config:
    """What to show, and where to write it."""

    source: tyro.conf.Positional[Path]
    """Folder of a run, or a file of steps (.npz or .jsonl) as for `proxmo advantages`, which may also have the task,
    prompt, response, command and next_texts of each step."""
    iteration: int | None = None
    """Show the rollout of this iteration alone; default: all that the run has kept."""
    out: Path | None = None
    """The page; default: page.html in the run's folder, or beside the steps with .html for its ending."""
    preset: str = "proxmo"
    """The estimator that the page of a file of steps begins with; that of a run begins with its own."""
    max_turns: Annotated[int, tyro.conf.arg(metavar="N")] = MAX_TURNS
    """Turns on the page: what is beyond is left out in whole iterations, the oldest first, or in whole groups."""


def main(config: Config) -> None:
    """Read, estimate, write. Raises UserError for what cannot be shown."""
    if config.max_turns < 1:
        raise UserError(f"--max-turns must be at least 1, got {config.max_turns}")
    console = terminal()
    if config.source.is_dir():
        target, said = page_of_run(
            config.source, iteration=config.iteration, out=config.out, max_turns=config.max_turns, console=console
        )
    else:
        if config.iteration is not None:
            raise UserError(f"--iteration: {config.source} is a file of steps; only the folder of a run has iterations")
        target, said = page_of_steps(config)
    for sentence in said:
        console.print(sentence, soft_wrap=True)
    console.print(f"{target} ({target.stat().st_size / 1e6:.1f} MB): open it in a browser", soft_wrap=True)


def page_of_steps(config: Config) -> tuple[Path, list[str]]:
    """Write the page of a file of steps; its path, and sentences on what is left out."""
    source = config.source
    if config.preset not in PRESETS:
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}; got {config.preset!r}")
    methods = {config.preset: PRESETS[config.preset](), **{name: preset() for name, preset in PRESETS.items()}}
    target = config.out or source.with_suffix(".html")
    try:
        steps, note = shortened(read_steps(source), config.max_turns)
        parts = Parts()
        parts.add("", steps, estimate(steps, methods), config.preset, note)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(source)) else f"{source}: {error}") from error
    write_whole(target, page(parts, source.name, ["steps of a trainer"], [], None, methods))
    return target, [note] if note else []


def page_of_run(
    folder: Path, *, iteration: int | None = None, out: Path | None = None, max_turns: int = MAX_TURNS, console: Any
) -> tuple[Path, list[str]]:  # fmt: skip
    """Write the page of a run; its path, and sentences on what is left out.

    Args:
        folder: of the run.
        iteration: the only one to show; None: all that are kept, the newest first, up to `max_turns`.
        out: the page; None: page.html in the folder.
        max_turns: turns on the page.
        console: shows the progress.

    Raises:
        UserError: for a folder without a run, an iteration that was not kept, and a rollout that cannot be read and is
            the only one.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no run (no config.json); need the folder of a run or a file of steps")
    run, rows = stored_config(folder), read_metrics(folder / "metrics.jsonl")
    methods = methods_of(run)
    files = rollouts(folder, rows, iteration)
    notes = [] if files else ["This run has kept no rollout: train with --keep-rollouts N to see its turns here."]
    parts, vocabulary, left, skipped = Parts(), Vocabulary(), max_turns, []
    for number, path in watched(sorted(files.items(), reverse=True), "rollouts", console, len(files)):
        try:
            steps = read_steps(path)
            if len(steps.get("group", ())) > left and parts.iterations:
                skipped.append(number)
                continue
            steps, note = shortened(steps, left)
            parts.add(str(number), steps, estimate(steps, methods, vocabulary), run.preset, note)
            left -= len(steps["group"])
        except UserError as error:
            message = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
            if iteration is not None:
                raise UserError(message) from error
            notes.append(f"Iteration {number} is left out: {message}.")
    if skipped:
        numbers = ", ".join(map(str, sorted(skipped)))
        notes.append(f"Left out for room: iterations {numbers} (one: --iteration N; more turns: --max-turns N).")
    parts.iterations.reverse()
    target = out or folder / "page.html"
    drawn = curves(rows) if rows else None
    write_whole(target, page(parts, folder.resolve().name, facts(run, rows), notes, drawn, methods))
    return target, notes + [one["note"] for one in parts.iterations if one["note"]]


def methods_of(run: RunConfig) -> dict[str, Settings]:
    """The run's own estimator, and every preset as `proxmo train` would set it, with the run's penalty."""
    knobs: dict[str, Any] = {"invalid_penalty": run.estimator.invalid_penalty, "success_reward": run.env.reward_scale}
    presets = {name: dataclasses.replace(of_preset(name).estimator, **knobs) for name in PRESETS}
    return {run.preset: run.estimator, **{name: value for name, value in presets.items() if name != run.preset}}


def rollouts(folder: Path, rows: list[dict], iteration: int | None) -> dict[int, Path]:
    """The files to show by iteration; that of the last one if none was kept. Raises UserError if `iteration` is not."""
    files = kept(folder)
    if not files and rows and (folder / "rollout.npz").is_file():
        files = {int(rows[-1]["iteration"]): folder / "rollout.npz"}
    if iteration is None:
        return files
    if iteration not in files:
        has = f"it has those of {', '.join(map(str, files))}" if files else "it has none (--keep-rollouts)"
        raise UserError(f"--iteration {iteration}: {folder} has kept no rollout of it; {has}")
    return {iteration: files[iteration]}


def shortened(steps: dict[str, Any], most: int) -> tuple[dict[str, Any], str]:
    """At most so many of the steps, in whole groups, and a sentence on what is left out."""
    rows = selection(steps, most)
    if rows is None:
        return steps, ""
    count, groups = len(steps["group"]), len(set(column(steps["group"])))
    kept = taken(steps, rows)
    shown = len(set(column(kept["group"])))
    return kept, (
        f"{len(rows):,} of {count:,} turns are shown, {shown:,} of {groups:,} groups, with the advantages of a batch of"
        " these groups alone (more: --max-turns N)."
    )


def facts(run: RunConfig, rows: list[dict]) -> list[str]:
    """The run in short."""
    done = int(rows[-1]["iteration"]) if rows else 0
    size = f"{run.rollout.num_groups} groups of {run.rollout.group_size}"
    level = f"{run.env.level} " if run.env.name == "household" else ""
    model = Path(run.model.path).name if run.model.path else "small policy"
    iterations = f"{done} of {run.iterations} iterations"
    return [run.preset, f"{level}{run.env.name}", model, iterations, size, f"seed {run.seed}"]
