"""An expert that knows the whole house and gives the next command of a plan from any state.

It provides the walkthroughs of generated games and the demonstrations of the warm start, where it also recovers from
deliberate mistakes.
"""

import random
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from envs_bridge.household.dialect import ForeignGame
from envs_bridge.household.engine import Household
from envs_bridge.turn import Demonstrated

NOTHING = "Nothing happens."
APPLIANCES = {"clean": "sinkbasintype", "hot": "microwavetype", "cool": "fridgetype"}
VERBS = {"clean": "clean", "hot": "heat", "cool": "cool"}


def next_command(world: Household) -> str:
    """The next command towards the goal. Raises ValueError if the expert cannot solve this house."""
    game, goal, held = world.game, world.game.goal, world.holding
    targets = [
        o
        for o, kind in enumerate(game.object_type)
        if kind == goal.object_type and world.flags[o].issuperset(goal.abilities) and "pickupable" in world.flags[o]
    ]
    if held >= 0 and held not in targets:
        return _put_down(world)
    if goal.lamp_type:
        if held < 0:
            return _fetch(world, _nearest(world, targets))
        lamps = [
            o
            for o, kind in enumerate(game.object_type)
            if kind == goal.lamp_type and "toggleable" in world.flags[o] and world.inside[o]
        ]
        if not lamps:
            raise ValueError(f"{game.path}: no lamp of the goal's type")
        lamp = lamps[0]
        return _go(world, world.inside[lamp][0]) or f"use {game.objects[lamp]}"
    return _place(world, targets)


def _place(world: Household, targets: list[int]) -> str:
    game, goal, held = world.game, world.game.goal, world.holding

    def finished(r: int) -> list[int]:
        return [o for o in targets if r in world.inside[o] and world.flags[o].issuperset(goal.states)]

    places = [r for r, kind in enumerate(game.receptacle_type) if kind == goal.receptacle_type]
    if not places:
        raise ValueError(f"{game.path}: no receptacle of the goal's type")
    place = max(places, key=lambda r: (len(finished(r)), game.receptacle_location[r] == world.location, -r))
    if held < 0:
        return _fetch(world, _nearest(world, [o for o in targets if o not in finished(place)]))
    for state in goal.states:
        if state not in world.flags[held]:
            if state not in APPLIANCES:
                raise ValueError(f"{game.path}: the expert does not know how to make things {state}")
            kinds = world.dialect.sinks if state == "clean" else (APPLIANCES[state],)
            r = next((r for r, kind in enumerate(game.receptacle_type) if kind in kinds), None)
            if r is None:
                raise ValueError(f"{game.path}: nothing there makes things {state}")
            return _go(world, r) or f"{VERBS[state]} {game.objects[held]} with {game.receptacles[r]}"
    return _go(world, place) or _open(world, place) or _put(world, held, place)


def _nearest(world: Household, candidates: list[int]) -> int:
    def cost(o: int) -> tuple[int, int]:
        r = world.inside[o][0]
        away = world.game.receptacle_location[r] != world.location
        shut = world.game.openable[r] and not world.opened[r]
        return away + shut, o

    candidates = [o for o in candidates if world.inside[o]]
    if not candidates:
        raise ValueError(f"{world.game.path}: no object left that the goal asks for")
    return min(candidates, key=cost)


def _fetch(world: Household, o: int) -> str:
    r = world.inside[o][0]
    return _go(world, r) or _open(world, r) or f"take {world.game.objects[o]} from {world.game.receptacles[r]}"


def _put_down(world: Household) -> str:
    game, held = world.game, world.holding
    places = [r for r, kind in enumerate(game.receptacle_type) if (kind, game.object_type[held]) in game.can_contain]
    if not places:
        raise ValueError(f"{game.path}: no receptacle takes {game.objects[held]}")
    place = min(
        places,
        key=lambda r: (
            (game.receptacle_location[r] != world.location) + (game.openable[r] and not world.opened[r]), r
        ),
    )  # fmt: skip
    return _go(world, place) or _open(world, place) or _put(world, held, place)


def _go(world: Household, r: int) -> str:
    return "" if world.game.receptacle_location[r] == world.location else f"go to {world.game.receptacles[r]}"


def _open(world: Household, r: int) -> str:
    return f"open {world.game.receptacles[r]}" if world.game.openable[r] and not world.opened[r] else ""


def _put(world: Household, o: int, r: int) -> str:
    thing, place = world.game.objects[o], world.game.receptacles[r]
    return f"move {thing} to {place}" if world.dialect.wording == "move" else f"put {thing} in/on {place}"


@dataclass(frozen=True)
class Habits:
    """How a demonstrator differs from the expert; with both rates 0 it follows the walkthrough.

    search_rate: 0: it knows where objects are; 1: it searches places at random until it sees what it needs, each place
    at most once. mistake_rate: probability of a turn with a command that has no effect, such as examining an object out
    of reach; never twice in a row, so that demonstrations do not repeat a failed command.
    """

    search_rate: float = 0.0
    mistake_rate: float = 0.0


def demonstrate(
    world: Household, rng: random.Random, habits: Habits | None = None, *, max_turns: int = 50
) -> list[Demonstrated]:
    """Play one episode and return its turns.

    The expert continues from any state, so demonstrations also show how to recover from mistakes.
    """
    habits = habits or Habits()
    game, seen = world.game, world.reset()
    turns: list[Demonstrated] = []
    looked_in: set[int] = set()
    for _ in range(max_turns):
        here = [r for r, where in enumerate(game.receptacle_location) if where == world.location]
        looked_in.update(r for r in here if world.opened[r] or not game.openable[r])
        if rng.random() < habits.mistake_rate and seen.text != NOTHING:
            command = rng.choice(_useless(world) or list(seen.admissible))
            thought = f"Let me {command}."
        else:
            command = _search(world, looked_in, rng, habits.search_rate) or next_command(world)
            thought = why(world, command, looked_in)
        turns.append(Demonstrated(seen, command, thought))
        seen = world.step(command)
        if seen.done:
            break
    return turns


def replay(world: Household, commands: Sequence[str]) -> list[Demonstrated]:
    """Play given commands from the start and return the turns, without thoughts."""
    seen = world.reset()
    turns = []
    for command in commands:
        turns.append(Demonstrated(seen, command))
        seen = world.step(command)
    return turns


def why(world: Household, command: str, looked_in: Set[int]) -> str:
    """The reason for the demonstrator's next command, as far as a player who has seen what it has seen can know it.

    Args:
        world: before the command.
        command: from `next_command` or `_search`.
        looked_in: receptacles whose contents have been seen.

    Returns:
        A sentence.
    """
    game, goal, held = world.game, world.game.goal, world.holding
    thing, place, lamp = (
        (kind or "").removesuffix("type") for kind in (goal.object_type, goal.receptacle_type, goal.lamp_type)
    )
    verb, _, rest = command.partition(" ")
    there = rest.removeprefix("to ") if verb == "go" else rest
    if verb == "take":
        return f"Here is {rest.partition(' from ')[0]}, which I need."
    if held >= 0 and game.object_type[held] != goal.object_type:
        return f"I do not need {game.objects[held]}."
    if held >= 0 and not lamp:
        missing = [state for state in goal.states if state not in world.flags[held]]
        if missing:
            appliance = APPLIANCES[missing[0]].removesuffix("type")
            return f"{game.objects[held]} must be {missing[0]}, and a {appliance} does that."
        return f"{there} is closed." if verb == "open" else f"{game.objects[held]} belongs in a {place}."
    if verb == "use":
        return f"Here is {rest}, and I hold {game.objects[held]}."
    wanted = lamp if held >= 0 else thing
    if verb == "open":
        return f"{there} is closed; a {wanted} may be inside."
    known = any(game.receptacles[r] == there for r in looked_in)
    return f"I saw a {wanted} at {there}." if known else f"I need a {wanted}, and {there} is new to me."


def episodes(
    games: Sequence[str], *, seed: int, habits: Habits, max_turns: int
) -> Iterator[tuple[str, list[Demonstrated]]]:
    """Yield (task, turns) of a demonstrated episode per game file.

    If the expert cannot solve a house, the stored walkthrough is replayed. Games that our engine cannot play are
    skipped.
    """
    for i, game in enumerate(games):
        try:
            world = Household.load(game)
        except ForeignGame:
            continue
        try:
            turns = demonstrate(world, random.Random(f"{seed}/{i}"), habits, max_turns=max_turns)
        except ValueError:  # a house that the expert cannot solve
            turns = replay(world, world.game.walkthrough)
        yield world.task, turns


def _search(world: Household, looked_in: set[int], rng: random.Random, rate: float) -> str:
    """A command that searches an unseen place while the needed object is not found; else an empty string."""
    command = next_command(world)
    game = world.game
    wanted = {game.goal.object_type, game.goal.lamp_type}
    places = {r for o, kind in enumerate(game.object_type) if kind in wanted for r in world.inside[o]}
    unknown = [r for r in range(len(game.receptacles)) if r not in looked_in]
    if not any(command == f"go to {game.receptacles[r]}" and r in unknown for r in places):
        return ""
    here = [r for r in unknown if game.receptacle_location[r] == world.location]
    if here:  # reached, but closed
        return f"open {game.receptacles[here[0]]}"
    others = [r for r in unknown if r not in places]
    if rng.random() < rate * len(others) / len(unknown) and others:
        return f"go to {game.receptacles[rng.choice(others)]}"
    return ""


def _useless(world: Household) -> list[str]:
    """Commands about the goal's object or this place that have no effect now."""
    game = world.game
    here = [r for r, where in enumerate(game.receptacle_location) if where == world.location]
    wanted = [
        game.objects[o]
        for o, kind in enumerate(game.object_type)
        if kind in (game.goal.object_type, game.goal.lamp_type)
    ]
    commands = [f"{verb} {thing}" for verb in ("use", "examine") for thing in wanted]
    commands += [f"open {game.receptacles[r]}" for r in here]
    return [command for command in commands if command not in world.commands]
