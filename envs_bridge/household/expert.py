"""An expert that sees the whole house: the next command of a shortest plan, from any state.

It writes the walkthroughs of generated games and the demonstrations of the warm start, where it also has to
recover from wrong turns.
"""

import random

from envs_bridge.household.engine import Household
from envs_bridge.turn import Observation

APPLIANCES = {"clean": "sinkbasintype", "hot": "microwavetype", "cool": "fridgetype"}
VERBS = {"clean": "clean", "hot": "heat", "cool": "cool"}


def next_command(world: Household) -> str:
    """The next command towards the goal. Raises ValueError if this house does not allow it."""
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
        lamp = next(
            o for o, kind in enumerate(game.object_type) if kind == goal.lamp_type and "toggleable" in world.flags[o]
        )
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
            r = next(r for r, kind in enumerate(game.receptacle_type) if kind == APPLIANCES[state])
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
    places = [
        r for r, kind in enumerate(game.receptacle_type) if (kind, game.object_type[held]) in game.can_contain
    ]
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
    return f"move {thing} to {place}" if world.game.wording == "move" else f"put {thing} in/on {place}"


def demonstrate(
    world: Household, rng: random.Random, *, wrong_turn_rate: float = 0.0, max_turns: int = 50
) -> list[tuple[Observation, str]]:
    """Play one episode: (what was seen, what was done) per turn. A wrong turn is a random admissible command."""
    seen, turns = world.reset(), []
    for _ in range(max_turns):
        wrong = rng.random() < wrong_turn_rate
        command = rng.choice(seen.admissible) if wrong else next_command(world)
        turns.append((seen, command))
        seen = world.step(command)
        if seen.done:
            break
    return turns
