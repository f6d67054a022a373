"""The household as arrays: the games of `envs_bridge.household` under `jit` and `vmap`.

Rules and texts are those of the engine, for houses of our generator (one receptacle per location, an object in at most
one receptacle, nothing in hand at the start, the newer wording); `test_vector_household` compares both in lockstep. A
text is a row of pieces: strings whose concatenation is exactly the engine's text (`say`).

Commands have the same numbers in all houses of the same table size: first those of `COMMANDS`, which need no name (they
concern this place or the object in hand), then `go` to each receptacle, then `take`, `use` and `slice` of each object.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs_bridge.household.engine import BANNER, KNIVES
from envs_bridge.household.game import Game
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.types import pytree

COMMANDS = ("look", "inventory", "help", "examine", "open", "close", "put", "clean", "heat", "cool", "examine held")
LOOK, INVENTORY, HELP, EXAMINE, OPEN, CLOSE, PUT, CLEAN, HEAT, COOL, EXAMINE_HELD = range(len(COMMANDS))
VERBS = (*COMMANDS, "go", "take", "use", "slice")
GO, TAKE, USE, SLICE = range(len(COMMANDS), len(VERBS))
ROOM = "You are in the middle of a room. Looking quickly around you, you see "
STATES = ("", "hot and clean ", "cool and clean ", "clean ", "hot ", "cool ", "cold ")
PHRASES = (
    "", ".", "Nothing happens.", "nothing", "a ", ", a ", ", and a ", f"{ROOM}nothing.", "You are facing the ",
    ". Next to it, you see nothing.", "You are not carrying anything.", "You are carrying: a ", "On the ", ", you see ",
    "The ", " is open. In it, you see ", " is closed.", "You arrive at ", ". ", "You open the ", "You close the ",
    "You pick up the ", " from the ", "You move the ", " to the ", "You clean the ", "You heat the ", "You cool the ",
    " using the ", "You turn on the ", "You sliced the ", " with the ", "This is a normal ",
    ". In it, you see nothing.", "There's nothing special about ", f"{BANNER}\n\n{ROOM}", ".\n\nYour task is to: ",
    *(f"This is a {state}{sliced}" for state in STATES for sliced in ("", "sliced ")),
)  # fmt: skip
PIECE = {phrase: i for i, phrase in enumerate(PHRASES)}
HELP_TEXT = len(PHRASES)  # the piece after them, in the wording of the games
# Paraphrases, which break exact matching; a paraphrased text is no longer the engine's.
PARAPHRASES = {
    "You arrive at ": ("You reach ", "You come to ", "You now stand before "),
    "On the ": ("Upon the ", "Lying on the ", "Resting on the "),
    ", you see ": (", there is ", ", you notice ", ", you can make out "),
    "You open the ": ("You pull open the ", "You unlatch the ", "You swing open the "),
    " is open. In it, you see ": (
        " stands open. Inside, there is ",
        " is open; within it lies ",
        " is ajar. It holds ",
    ),
    " is closed.": (" is shut.", " stays shut.", " has its door shut."),
    "You pick up the ": ("You take hold of the ", "You grab the ", "You now hold the "),
    "You move the ": ("You place the ", "You set down the ", "You lay the "),
    "Nothing happens.": ("That has no effect.", "Nothing changes.", "It does not work."),
}


@pytree
@dataclass(frozen=True)
class Houses:
    """H games of at most R receptacles and O objects. Types and numbers are piece ids, 0 for padding.

    `build` makes NumPy arrays, which JAX traces.

    receptacle, receptacle_number, object, object_number int32 [H, R or O]; openable, opened, sink, microwave, fridge
    bool [H, R]; takes bool [H, R, O], which object fits where; inside int32 [H, O], the receptacle at the start;
    cleanable, heatable, coolable, toggleable, sliceable, pickupable, container, knife bool [H, O]; target bool [H, O],
    of the goal's type and with the abilities it needs; lamp bool [H, O]; place bool [H, R], of the goal's type; state
    int32 [H], the goal's state (0 any, 1 clean, 2 hot, 3 cool); count, kind int32 [H]; goal int32 [H, 2],
    types of the target and of the place or lamp; start int32 [H, L], pieces of the first text.
    """

    receptacle: jax.Array
    receptacle_number: jax.Array
    object: jax.Array
    object_number: jax.Array
    openable: jax.Array
    opened: jax.Array
    sink: jax.Array
    microwave: jax.Array
    fridge: jax.Array
    takes: jax.Array
    inside: jax.Array
    cleanable: jax.Array
    heatable: jax.Array
    coolable: jax.Array
    toggleable: jax.Array
    sliceable: jax.Array
    pickupable: jax.Array
    container: jax.Array
    knife: jax.Array
    target: jax.Array
    lamp: jax.Array
    place: jax.Array
    state: jax.Array
    count: jax.Array
    kind: jax.Array
    goal: jax.Array
    start: jax.Array


class State(NamedTuple):
    """The state of one game. here int32 []: receptacle or -1 (middle of the room); held int32 []: object or -1; inside
    int32 [O]: receptacle or -1; opened bool [R]; clean, hot, cool, toggled, sliced bool [O]."""

    here: jax.Array
    held: jax.Array
    inside: jax.Array
    opened: jax.Array
    clean: jax.Array
    hot: jax.Array
    cool: jax.Array
    toggled: jax.Array
    sliced: jax.Array


class Texts(NamedTuple):
    """The texts of houses. pieces: the string of each piece id. words float32 [P, V]: counts of the vocabulary's words
    in each piece (scikit-learn's tokens). paraphrases int32 [P, 4]: each piece and three paraphrases (or itself)."""

    pieces: tuple[str, ...]
    vocabulary: tuple[str, ...]
    words: np.ndarray
    paraphrases: np.ndarray


def build(games: Sequence[Game], *, paraphrases: bool = True) -> tuple[Houses, Texts]:
    """Convert games to arrays.

    Args:
        games: as our generator makes them.
        paraphrases: whether the pieces include the paraphrases.

    Returns:
        The houses, and the pieces of their texts.

    Raises:
        UserError: a game has something that the arrays cannot represent; the message names it.
    """
    for game in games:
        _check(game)
    help_text = games[0].dialect.help_text
    pieces = PIECE | {help_text: HELP_TEXT}

    def piece(text: str) -> int:
        return pieces.setdefault(text, len(pieces))

    receptacles = max(len(game.receptacles) for game in games)
    objects = max(len(game.objects) for game in games)
    rows = [_row(game, receptacles, objects, piece) for game in games]
    longest = max(len(row["start"]) for row in rows)
    for row in rows:
        row["start"] = np.pad(np.array(row["start"], np.int32), (0, longest - len(row["start"])))
    wordings = PARAPHRASES if paraphrases else {}
    for others in wordings.values():
        for other in others:
            piece(other)
    arrays: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    houses = Houses(**arrays)
    return houses, _texts(tuple(pieces), pieces, wordings)


def _check(game: Game) -> None:
    """Raise UserError for a game that the arrays cannot represent."""
    for wrong, what in (
        (game.dialect.wording != "move", "the older wording"),
        (len(set(game.receptacle_location)) < len(game.receptacles), "two receptacles at one place"),
        (game.start in game.receptacle_location, "a start at a receptacle"),
        (game.held >= 0, "something in hand at the start"),
        (any(len(places) != 1 for places in game.inside), "an object that is not in one receptacle"),
        (any(game.contents), "objects in objects"),
        (any(flags & {"clean", "hot", "cool", "toggled", "sliced"} for flags in game.flags), "a state at the start"),
        (set(game.goal.states) - {"clean", "hot", "cool"}, "a goal of sliced objects"),
        (len(game.goal.states) > 1, "a goal of two states"),
    ):
        if wrong:
            raise UserError(f"{game.path}: has {what}, which the array household does not know")


def _row(game: Game, receptacles: int, objects: int, piece) -> dict[str, Any]:
    """The padded row of one game in `Houses`."""
    goal = game.goal

    def fill(values, size: int, dtype=np.int32) -> np.ndarray:
        array = np.zeros(size, dtype)
        array[: len(values)] = list(values)
        return array

    def named(names: tuple[str, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
        pairs = [name.rsplit(" ", 1) for name in names]
        return fill([piece(a) for a, _ in pairs], size), fill([piece(f" {b}") for _, b in pairs], size)

    def flag(name: str) -> np.ndarray:
        return fill([name in flags for flags in game.flags], objects, bool)

    def kind(wanted) -> np.ndarray:
        return fill([kind in wanted for kind in game.receptacle_type], receptacles, bool)

    receptacle, receptacle_number = named(game.receptacles, receptacles)
    thing, object_number = named(game.objects, objects)
    takes = np.zeros((receptacles, objects), bool)
    for r, where in enumerate(game.receptacle_type):
        for o, what in enumerate(game.object_type):
            takes[r, o] = (where, what) in game.can_contain
    state = ({"clean": 1, "hot": 2, "cool": 3}[goal.states[0]]) if goal.states else 0
    able = [
        kind == goal.object_type and flags.issuperset(goal.abilities)
        for kind, flags in zip(game.object_type, game.flags, strict=True)
    ]
    task = [piece(text) for text in re.findall(r"\s*\S+", game.dialect.task.removeprefix("Your task is to: "))]
    shown = []
    for i, name in enumerate(game.receptacles):
        first, last = i == 0, i == len(game.receptacles) - 1
        a, b = name.rsplit(" ", 1)
        shown += [PIECE["a " if first else ", and a " if last else ", a "], piece(a), piece(f" {b}")]
    second = goal.lamp_type or goal.receptacle_type
    return {
        "receptacle": receptacle,
        "receptacle_number": receptacle_number,
        "object": thing,
        "object_number": object_number,
        "openable": fill(game.openable, receptacles, bool),
        "opened": fill(game.opened, receptacles, bool),
        "sink": kind(game.dialect.sinks),
        "microwave": kind(("microwavetype",)),
        "fridge": kind(("fridgetype",)),
        "takes": takes,
        "inside": np.concatenate(
            [np.array([p[0] for p in game.inside], np.int32), np.full(objects - len(game.objects), -1, np.int32)]
        ),
        **{
            name: flag(name)
            for name in ("cleanable", "heatable", "coolable", "toggleable", "sliceable", "pickupable", "container")
        },
        "knife": fill([kind in KNIVES for kind in game.object_type], objects, bool),
        "target": fill(able, objects, bool),
        "lamp": fill(
            [bool(goal.lamp_type) and kind == goal.lamp_type and "toggleable" in flags
             for kind, flags in zip(game.object_type, game.flags, strict=True)],
            objects, bool,
        ),
        "place": kind((goal.receptacle_type,)) if goal.receptacle_type else np.zeros(receptacles, bool),
        "state": np.int32(state),
        "count": np.int32(goal.count),
        "kind": np.int32(_kind(goal)),
        "goal": np.array([piece(goal.object_type.removesuffix("type")), piece(second.removesuffix("type"))], np.int32),
        "start": [PIECE[f"{BANNER}\n\n{ROOM}"], *shown, PIECE[".\n\nYour task is to: "], *task],
    }  # fmt: skip


def _kind(goal) -> int:
    """The index of the goal in `game.TASK_TYPES`."""
    if goal.lamp_type:
        return 1
    if goal.states:
        return {"clean": 2, "hot": 3, "cool": 4}[goal.states[0]]
    return 5 if goal.count == 2 else 0


def _texts(pieces: tuple[str, ...], index: dict[str, int], wordings: Mapping[str, Sequence[str]]) -> Texts:
    """The vocabulary, word counts and paraphrases of the pieces."""
    found = [re.findall(r"\b\w\w+\b", text.lower()) for text in pieces]
    vocabulary = tuple(sorted({word for words in found for word in words}))
    column = {word: i for i, word in enumerate(vocabulary)}
    words = np.zeros((len(pieces), len(vocabulary)), np.float32)
    for row, tokens in zip(words, found, strict=True):
        for word in tokens:
            row[column[word]] += 1
    paraphrases = np.repeat(np.arange(len(pieces), dtype=np.int32)[:, None], 4, 1)
    for piece, others in wordings.items():
        paraphrases[index[piece], 1:] = [index[other] for other in others]
    return Texts(pieces, vocabulary, words, paraphrases)


# One game: `house` is a row of `Houses`, no leading axis.


def reset(house: Houses) -> State:
    """The state before the first command; the first text is `house.start`."""
    no = jnp.zeros_like(house.target)
    here = jnp.int32(-1)
    return State(here, here, jnp.asarray(house.inside), jnp.asarray(house.opened), no, no, no, no, no)


def _at(table: jax.Array, index: jax.Array, nothing=False) -> jax.Array:
    """`table[index]`, or `nothing` for index -1."""
    return jnp.where(index >= 0, table[jnp.maximum(index, 0)], nothing)


def admissible(house: Houses, state: State) -> jax.Array:
    """The admissible commands: bool [11 + R + 3 O]."""
    here, held = state.here, state.held
    at_place, holding = here >= 0, held >= 0
    opened, openable = _at(state.opened, here), _at(house.openable, here)
    reachable = at_place & (opened | ~openable)
    there = jnp.arange(house.receptacle.shape[0])
    near = at_place & (state.inside == here)
    simple = jnp.stack([
        True, True, True, at_place, at_place & openable & ~opened, at_place & openable & opened,
        holding & reachable & _at(house.takes[jnp.maximum(here, 0)], held),
        holding & _at(house.sink, here) & _at(house.cleanable, held),
        holding & _at(house.microwave, here) & _at(house.heatable, held),
        holding & _at(house.fridge, here) & _at(house.coolable, held),
        holding,
    ])  # fmt: skip
    return jnp.concatenate([
        simple,
        (house.receptacle > 0) & (there != here),
        near & reachable & ~holding & house.pickupable,
        near & house.toggleable,
        near & house.sliceable & _at(house.knife, held),
    ])  # fmt: skip


def split(house: Houses, command: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(verb, receptacle or -1, object or -1) of a command number; int32 [] each."""
    receptacles, objects = house.receptacle.shape[0], house.object.shape[0]
    past = command - len(COMMANDS)
    go, rest = (past >= 0) & (past < receptacles), past - receptacles
    verb = jnp.where(past < 0, command, jnp.where(go, GO, TAKE + rest // objects))
    return verb, jnp.where(go, past, -1), jnp.where(rest >= 0, rest % objects, -1)


def step(house: Houses, state: State, command: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    """Play a command; one that is not admissible has no effect.

    Args:
        house: a row of `Houses`.
        state: before the command.
        command: int32 [], its number.

    Returns:
        (state after it, text int32 [9 + 3 O], won bool []).
    """
    possible = admissible(house, state)[command]
    verb, r, o = split(house, command)
    here, held = state.here, state.held
    thing = jnp.arange(house.object.shape[0])
    place = jnp.arange(house.receptacle.shape[0])

    def when(which: int) -> jax.Array:
        return possible & (verb == which)

    in_hand = thing == held
    hot, cool = when(HEAT), when(COOL)
    after = State(
        here=jnp.where(when(GO), r, here),
        held=jnp.where(when(TAKE), o, jnp.where(when(PUT), -1, held)),
        inside=jnp.where(
            when(TAKE) & (thing == o), -1, jnp.where(when(PUT) & in_hand, here, state.inside)
        ),
        opened=jnp.where(place == here, (state.opened | when(OPEN)) & ~when(CLOSE), state.opened),
        clean=state.clean | (when(CLEAN) & in_hand),
        hot=(state.hot | (hot & in_hand)) & ~(cool & in_hand),
        cool=(state.cool | (cool & in_hand)) & ~(hot & in_hand),
        toggled=state.toggled | (when(USE) & (thing == o)),
        sliced=state.sliced | (when(SLICE) & (thing == o)),
    )  # fmt: skip
    return after, text(house, state, after, jnp.where(possible, verb, -1), o), won(house, after)


def won(house: Houses, state: State) -> jax.Array:
    """Whether the goal is reached: bool []."""
    done = jnp.select(
        [house.state == 1, house.state == 2, house.state == 3], [state.clean, state.hot, state.cool], True
    )
    ready = house.target & done
    lit = (house.lamp & state.toggled & (state.inside == state.here)).any() & (state.here >= 0)
    places = jnp.arange(house.receptacle.shape[0])[:, None]
    inside = (ready & (state.inside == places)).sum(1)
    return jnp.where(house.lamp.any(), _at(ready, state.held) & lit, (house.place & (inside >= house.count)).any())


def text(house: Houses, before: State, after: State, verb: jax.Array, o: jax.Array) -> jax.Array:
    """The text after a command.

    It has five parts: an opening, up to two names, the words between and after them, a list of objects, and an end.

    Args:
        house: a row of `Houses`.
        before: the state before the command.
        after: the state after it.
        verb: int32 [], -1 for a command without effect.
        o: int32 [], the object that the command names, or -1.

    Returns:
        int32 [9 + 3 O], pieces.
    """
    here, held = after.here, before.held
    p = PIECE

    def is_any(*verbs: int) -> jax.Array:
        return jnp.isin(verb, jnp.array(verbs))

    place = _at(house.receptacle, here, 0), _at(house.receptacle_number, here, 0)
    about = jnp.where(o >= 0, o, held)
    thing = _at(house.object, about, 0), _at(house.object_number, about, 0)
    tool = _at(house.object, held, 0), _at(house.object_number, held, 0)
    middle, empty = here < 0, held < 0

    quality, quality_end = _quality(house, before)
    opening = jnp.select(
        [verb == v for v in (-1, LOOK, INVENTORY, GO, OPEN, CLOSE, TAKE, PUT, CLEAN, HEAT, COOL, USE, SLICE)]
        + [verb == EXAMINE_HELD],
        [
            p["Nothing happens."],
            jnp.where(middle, p[f"{ROOM}nothing."], p["You are facing the "]),
            jnp.where(empty, p["You are not carrying anything."], p["You are carrying: a "]),
            p["You arrive at "], p["You open the "], p["You close the "], p["You pick up the "], p["You move the "],
            p["You clean the "], p["You heat the "], p["You cool the "], p["You turn on the "], p["You sliced the "],
            quality,
        ],
        0,
    )  # fmt: skip
    opening = jnp.where(verb == HELP, HELP_TEXT, opening)
    names_thing = is_any(TAKE, PUT, CLEAN, HEAT, COOL, USE, SLICE, EXAMINE_HELD) | ((verb == INVENTORY) & ~empty)
    names_place = is_any(GO, OPEN, CLOSE) | ((verb == LOOK) & ~middle)
    first = [jnp.where(names_thing, a, jnp.where(names_place, b, 0)) for a, b in zip(thing, place, strict=True)]

    between = jnp.select(
        [verb == TAKE, verb == PUT, is_any(CLEAN, HEAT, COOL), verb == SLICE, is_any(GO, OPEN)],
        [p[" from the "], p[" to the "], p[" using the "], p[" with the "], p[". "]],
        0,
    )
    sees = is_any(GO, OPEN, EXAMINE)
    openable, opened = _at(house.openable, here), _at(after.opened, here)
    see = jnp.where(sees, jnp.where(openable, p["The "], p["On the "]), 0)
    second_place = sees | is_any(TAKE, PUT, CLEAN, HEAT, COOL)
    second = [
        jnp.where(second_place, a, jnp.where(verb == SLICE, b, 0)) for a, b in zip(place, tool, strict=True)
    ]  # fmt: skip
    lists = sees & (opened | ~openable)
    tail = jnp.where(
        sees,
        jnp.where(~openable, p[", you see "], jnp.where(opened, p[" is open. In it, you see "], p[" is closed."])),
        0,
    )
    shown = lists & (after.inside == here)
    rank, count = jnp.cumsum(shown), shown.sum()
    article = jnp.where(rank == 1, p["a "], jnp.where(rank == count, p[", and a "], p[", a "]))
    items = jnp.stack([article, house.object, house.object_number], 1)
    items = jnp.where(shown[:, None], items, 0)
    items = items.at[0, 0].set(jnp.where(lists & (count == 0), p["nothing"], items[0, 0])).reshape(-1)
    full_stop = lists | is_any(CLOSE, TAKE, PUT, CLEAN, HEAT, COOL, USE, SLICE) | ((verb == INVENTORY) & ~empty)
    end = jnp.select(
        [(verb == LOOK) & ~middle, verb == EXAMINE_HELD, full_stop],
        [p[". Next to it, you see nothing."], quality_end, p["."]],
        0,
    )
    parts = [opening, *first, between, see, *second, tail]
    return jnp.concatenate([jnp.stack([jnp.asarray(x, jnp.int32) for x in parts]), items, end[None]]).astype(jnp.int32)


def _quality(house: Houses, state: State) -> tuple[jax.Array, jax.Array]:
    """The pieces before and after the name when the object in hand is examined."""
    held = state.held
    clean, hot, cool, sliced = (_at(x, held) for x in (state.clean, state.hot, state.cool, state.sliced))
    words = jnp.select(
        [clean & hot, clean & cool, sliced & clean, sliced & hot, sliced & cool, sliced, hot, clean, cool],
        [
            jnp.where(sliced, PIECE[f"This is a {word}sliced "], PIECE[f"This is a {word}"])
            for word in ("hot and clean ", "cool and clean ", "clean ", "hot ", "cool ", "", "hot ", "clean ", "cold ")
        ],
        PIECE["There's nothing special about "],
    )
    container = _at(house.container, held)
    words = jnp.where(container, PIECE["This is a normal "], words)
    return words, jnp.where(container, PIECE[". In it, you see nothing."], PIECE["."])


def command_texts(game: Game, receptacles: int, objects: int, state: State) -> list[str]:
    """The engine's command for each command number in a state, on the host; '' for one without its objects."""
    here, held = int(state.here), int(state.held)
    place = game.receptacles[here] if here >= 0 else ""
    thing = game.objects[held] if held >= 0 else ""
    with_place = {"examine": "examine {p}", "open": "open {p}", "close": "close {p}"}
    with_both = {"put": "move {t} to {p}", "clean": "clean {t} with {p}", "heat": "heat {t} with {p}",
                 "cool": "cool {t} with {p}"}  # fmt: skip
    texts = []
    for verb in COMMANDS:
        pattern = with_place.get(verb, with_both.get(verb, "examine {t}" if verb == "examine held" else verb))
        missing = ("{p}" in pattern and not place) or ("{t}" in pattern and not thing)
        texts.append("" if missing else pattern.format(p=place, t=thing))
    texts += [f"go to {name}" for name in game.receptacles] + [""] * (receptacles - len(game.receptacles))
    inside = np.asarray(state.inside)
    for pattern in ("take {o} from {r}", "use {o}", "slice {o} with {t}"):
        for o in range(objects):
            name = game.objects[o] if o < len(game.objects) else ""
            where = game.receptacles[inside[o]] if name and inside[o] >= 0 else ""
            missing = not name or ("{r}" in pattern and not where) or ("{t}" in pattern and not thing)
            texts.append("" if missing else pattern.format(o=name, r=where, t=thing))
    return texts


def say(texts: Texts, row: np.ndarray) -> str:
    """The text of a row of pieces int32 [L]."""
    return "".join(texts.pieces[i] for i in np.asarray(row).tolist())


def pick(houses: Houses, index: Any) -> Houses:
    """The houses at one or more indices, int [...]."""
    return jax.tree.map(lambda x: jnp.asarray(x)[index], houses)
