"""ALFWorld's own engine behind the bridge's protocol, its texts unchanged; needs the extra `alfworld`.

It runs in a worker process of its own (`Pool(engine="textworld")`), under whatever interpreter has the packages: two of
their dependencies are GPL, and one of them changes the process it runs in.
"""

import sys
from typing import Any

from envs_bridge.errors import UserError
from envs_bridge.household import textworld_patch as speed
from envs_bridge.household.game import read_game_file
from envs_bridge.turn import Observation


class GenuineHousehold:
    """One game in TextWorld with ALFWorld's names for things; the Environment of `envs_bridge.turn`."""

    def __init__(self, data: dict, *, stock: bool = False):
        """data: a game file's JSON. `stock`: TextWorld as it is, without `speed`. Raises UserError without it."""
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
            speed.install()
        self._game: Any = AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True)))
        self._game.load(data)
        self.task = ""

    @classmethod
    def load(cls, path: str) -> "GenuineHousehold":
        return cls(read_game_file(path))

    @classmethod
    def load_stock(cls, path: str) -> "GenuineHousehold":
        """Slow, for comparison: never in a process that has loaded one the other way."""
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
