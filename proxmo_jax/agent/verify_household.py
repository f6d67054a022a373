"""Play random and demonstrated episodes in our household engine and in ALFWorld's own, and compare every turn.

proxmo verify-env household --games DIR
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from envs_bridge.household.verify import lockstep, playable
from envs_bridge.pool import Pool
from proxmo_jax.agent.report import progress_bar, terminal
from proxmo_jax.errors import UserError


@dataclass(frozen=True)
class Config:
    """Play random and expert-guided episodes in our household engine and in ALFWorld's own, and compare every turn."""

    games: Path
    """Folder with game.tw-pddl files, at any depth."""
    episodes: int = 100
    seed: int = 0
    python: str = sys.executable
    """Interpreter that has the packages alfworld and textworld."""
    stock: bool = False
    """ALFWorld's own engine as it is, without remembering its repeated work; many times slower."""


def main(options: Config) -> bool:
    """Compare and report; whether the two agree."""

    files = sorted(str(path) for path in options.games.rglob("game.tw-pddl"))
    if not files:
        raise UserError(f"--games: {options.games} holds no game.tw-pddl file")
    if options.episodes < 1:
        raise UserError(f"--episodes must be at least 1, got {options.episodes}")
    games, others = playable(files)
    if others:
        print(f"{len(others)} of {len(files)} files are not played by our engine; the first: {others[0]}")
    if not games:
        raise UserError(f"--games: {options.games} holds no game that our engine plays")
    engine = "textworld-stock" if options.stock else "textworld"
    with Pool(1, python=options.python, engine=engine, timeout=600) as pool, progress_bar(terminal()) as bar:
        task = bar.add_task("comparing", total=options.episodes, note="")
        found = lockstep(
            games,
            lambda game: pool.reset([(0, game)])[0],
            lambda command: pool.step([(0, command)])[0],
            episodes=options.episodes,
            seed=options.seed,
            on_episode=lambda done: bar.update(task, completed=done),
        )
    if found.difference is not None:
        print(found.difference)
    if found.unplayed:
        reason = f"ALFWorld's engine could not start {len(found.unplayed)} episodes; the last: {pool.fault}"
        if found.episodes == 0:
            raise UserError(reason)
        print(reason)
    print(found)
    return found.difference is None
