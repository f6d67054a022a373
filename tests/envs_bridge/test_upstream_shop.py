"""WebShop itself behind the pool, in another interpreter: here an invented package of the same interface."""

import ast
import sys
from pathlib import Path

import pytest
from interpreters import other_pythons
from nested import config_with
from rich.console import Console

from envs_bridge.pool import Pool
from envs_bridge.shop.upstream import count_goals
from envs_bridge.turn import SEARCH_COMMAND, Goal
from proxmo_jax.agent.tasks import environment, tasks_of

ROOT = Path(__file__).parents[2]
STAND_IN = """
import random
class Server:
    def __init__(self, human_goals):
        kind = "human" if human_goals else "synthetic"
        self.goals = [{"instruction_text": "%s goal %d below %.2f" % (kind, i, random.random())} for i in range(7)]
        self.user_sessions = {}
class WebAgentTextEnv:
    loaded = 0
    def __init__(self, observation_mode="html", server=None, session_prefix="", human_goals=True, num_products=None):
        assert observation_mode == "text"
        if server is None:
            WebAgentTextEnv.loaded += 1
            assert WebAgentTextEnv.loaded == 1, "the server is loaded once in a process"
        self.server, self.prefix = server or Server(human_goals), session_prefix
        print("libraries print")
    def reset(self, session=None):
        self.session = self.prefix + str(session)
        assert self.session not in self.server.user_sessions, "a session of that name is there"
        self.goal = self.server.goals[session]
        self.server.user_sessions[self.session] = []
        return "WebShop [SEP] Instruction: [SEP] %s [SEP] Search" % self.goal["instruction_text"], None
    def step(self, action):
        said = self.server.user_sessions[self.session]
        said.append(action)
        done = action == "click[buy now]"
        reward = 1.0 if done and "search[lamp]" in said else 0.25 if done else 0
        return "Instruction: [SEP] %s [SEP] %s" % (self.goal["instruction_text"], " ".join(said)), reward, done, None
    def get_available_actions(self):
        said = self.server.user_sessions[self.session]
        return {"has_search_bar": not said, "clickables": ["search"] if not said else ["back to search", "buy now"]}
"""


@pytest.fixture
def webshop(tmp_path) -> Path:
    package = tmp_path / "checkout" / "web_agent_site" / "envs"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(STAND_IN)
    return tmp_path / "checkout"


@pytest.mark.parametrize("python", other_pythons())
def test_webshop_is_played_in_its_own_interpreter(webshop, python):
    assert count_goals(python, webshop, "human") == 7
    games = [(slot, Goal(str(webshop), slot // 4, "human")) for slot in range(8)]
    with Pool(2, python=python, engine="webshop", block=4) as pool:
        started = pool.reset(games)
        assert pool.faults == 0, pool.fault
        # The members of a group have the same goal, and two workers have drawn the same limits.
        tasks = [task for _, task in started]
        assert len(set(tasks)) == 2
        assert tasks[0].startswith("human goal 0 below 0.")
        assert started[0][0].admissible == (SEARCH_COMMAND,)
        assert started[0][0].text == "Search"
        seen = pool.step([(0, "search[lamp]"), (1, "search[rug]")])
        assert [s.text for s in seen] == ["search[lamp]", "search[rug]"]  # sessions know nothing of each other
        assert seen[0].admissible == ("click[back to search]", "click[buy now]")
        bought = pool.step([(0, "click[buy now]"), (1, "click[buy now]")])
        assert [(s.reward, s.done, s.won) for s in bought] == [(1.0, True, True), (0.25, True, False)]
        again = pool.reset([(0, games[0][1])])
        assert again[0][1] == tasks[0]


def test_goals_of_webshop_are_split_as_ours_are(webshop):
    config = config_with(
        env__name="webshop", env__webshop=webshop, env__python=sys.executable, env__goals="synthetic", model__path="x"
    )
    games = tasks_of(config, dict.fromkeys(("train", "valid", "test"), 100), Console(quiet=True))
    assert [len(games[split]) for split in ("train", "valid", "test")] == [5, 1, 1]
    assert environment(config).kind(games["train"][0]) == "synthetic"


def test_what_is_missing_is_named_with_the_command_that_installs_it(webshop, tmp_path):
    (webshop / "web_agent_site" / "envs" / "__init__.py").write_text("import pyserini_is_not_there.search")
    with pytest.raises(ValueError, match=r"WebShop needs the package pyserini_is_not_there in .* -m pip install"):
        count_goals(sys.executable, webshop, "human")
    with Pool(1, engine="webshop") as pool:
        assert pool.reset([(0, Goal(str(webshop), 0, "human"))]) == [None]
        assert "pip install pyserini_is_not_there" in pool.fault
    for raised, message in (
        (
            "OSError(\"[E050] Can't find model 'en_core_web_lg'\\nsee\")",
            r"install the model with: .* -m spacy download en",
        ),
        ("Exception('Unable to find libjvm.so')", "its search needs Java: install a JDK"),
        ("FileNotFoundError(2, 'No such file', 'data/items.json')", "items.json'[)]; its setup.sh downloads the data"),
    ):
        (webshop / "web_agent_site" / "envs" / "__init__.py").write_text(f"raise {raised}")
        with pytest.raises(ValueError, match=message) as said:
            count_goals(sys.executable, webshop, "human")
        assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match="is no checkout of WebShop"):
        count_goals(sys.executable, tmp_path, "human")
    with pytest.raises(ValueError, match="cannot be started"):
        count_goals(str(tmp_path / "no-python"), webshop, "human")


OLD = [
    "worker",
    "turn",
    "shop/upstream",
    *(f"household/{name}" for name in ("upstream", "textworld_patch", "game", "dialect", "engine")),
]


@pytest.mark.parametrize("name", [f"envs_bridge/{name}.py" for name in OLD])
def test_what_runs_in_old_interpreters_is_written_in_their_language(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 8))
    assert "from __future__ import annotations" in text
