"""Play the same commands in two engines and find the first turn in which they differ."""

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from envs_bridge.household.engine import Household
from envs_bridge.household.expert import next_command
from envs_bridge.household.game import GameFileError, load_game
from envs_bridge.turn import Observation

SHOWN = 12  # last turns of a transcript in a report
NO_OBSERVATION = Observation("", ())


@dataclass(frozen=True)
class Difference:
    """The first difference of two engines: the game, the commands so far, and both observations."""

    game: str
    commands: list[str]
    ours: Observation
    theirs: Observation

    def __str__(self) -> str:
        lines = [f"{self.game}: the engines differ after {len(self.commands)} commands"]
        lines += [f"  > {command}" for command in self.commands[-SHOWN:]]
        for name in ("text", "reward", "done", "won"):
            ours, theirs = getattr(self.ours, name), getattr(self.theirs, name)
            if ours != theirs:
                lines.append(f"  {name}: ours {ours!r}\n  {name}: theirs {theirs!r}")
        ours, theirs = set(self.ours.admissible), set(self.theirs.admissible)
        if ours != theirs:
            lines.append(f"  admissible only in ours: {sorted(ours - theirs)}; only in theirs: {sorted(theirs - ours)}")
        return "\n".join(lines)


@dataclass
class Comparison:
    """The result of a lockstep comparison.

    episodes, steps: how many were compared. difference: the first one, if any. unplayed: games that the other engine
    could not start.
    """

    episodes: int = 0
    steps: int = 0
    difference: Difference | None = None
    unplayed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.episodes} episodes, {self.steps} steps, {int(self.difference is not None)} differences"


def lockstep(
    games: Sequence[str],
    reset: Callable[[str], tuple[Observation, str] | None],
    step: Callable[[str], Observation | None],
    *,
    episodes: int,
    seed: int,
    max_steps: int = 40,
    on_episode: Callable[[int], None] | None = None,
) -> Comparison:
    """Play episodes in our engine and in another, up to the first difference.

    A third of the episodes follow the expert to the win, a third follow it in half of their turns, and the rest are
    random; some commands are nonsense. The task is compared at the start; text, admissible commands, reward, end and
    win after every step.

    Args:
        games: game files, played in turn.
        reset: starts a game in the other engine: (observation, task), or None if it failed.
        step: plays a command in the other engine; None if it failed.
        episodes: how many to play.
        seed: of the random commands.
        max_steps: at most so many commands per episode.
        on_episode: called with the number of finished episodes.
    """
    found = Comparison()
    for episode in range(episodes):
        game = games[episode % len(games)]
        started = reset(game)
        if started is None:
            found.unplayed.append(game)
        else:
            guided = (1.0, 0.5, 0.0)[episode % 3]
            _compare(game, started, step, found, random.Random(f"{seed}/{episode}"), guided, max_steps)
            found.episodes += 1
        if found.difference is not None:
            break
        if on_episode:
            on_episode(episode + 1)
    return found


def _compare(
    game: str, started: tuple[Observation, str], step: Callable[[str], Observation | None], found: Comparison,
    rng: random.Random, guided: float, max_steps: int,
) -> None:  # fmt: skip
    """Play one episode; add its steps and a difference to `found`."""
    world = Household.load(game)
    ours, (theirs, task) = world.reset(), started
    if task != world.task:
        theirs = Observation(f"task: {task}", theirs.admissible)
    commands: list[str] = []
    while ours == theirs and not ours.done and len(commands) < max_steps:
        commands.append(command_for(world, ours, rng, guided))
        ours, theirs = world.step(commands[-1]), step(commands[-1]) or NO_OBSERVATION
        found.steps += 1
    if ours != theirs:
        found.difference = Difference(game, commands, ours, theirs)


def playable(games: Sequence[str]) -> tuple[list[str], list[str]]:
    """(games that our engine plays, one sentence for each other game)."""
    ours, others = [], []
    for game in games:
        try:
            load_game(game)
            ours.append(game)
        except GameFileError as error:
            others.append(str(error))
    return ours, others


def command_for(world: Household, seen: Observation, rng: random.Random, guided: float) -> str:
    """The expert's next command with probability `guided`, else a random one, sometimes nonsense."""
    if rng.random() < guided:
        with contextlib.suppress(ValueError):  # a house that the expert cannot solve
            return next_command(world)
    if rng.random() < 0.03:
        return rng.choice(["", "take nothing from nowhere", "go to", f" {rng.choice(seen.admissible)} ", "LOOK", "!?"])
    doing = [command for command in seen.admissible if not command.startswith(("go to", "examine", "help"))]
    return rng.choice(doing if rng.random() < 0.6 else seen.admissible)
