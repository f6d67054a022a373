"""A run's tasks, the workers that play them, demonstrations, and what a policy remembers of an episode."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rich.console import Console

from envs_bridge.environments import Demonstrator, Episode, Spec, TaskRequest, find
from envs_bridge.pool import Pool
from envs_bridge.prompts import History, Memory
from envs_bridge.turn import Game, Observation
from proxmo_jax.agent.report import progress_bar
from proxmo_jax.agent.settings import Config
from proxmo_jax.errors import UserError


def environment(config: Config) -> Spec:
    """The run's environment."""
    return find(config.env.name)


def make_tasks(config: Config, console: Console) -> tuple[list[Game], list[Game]]:
    """The run's training tasks and its held-out ones, the latter in equal parts from each held-out split.

    Raises:
        UserError: if there are none of either.
    """
    names = environment(config).held_out
    share = config.env.eval_games // len(names)
    training = environment(config).splits[0]
    wanted = {training: config.env.train_games, **dict.fromkeys(names, share)}
    wanted[names[-1]] = config.env.eval_games - share * (len(names) - 1)
    chosen = tasks_of(config, wanted, console, generate=True)
    held_out = [task for split in names for task in chosen.get(split, [])]
    if not chosen.get(training) or not held_out:
        found = ", ".join(f"{split} {len(tasks)}" for split, tasks in chosen.items()) or "none"
        raise UserError(f"--data: need games in {training}, and in {' or '.join(names)}; found {found}")
    return chosen[training], held_out


def tasks_of(
    config: Config, wanted: Mapping[str, int], console: Console, *, generate: bool = False
) -> Mapping[str, list[Game]]:
    """At most so many tasks of each split.

    Args:
        config: the run's settings.
        wanted: tasks of each split.
        console: where progress is shown.
        generate: generate the environment's tasks; False: use those that the run has generated.
    """

    @contextlib.contextmanager
    def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        with progress_bar(console) as bar:
            task = bar.add_task(label, total=total, note="")
            yield lambda done: bar.update(task, completed=done)

    def report(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    folder = config.output.dir / "games"
    return environment(config).tasks(
        TaskRequest(config.env, wanted, folder, config.seed, generate=generate, report=report, progress=progress)
    )


def make_pool(config: Config) -> Pool:
    """The worker processes."""
    engine, timeout = environment(config).worker(config.env)
    return Pool(
        config.env.workers,
        python=config.env.python or sys.executable,
        engine=engine,
        block=config.rollout.group_size,
        timeout=config.env.worker_timeout or timeout,
    )


def demonstrated(config: Config, tasks: Sequence[Game], mistake_rate: float) -> Iterable[Episode]:
    """Demonstrated episodes of the tasks, in an environment that has a demonstrator."""
    make = environment(config).demonstrations
    assert make is not None
    turns = 2 * config.rollout.max_turns
    return make(list(tasks), Demonstrator(config.seed, mistake_rate, config.warm_start.search_rate, turns))


def memory_of(config: Config) -> Callable[[str, Observation], Memory]:
    """What begins the memory of an episode, from which its prompts are written."""
    if config.rollout.prompt == "notes":
        return environment(config).notes
    kept, list_actions = config.rollout.history, config.rollout.list_actions
    return lambda task, seen: History.start(task, seen, kept=kept, list_actions=list_actions)
