"""The genuine WebShop behind the bridge's protocol, in an interpreter of its own that has its packages.

Runs under Python 3.8 to 3.12: nothing newer here, nor in what this file imports. All sessions of a worker share one of
WebShop's servers (products, search index); what they were doing is kept apart by the session's name.

    python -m envs_bridge.shop.upstream DIR human      # how many goals WebShop has there
"""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from envs_bridge.errors import UserError
from envs_bridge.turn import SEARCH_COMMAND, Goal, Observation, clicks

SEED = 233  # of prices and their limits, which WebShop leaves to chance: the same in every worker
SEPARATOR = " [SEP] "
# Where a module and the package that has it are called differently.
PACKAGES = {"bs4": "beautifulsoup4"}
NUMBERS = iter(range(sys.maxsize))  # of the sessions of this process


@functools.lru_cache(maxsize=4)
def server(folder: str, goals: str) -> tuple[Any, Any]:
    """(WebShop's environment class, one server), loaded once. Raises UserError: what is missing, and what
    brings it."""
    if not (Path(folder) / "web_agent_site").is_dir():
        raise UserError(f"--webshop: {folder} is no checkout of WebShop (it has no web_agent_site)")
    sys.path.insert(0, folder)
    random.seed(SEED)
    try:
        from web_agent_site.envs import WebAgentTextEnv  # type: ignore[import-not-found]

        first = WebAgentTextEnv(observation_mode="text", human_goals=goals == "human", num_products=None)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        raise UserError(
            f"WebShop needs the package {missing or error} in {sys.executable}; install it with:"
            f" {sys.executable} -m pip install {PACKAGES.get(missing, missing)}"
        ) from error
    except Exception as error:  # whatever its packages raise where a model, a data file, an index or Java is missing
        raise UserError(f"WebShop in {folder} could not be started ({_brief(error)}); {_remedy(str(error))}") from error
    return WebAgentTextEnv, first.server


def _brief(error: Exception) -> str:
    """Its kind and the first line of what it says, at most 200 characters."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:200]


def _remedy(said: str) -> str:
    """What brings that which WebShop's packages found missing."""
    if "en_core_web" in said:
        return f"install the model with: {sys.executable} -m spacy download en_core_web_lg"
    if any(word in said.lower() for word in ("java", "jvm")):
        return "its search needs Java: install a JDK, version 11 or newer, and set JAVA_HOME"
    return "its setup.sh downloads the data and builds the search index"


class UpstreamShop:
    """One goal in WebShop; the Environment of `envs_bridge.turn`, with pages as `engine.Shopping` gives them."""

    def __init__(self, folder: str, number: int, goals: str = "human"):
        self._class, self._server = server(folder, goals)
        if not 0 <= number < len(self._server.goals):
            raise UserError(f"WebShop has {len(self._server.goals)} goals, got number {number}")
        self._number, self.task = number, ""
        self._env: Any = None

    @classmethod
    def load(cls, game: Goal) -> UpstreamShop:
        """game: its folder is a checkout, its kind human or synthetic."""
        return cls(game.folder, game.number, game.kind)

    def reset(self) -> Observation:
        # A name used before would find the goal's state as it was left.
        prefix = f"s{next(NUMBERS)}-"
        self._env = self._class(observation_mode="text", server=self._server, session_prefix=prefix)
        text, _ = self._env.reset(session=self._number)
        self.task = self._server.goals[self._number]["instruction_text"].strip()
        return self._seen(text, 0.0, False)

    def step(self, command: str) -> Observation:
        text, reward, done, _ = self._env.step(command)
        return self._seen(text, float(reward), bool(done))

    def _seen(self, text: str, reward: float, done: bool) -> Observation:
        """The page without the instruction, and what does something there."""
        if done:
            return Observation(text, (), reward, True, reward == 1.0)
        parts = text.split(SEPARATOR)
        if self.task in parts:
            text = SEPARATOR.join(parts[parts.index(self.task) + 1 :])
        available = self._env.get_available_actions()
        if available["has_search_bar"]:
            return Observation(text, (SEARCH_COMMAND,))
        return Observation(text, clicks(available["clickables"]), reward)


def count_goals(python: str, folder: Any, goals: str) -> int:
    """How many goals WebShop has, by its own interpreter. Raises UserError with what that said."""
    root = str(Path(__file__).resolve().parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [python, "-m", "envs_bridge.shop.upstream", str(folder), goals]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", env=environment, check=False
        )
    except OSError as error:
        raise UserError(f"--python: {python} cannot be started ({error.strerror})") from error
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or [f"WebShop in {folder} could not be started"])[-1])
    return int(json.loads(done.stdout.strip().splitlines()[-1])["goals"])


def main() -> None:
    try:
        count = len(server(sys.argv[1], sys.argv[2])[1].goals)
    except ValueError as error:
        sys.exit(str(error))
    print(json.dumps({"goals": count}))


if __name__ == "__main__":
    main()
