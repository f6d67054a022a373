"""The environments by name, and what each tells the trainer. `module:SPEC` names one that is not in `ENVIRONMENTS`.

Nothing here imports JAX. Modules are imported when their environment is asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs_bridge.errors import UserError
from envs_bridge.prompts import Memory, Notes
from envs_bridge.turn import Demonstrated, Game, Observation

ENVIRONMENTS = {
    "household": "envs_bridge.household.tasks:HOUSEHOLD",
    "alfworld": "envs_bridge.household.tasks:ALFWORLD",
    "shop": "envs_bridge.shop.tasks:SHOP",
    "webshop": "envs_bridge.shop.tasks:WEBSHOP",
}

# A demonstrated episode: the task and its turns.
Episode = tuple[str, list[Demonstrated]]


@dataclass(frozen=True)
class TaskRequest:
    """Which tasks a run wants.

    Attributes:
        options: the run's `env` settings.
        wanted: the most tasks of each split.
        folder: the run's own folder for generated tasks.
        seed: the run's seed.
        generate: make the tasks that are generated; False: use those that the run has made.
        report: prints a line.
        progress: `with progress(label, total) as update`, where `update(done)` shows how far it is.
    """

    options: Any
    wanted: Mapping[str, int]
    folder: Path
    seed: int
    generate: bool
    report: Callable[[str], None]
    progress: Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Demonstrator:
    """How demonstrations are made: the seed, the share of wasted turns, how much has to be searched, the turn limit."""

    seed: int
    mistake_rate: float
    search_rate: float
    max_turns: int


@dataclass(frozen=True)
class Spec:
    """What the trainer knows of an environment.

    Attributes:
        title: what people call it.
        splits: names of its splits, the training split first.
        held_out: splits that are evaluated on during training.
        tasks: the tasks of each split, at most as many as wanted.
        kind: the type of a task, by which success is reported.
        worker: from the `env` settings, what a worker process loads the environment of a task by (a name in
            `envs_bridge.worker.ENGINES` or `module:function`), and after how many seconds without an answer it is
            replaced.
        demonstrations: demonstrated episodes of tasks, for a warm start; None: there are none.
        notes: begins the memory of an episode from which a small policy's prompts are written.
        words: words that a small policy's tokenizer needs beside those of the demonstrations.
        tail: characters of a response without action tags that are taken for its command.
        scored: rewards are shares in [0, 1], reported beside success.
        check: refuses `env` settings that cannot work, by a UserError.
        fingerprint: what identifies a task wherever its files are: name, content, world (hashes of the whole task, and
            of the problem alone) and more for a reader; None: panels cannot be made of its tasks.
    """

    title: str
    splits: tuple[str, ...]
    held_out: tuple[str, ...]
    tasks: Callable[[TaskRequest], Mapping[str, list[Game]]]
    kind: Callable[[Game], str]
    worker: Callable[[Any], tuple[str, float]]
    demonstrations: Callable[[list[Game], Demonstrator], Iterable[Episode]] | None = None
    notes: Callable[[str, Observation], Memory] = Notes.start
    words: str = ""
    tail: int = 30
    scored: bool = False
    check: Callable[[Any], None] = lambda options: None
    fingerprint: Callable[[Any], Mapping[str, Any]] | None = None


def find(name: str) -> Spec:
    """The environment of a name.

    Args:
        name: one of `ENVIRONMENTS`, or `module:attribute` of a `Spec` that is installed or in the current folder.

    Raises:
        UserError: if there is no such module, or no `Spec` in it.
    """
    module, colon, attribute = ENVIRONMENTS.get(name, name).partition(":")
    if not (colon and module and attribute):
        known = ", ".join(ENVIRONMENTS)
        raise UserError(f"--env must be one of {known}, or module:attribute of a Spec of your own; got {name!r}")
    if "" not in sys.path:
        sys.path.append("")  # the current folder, which an installed command does not search
    try:
        spec = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise UserError(f"--env {name}: no module {error.name!r} is installed or in the current folder") from error
    if not isinstance(spec, Spec):
        found = "nothing" if spec is None else type(spec).__name__
        raise UserError(f"--env {name}: {attribute} in {module} must be a Spec; found {found}")
    return spec


def evenly(tasks: list[Any], count: int) -> list[Any]:
    """At most `count` of the tasks, evenly spread over the list, so that no kind is left out."""
    if count >= len(tasks):
        return list(tasks)
    if count == 1:
        return tasks[:1]
    return [tasks[round(i * (len(tasks) - 1) / (count - 1))] for i in range(count)]
