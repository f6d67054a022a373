"""WebShop itself behind the bridge's protocol, in an interpreter that has its packages.

It runs under Python 3.8 to 3.12, so this file and its imports use no newer syntax. All sessions of a worker share one
WebShop server (products, search index); the name of a session separates its state from others.

    python -m envs_bridge.shop.upstream DIR human      # the number of goals in WebShop
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

SEED = 233  # of prices and price limits, which WebShop draws at random: the same in every worker
SEPARATOR = " [SEP] "
# Modules whose package has another name.
PACKAGES = {"bs4": "beautifulsoup4"}
NUMBERS = iter(range(sys.maxsize))  # of this process's sessions


@functools.lru_cache(maxsize=4)
def server(folder: str, goals: str) -> tuple[Any, Any]:
    """(WebShop's environment class, one server), loaded once.

    Raises:
        UserError: something is missing; the message says how to install it.
    """
    if not (Path(folder) / "web_agent_site").is_dir():
        raise UserError(f"--env.webshop: {folder} is no checkout of WebShop (it has no web_agent_site)")
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
    except Exception as error:  # any error of its packages if a model, data file, index or Java is missing
        raise UserError(f"WebShop in {folder} could not be started ({_brief(error)}); {_remedy(str(error))}") from error
    return WebAgentTextEnv, first.server


def _brief(error: Exception) -> str:
    """The type of an error and the first line of its message, at most 200 characters."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:200]


def _remedy(message: str) -> str:
    """How to install what WebShop's packages miss, by their error message."""
    if "en_core_web" in message:
        return f"install the model with: {sys.executable} -m spacy download en_core_web_lg"
    if any(word in message.lower() for word in ("java", "jvm")):
        return "its search needs Java: install a JDK, version 11 or newer, and set JAVA_HOME"
    return "its setup.sh downloads the data and builds the search index"


class UpstreamShop:
    """One goal in WebShop; an Environment of `envs_bridge.turn` with the pages of `engine.Shopping`."""

    def __init__(self, folder: str, number: int, goals: str = "human"):
        self._class, self._server = server(folder, goals)
        if not 0 <= number < len(self._server.goals):
            raise UserError(f"WebShop has {len(self._server.goals)} goals, got number {number}")
        self._number, self.task = number, ""
        self._env: Any = None

    @classmethod
    def load(cls, game: Goal) -> UpstreamShop:
        """Open a goal; its folder is a checkout, its kind human or synthetic."""
        return cls(game.folder, game.number, game.kind)

    def reset(self) -> Observation:
        # A session name that was used before would restore its old state.
        prefix = f"s{next(NUMBERS)}-"
        self._env = self._class(observation_mode="text", server=self._server, session_prefix=prefix)
        text, _ = self._env.reset(session=self._number)
        self.task = self._server.goals[self._number]["instruction_text"].strip()
        return self._seen(text, 0.0, False)

    def step(self, command: str) -> Observation:
        text, reward, done, _ = self._env.step(command)
        return self._seen(text, float(reward), bool(done))

    def _seen(self, text: str, reward: float, done: bool) -> Observation:
        """The page without the instruction, and its admissible commands."""
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
    """The number of WebShop's goals, from its own interpreter. Raises UserError with that process's message."""
    root = str(Path(__file__).resolve().parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [python, "-m", "envs_bridge.shop.upstream", str(folder), goals]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", env=environment, check=False
        )
    except OSError as error:
        raise UserError(f"--env.python: {python} cannot be started ({error.strerror})") from error
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
