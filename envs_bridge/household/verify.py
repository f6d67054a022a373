"""Play the same commands in two engines and find the first turn at which they differ."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from envs_bridge.household.engine import Household
from envs_bridge.household.expert import next_command
from envs_bridge.turn import Observation

SHOWN = 12  # last turns of a transcript in a report
NOTHING_SAID = Observation("", ())


@dataclass(frozen=True)
class Difference:
    """Where the engines part: the game, the commands so far, and what each said."""

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


def lockstep(
    games: Sequence[str],
    reset: Callable[[str], tuple[Observation, str] | None],
    step: Callable[[str], Observation | None],
    *,
    episodes: int,
    seed: int,
    max_steps: int = 40,
    on_episode: Callable[[int], None] | None = None,
) -> tuple[int, int, Difference | None]:
    """Play `episodes` episodes, the games in turn, in our engine and in the other: (episodes, steps, difference).

    `reset(game)` and `step(command)` drive the other engine. Every third episode follows the expert to the win, every
    third takes it for half of its commands, the rest are random; now and then a command is nonsense. Text, admissible
    commands, reward, end and win are compared after every step, the task at the start; it stops at a difference.
    An engine that answers None (its worker died) is taken to have said nothing.
    """
    steps = 0
    for episode in range(episodes):
        game = games[episode % len(games)]
        rng = random.Random(f"{seed}/{episode}")
        world = Household.load(game)
        commands: list[str] = []
        ours = world.reset()
        theirs, task = reset(game) or (NOTHING_SAID, world.task)
        if task != world.task:
            theirs = Observation(f"task: {task}", theirs.admissible)
        guided = (1.0, 0.5, 0.0)[episode % 3]
        for _ in range(max_steps):
            if ours != theirs:
                return episode + 1, steps, Difference(game, commands, ours, theirs)
            if ours.done:
                break
            commands.append(_command(world, ours, rng, guided))
            ours, theirs = world.step(commands[-1]), step(commands[-1]) or NOTHING_SAID
            steps += 1
        if on_episode:
            on_episode(episode + 1)
    return episodes, steps, None


def _command(world: Household, seen: Observation, rng: random.Random, guided: float) -> str:
    if rng.random() < guided:
        return next_command(world)
    if rng.random() < 0.03:
        return rng.choice(["", "take nothing from nowhere", "go to", f" {rng.choice(seen.admissible)} ", "LOOK", "!?"])
    doing = [command for command in seen.admissible if not command.startswith(("go to", "examine", "help"))]
    return rng.choice(doing if rng.random() < 0.6 else seen.admissible)
