"""What ALFWorld's own engine said on generated games, recorded so that the tests can hold ours to it without it.

    python tests/household_record.py --python PY       # PY has alfworld 0.4.2 and textworld 1.7.0; minutes

Every third game is in the earlier wording. The games are made anew from their seed whenever they are needed; a digest
tells whether they still are the games that were recorded.
"""

import gzip
import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from envs_bridge.household import dialect
from envs_bridge.household.engine import Household
from envs_bridge.household.game import TASK_TYPES, build_game
from envs_bridge.household.generate import make_game
from envs_bridge.household.verify import command_for
from envs_bridge.pool import Pool

RECORD = Path(__file__).parent / "golden" / "household_transcripts.json.gz"
GAMES, STEPS, SEED = 90, 60, 11
LEVELS = ("easy", "medium", "hard")


def recorded_games() -> list[dict]:
    """The games' JSON, all six task types, three sizes, two wordings."""
    games = []
    for i in range(GAMES):
        game = make_game("train", i, SEED, LEVELS[i // 6 % 3], TASK_TYPES[i % 6])[1]
        games.append(earlier(game) if i % 3 == 2 else game)
    return games


def earlier(game: dict) -> dict:
    """The same game as ALFWorld wrote it before December 2024: `put X in/on Y`, arrival at a location, no `help`."""
    grammar, domain = game["grammar"], game["pddl_domain"]
    for now, then in (
        ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
        ('"move {o} to {r}"', '"put {o} in/on {r}"'),
        ("You arrive at {r.name}.", "You arrive at {lend.name}."),
    ):
        assert now in grammar
        grammar = grammar.replace(now, then)
    grammar = grammar[: grammar.index("action help {")]
    grammar = "\n".join(line for line in grammar.splitlines() if "help.feedback" not in line)
    start = domain.index("(:action help")
    domain = domain[:start] + domain[domain.index("(:action", start + 1) :]
    return {**game, "grammar": grammar, "pddl_domain": domain}


def known_dialects(games: list[dict]) -> tuple[dict, dict]:
    """Hashes of `earlier`'s domain and grammar, which no release of ALFWorld has, as `dialect` keeps them."""
    old = games[2]
    found = dialect.TASK.search(old["grammar"])
    assert found
    general = old["grammar"][: found.start(1)] + old["grammar"][found.end(1) :]
    return {dialect.domain_hash(old["pddl_domain"]): ("sinkbasintype",)}, {dialect.grammar_hash(general): "put"}


def digest(games: list[dict]) -> str:
    return hashlib.sha256(json.dumps(games, sort_keys=True).encode()).hexdigest()


def main(python: str = sys.executable) -> None:
    """Record; `python` is the interpreter that has ALFWorld."""
    games = recorded_games()
    sinks, wordings = known_dialects(games)
    dialect.SINKS.update(sinks)
    dialect.WORDINGS.update(wordings)
    episodes, steps = [], 0
    with tempfile.TemporaryDirectory() as folder, Pool(1, python=python, engine="textworld", timeout=600) as pool:
        for i, game in enumerate(games):
            path = Path(folder) / f"{i}.tw-pddl"
            path.write_text(json.dumps(game))
            world, rng = Household(build_game(game)), random.Random(f"{SEED}/{i}")
            started = pool.reset([(0, str(path))])[0]
            assert started, pool.fault
            seen, task = started
            commands, said = [], [[seen.text, seen.admissible, seen.won]]
            ours = world.reset()
            while not ours.done and len(commands) < STEPS:
                commands.append(command_for(world, ours, rng, (0.0, 0.1, 0.3)[i // 6 % 3]))
                ours = world.step(commands[-1])
                answer = pool.step([(0, commands[-1])])[0]
                assert answer, pool.fault
                said.append([answer.text, answer.admissible, answer.won])
            steps += len(commands)
            episodes.append({"task": task, "commands": commands, "said": said})
            print(f"{i + 1} of {GAMES} games, {steps} steps")
    record = {"digest": digest(games), "episodes": episodes}
    RECORD.write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))
    print(f"{RECORD}: {RECORD.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    tyro.cli(main)
