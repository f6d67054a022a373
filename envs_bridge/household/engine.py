"""A household engine in plain Python for ALFWorld game files: the same commands, texts and win condition.

The rules are those of ALFWorld's PDDL domain and grammar (alfworld 0.4.2 on textworld 1.7), taken from the files and
verified in lockstep; none of its code is used. A command that is not admissible gets "Nothing happens." and costs a
turn.
"""

from __future__ import annotations

from envs_bridge.household.game import Game, load_game
from envs_bridge.turn import Observation

NOTHING = "Nothing happens."
KNIVES = ("knifetype", "butterknifetype")
BANNER = "-= Welcome to TextWorld, ALFRED! =-"


def listing(names: list[str], article: bool = True) -> str:
    """'a mug 1, and a pen 2', or 'nothing'."""
    words = [f"a {name}" if article else name for name in names]
    if not words:
        return "nothing"
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + ", and " + words[-1]


class Household:
    """One running game; an Environment of `envs_bridge.turn`. Its own state is a few lists; `Game` is shared."""

    def __init__(self, game: Game):
        self.game = game
        self.dialect = game.dialect
        self.task = game.dialect.task.removeprefix("Your task is to: ")
        self.reset()

    @classmethod
    def load(cls, path: str) -> Household:
        return cls(load_game(path))

    def reset(self) -> Observation:
        game = self.game
        self.location = game.start
        self.holding = game.held
        self.opened = list(game.opened)
        self.inside = [list(places) for places in game.inside]
        self.object_location = list(game.object_location)
        self.flags = [set(flags) for flags in game.flags]
        self.taken_from: list[set[int]] = [set() for _ in game.objects]  # the engine's `not_inreceptacle` facts
        self.done = False
        self.text = f"{BANNER}\n\n{self._intro()}\n\n{self.dialect.task}"
        self.commands = self._commands()
        return Observation(self.text, tuple(sorted(self.commands)))

    def step(self, command: str) -> Observation:
        if self.done:
            return Observation(self.text, tuple(sorted(self.commands)), 1.0, True, True)
        action = self.commands.get(command.strip())
        if action is None:
            self.text = NOTHING
        else:
            rule, *arguments = action
            self.text = rule(*arguments)
            self.commands = self._commands()
        self.done = self.won()
        return Observation(self.text, tuple(sorted(self.commands)), float(self.done), self.done, self.done)

    def won(self) -> bool:
        goal, game = self.game.goal, self.game
        targets = [
            o
            for o, kind in enumerate(game.object_type)
            if kind == goal.object_type and self.flags[o].issuperset(goal.states + goal.abilities)
        ]
        if goal.lamp_type:
            return self.holding in targets and any(
                game.object_type[o] == goal.lamp_type
                and {"toggleable", "toggled"} <= self.flags[o]
                and any(game.receptacle_location[r] == self.location for r in self.inside[o])
                for o in range(len(game.objects))
            )
        for r, kind in enumerate(game.receptacle_type):
            if kind == goal.receptacle_type and sum(r in self.inside[o] for o in targets) >= goal.count:
                return True
        return False

    # Admissible commands: command -> (rule, arguments).

    def _commands(self) -> dict[str, tuple]:
        game, held = self.game, self.holding
        commands: dict[str, tuple] = {"look": (self._look,), "inventory": (self._inventory,)}
        if self.dialect.wording == "move":
            commands["help"] = (self._help,)
        for r, name in enumerate(game.receptacles):
            if game.receptacle_location[r] != self.location:
                commands[f"go to {name}"] = (self._go, r)
                continue
            commands[f"examine {name}"] = (self._see, r)
            if game.openable[r]:
                verb, rule = ("close", self._close) if self.opened[r] else ("open", self._open)
                commands[f"{verb} {name}"] = (rule, r)
            reachable = self.opened[r] or not game.openable[r]
            for o in self._in(r):
                thing = game.objects[o]
                if "toggleable" in self.flags[o]:
                    commands[f"use {thing}"] = (self._use, o)
                if reachable and held < 0 and "pickupable" in self.flags[o]:
                    commands[f"take {thing} from {name}"] = (self._take, o, r)
            if held >= 0:
                self._held_commands(commands, held, r, reachable)
        if held >= 0:
            # Only the object in hand: the domain intends to allow objects in reach, too, but the engine does not.
            thing = game.objects[held]
            commands[f"examine {thing}"] = (self._examine, held)
            if game.object_type[held] in KNIVES:
                for o, where in enumerate(self.object_location):
                    if where == self.location and "sliceable" in self.flags[o]:
                        commands[f"slice {game.objects[o]} with {thing}"] = (self._slice, o)
        return commands

    def _held_commands(self, commands: dict[str, tuple], held: int, r: int, reachable: bool) -> None:
        game, thing, name, kind = (
            self.game,
            self.game.objects[held],
            self.game.receptacles[r],
            self.game.receptacle_type[r],
        )
        if reachable and (kind, game.object_type[held]) in game.can_contain:
            words = f"move {thing} to {name}" if self.dialect.wording == "move" else f"put {thing} in/on {name}"
            commands[words] = (self._put, held, r)
        if kind in self.dialect.sinks and "cleanable" in self.flags[held]:
            commands[f"clean {thing} with {name}"] = (self._clean, held, r)
        if kind == "microwavetype" and "heatable" in self.flags[held]:
            commands[f"heat {thing} with {name}"] = (self._heat, held, r)
        if kind == "fridgetype" and "coolable" in self.flags[held]:
            commands[f"cool {thing} with {name}"] = (self._cool, held, r)

    def _in(self, r: int) -> list[int]:
        return [o for o, places in enumerate(self.inside) if r in places]

    # Texts.

    def _intro(self) -> str:
        if self.location in self.game.receptacle_location:
            return self._look()
        everything = listing(list(self.game.receptacles))
        return f"You are in the middle of a room. Looking quickly around you, you see {everything}."

    def _see(self, r: int) -> str:
        name, things = self.game.receptacles[r], listing([self.game.objects[o] for o in self._in(r)])
        if not self.game.openable[r]:
            return f"On the {name}, you see {things}."
        return f"The {name} is open. In it, you see {things}." if self.opened[r] else f"The {name} is closed."

    def _look(self) -> str:
        here = [r for r, where in enumerate(self.game.receptacle_location) if where == self.location]
        if not here:
            return "You are in the middle of a room. Looking quickly around you, you see nothing."
        # As in the engine: an object is next to the furniture if it was taken out of it and lies at its location.
        beside = [
            self.game.objects[o]
            for o, where in enumerate(self.object_location)
            if where == self.location
            for r in here
            if r in self.taken_from[o]
        ]
        facing = listing([self.game.receptacles[r] for r in here], article=False)
        return f"You are facing the {facing}. Next to it, you see {listing(beside)}."

    def _inventory(self) -> str:
        if self.holding < 0:
            return "You are not carrying anything."
        return f"You are carrying: a {self.game.objects[self.holding]}."

    def _help(self) -> str:
        return self.dialect.help_text

    def _examine(self, o: int) -> str:
        flags, name = self.flags[o], self.game.objects[o]
        if "container" in flags:
            return f"This is a normal {name}. In it, you see {listing(list(self.game.contents[o]))}."
        sliced = "sliced " if "sliced" in flags else ""
        if "clean" in flags and "hot" in flags:
            return f"This is a hot and clean {sliced}{name}."
        if "clean" in flags and "cool" in flags:
            return f"This is a cool and clean {sliced}{name}."
        if sliced:  # the grammar checks 'sliced' rules before single states, in this order
            for state, word in (("clean", "clean "), ("hot", "hot "), ("cool", "cool ")):
                if state in flags:
                    return f"This is a {word}sliced {name}."
        for state, word in (("hot", "hot"), ("clean", "clean"), ("cool", "cold")):
            if state in flags:
                return f"This is a {word} {name}."
        if "toggleable" in flags and "toggled" in flags:
            return f"This {name} is on."
        if sliced and "sliceable" in flags:
            return f"This is a sliced {name}."
        return f"There's nothing special about {name}."

    # Actions.

    def _go(self, r: int) -> str:
        self.location = self.game.receptacle_location[r]
        arrived = self.game.receptacles[r] if self.dialect.wording == "move" else self.game.locations[self.location]
        return f"You arrive at {arrived}. {self._see(r)}"

    def _open(self, r: int) -> str:
        self.opened[r] = True
        return f"You open the {self.game.receptacles[r]}. {self._see(r)}"

    def _close(self, r: int) -> str:
        self.opened[r] = False
        return f"You close the {self.game.receptacles[r]}."

    def _take(self, o: int, r: int) -> str:
        self.inside[o].remove(r)
        self.taken_from[o].add(r)
        self.holding = o
        if self.object_location[o] == self.location:
            self.object_location[o] = -1
        return f"You pick up the {self.game.objects[o]} from the {self.game.receptacles[r]}."

    def _put(self, o: int, r: int) -> str:
        self.inside[o] = sorted({*self.inside[o], r})
        self.taken_from[o].discard(r)
        self.holding = -1
        self.object_location[o] = self.location
        verb, place = ("move", "to") if self.dialect.wording == "move" else ("put", "in/on")
        return f"You {verb} the {self.game.objects[o]} {place} the {self.game.receptacles[r]}."

    def _clean(self, o: int, r: int) -> str:
        self.flags[o].add("clean")
        return f"You clean the {self.game.objects[o]} using the {self.game.receptacles[r]}."

    def _heat(self, o: int, r: int) -> str:
        self.flags[o].add("hot")
        self.flags[o].discard("cool")
        return f"You heat the {self.game.objects[o]} using the {self.game.receptacles[r]}."

    def _cool(self, o: int, r: int) -> str:
        self.flags[o].add("cool")
        self.flags[o].discard("hot")
        return f"You cool the {self.game.objects[o]} using the {self.game.receptacles[r]}."

    def _use(self, o: int) -> str:
        self.flags[o].add("toggled")
        return f"You turn on the {self.game.objects[o]}."

    def _slice(self, o: int) -> str:
        self.flags[o].add("sliced")
        return f"You sliced the {self.game.objects[o]} with the {self.game.objects[self.holding]}."
