"""ALFWorld's engine behind the bridge's protocol, with unchanged texts; needs the extra `alfworld`.

It runs in a worker process (`Pool(engine="textworld")`) under an interpreter that has the packages: two of their
dependencies are GPL, and one of them changes the process it runs in.
"""

from __future__ import annotations

import sys
from typing import Any

from envs_bridge.errors import UserError
from envs_bridge.household import textworld_patch
from envs_bridge.household.game import read_game_file
from envs_bridge.turn import Observation


class UpstreamHousehold:
    """One game in TextWorld with ALFWorld's names of objects; an Environment of `envs_bridge.turn`."""

    def __init__(self, data: dict, *, stock: bool = False):
        """Load a game.

        Args:
            data: the JSON of a game file.
            stock: use unmodified TextWorld, without `textworld_patch`.

        Raises:
            UserError: alfworld or textworld is not installed.
        """
        try:
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld import EnvInfos
            from textworld.envs.pddl import PddlEnv
        except ImportError as error:
            raise UserError(
                f"ALFWorld's engine needs the packages alfworld and textworld in {sys.executable} ({error});"
                " install them with: pip install 'proxmo-jax[alfworld]'"
            ) from error
        if not stock:
            textworld_patch.install()
        self._game: Any = AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True)))
        self._game.load(data)
        self.task = ""

    @classmethod
    def load(cls, path: str) -> UpstreamHousehold:
        """The game of a file, with memoisation."""
        return cls(read_game_file(path))

    @classmethod
    def load_stock(cls, path: str) -> UpstreamHousehold:
        """The game of a file in unmodified TextWorld, for comparison. Do not mix with `load` in one process."""
        return cls(read_game_file(path), stock=True)

    def reset(self) -> Observation:
        state = self._game.reset()
        self.task = state.feedback.rpartition("Your task is to: ")[2].strip()
        return self._seen(state)

    def step(self, command: str) -> Observation:
        state, _, _ = self._game.step(command)
        return self._seen(state)

    def _seen(self, state) -> Observation:
        won = bool(state["won"])
        return Observation(state.feedback, tuple(state["admissible_commands"]), float(won), won, won)
