"""What a person sees of a run: progress on the terminal, `metrics.jsonl`, the learning curve, sample episodes."""

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn

from proxmo_jax.paths import write_whole

Thing = TypeVar("Thing")
EVERY, AT_LEAST, SHARE = 30.0, 3.0, 0.1  # of progress lines: seconds between them, and a task's share


def terminal() -> Console:
    """Where commands print. Texts stay as they are: names, paths and errors may hold what rich reads as markup."""
    return Console(markup=False, emoji=False)


def progress_bar(console: Console) -> Progress:
    """Shows how far, the time left, and what is measured (`note`, two short lines, to fit 80 columns); a line now and
    then where there is no terminal."""
    if not (console.is_jupyter or (console.is_interactive and console.file.isatty())):
        return ProgressLines(console)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        speed_estimate_period=3600,
    )


def watched(things: Iterable[Thing], description: str, console: Console, total: int) -> Iterator[Thing]:
    """The things, one after the other, with progress shown."""
    with progress_bar(console) as bar:
        task = bar.add_task(description, total=total, note="")
        for thing in things:
            yield thing
            bar.update(task, advance=1)


class ProgressLines(Progress):
    """Progress for a log: a line for every tenth of a task, or for 30 seconds, and one at its end."""

    def __init__(self, console: Console, clock: Callable[[], float] = monotonic):
        super().__init__(console=console, disable=True, get_time=clock)
        self._over = threading.Event()
        self._said: dict[TaskID, tuple[float, float, bool]] = {}  # when, how far, finished
        self._begun: dict[TaskID, float] = {}  # how far a task was when it began

    def start(self) -> None:
        super().start()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        self._over.set()
        for task in self.tasks:
            if self._said[task.id][1:] != (task.completed, True):
                self._say(task)
        super().stop()

    def add_task(self, description: str, *arguments, **values) -> TaskID:
        with self._lock:
            number = super().add_task(description, *arguments, **values)
            self._begun[number] = self._tasks[number].completed
            self._said[number] = self.get_time(), self._begun[number], False
        return number

    def update(self, task_id: TaskID, **values) -> None:  # type: ignore[override]
        super().update(task_id, **values)
        self._say_if_due(self._tasks[task_id])

    def _watch(self) -> None:
        """A task that does not move for long has its line, too."""
        while not self._over.wait(1.0):
            for task in self.tasks:
                self._say_if_due(task)

    def _say_if_due(self, task: Task) -> None:
        with self._lock:
            when, completed, finished = self._said[task.id]
            since = self.get_time() - when
            more = task.total is not None and task.completed - completed >= SHARE * task.total
            if not finished and (since >= EVERY or (since >= AT_LEAST and more) or task.finished):
                self._say(task)

    def _say(self, task: Task) -> None:
        with self._lock:
            self._said[task.id] = self.get_time(), task.completed, task.finished
        line = f"{task.description}: {task.completed:g}"
        if task.total is not None:
            line += f" of {task.total:g}"
        done = task.completed - self._begun[task.id]
        if task.total is not None and done > 0 and not task.finished:
            line += f", {duration((task.elapsed or 0.0) * (task.total - task.completed) / done)} left"
        note = ", ".join(str(task.fields.get("note", "")).splitlines())
        self.console.print(f"{line}, {note}" if note else line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in words: 40 s, 5 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Metrics:
    """`metrics.jsonl`: one object a line, flushed as it is written. Lines after `keep_until` are dropped at start."""

    def __init__(self, path: Path, keep_until: int | None = None):
        self.path = path
        kept = [row for row in read_metrics(path) if keep_until is not None and row["iteration"] <= keep_until]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics file up to the first line that is none, as a crash may leave one."""
    rows: list[dict] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or "iteration" not in row:
            break
        rows.append(row)
    return rows


def wilson(wins: int, count: int) -> tuple[float, float]:
    """95% Wilson interval of a success rate."""
    if count == 0:
        return 0.0, 1.0
    z, p = 1.96, wins / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def learning_curve(path: Path, runs: Sequence[tuple[str, list[dict]]], title: str) -> None:
    """Success on held-out games (with 95% intervals) over iterations, and in training, one colour per run."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    for i, (label, rows) in enumerate(runs):
        colour = f"C{i}"
        trained = [(r["iteration"], r["train/success_rate"]) for r in rows if "train/success_rate" in r]
        if trained:
            x, y = zip(*trained, strict=True)
            window = max(1, len(y) // 40)
            smooth = [
                sum(y[max(0, k - window + 1) : k + 1]) / len(y[max(0, k - window + 1) : k + 1]) for k in range(len(y))
            ]
            axes.plot(x, smooth, color=colour, alpha=0.35, linewidth=1.2, label=f"{label}: training (sampled)")
        tested = [(r["iteration"], r["eval/success_rate"], r["eval/games"]) for r in rows if "eval/success_rate" in r]
        if tested:
            x, y, count = zip(*tested, strict=True)
            bounds = [wilson(round(p * n), n) for p, n in zip(y, count, strict=True)]
            axes.plot(x, y, color=colour, marker="o", markersize=4, label=f"{label}: held-out games")
            axes.fill_between(x, [b[0] for b in bounds], [b[1] for b in bounds], color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="iteration", ylabel="success rate", ylim=(0, 1), title=title)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(alpha=0.3)
    if len(runs) == 1:
        axes.legend(loc="lower right", fontsize=8)
    else:  # below, where it hides no curve
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(runs), fontsize=6)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write_episodes(
    path: Path, tasks: Sequence[str], transcripts: Sequence[Sequence[tuple[str, str]]], won: Sequence[bool]
) -> None:
    """Sample episodes as text: what was seen (indented) and what was answered."""
    parts = []
    for task, turns, success in zip(tasks, transcripts, won, strict=True):
        parts.append(f"=== {task} — {'solved' if success else 'not solved'} in {len(turns)} turns\n")
        for seen, answer in turns:
            parts.append("".join(f"    {line}\n" for line in seen.splitlines() if line.strip()) + f"> {answer}\n")
        parts.append("\n")
    path.write_text("".join(parts), encoding="utf-8", errors="replace")


def bootstrap(values: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high): the mean over seeds [S] and its 95% percentile bootstrap interval."""
    index = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[index].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
