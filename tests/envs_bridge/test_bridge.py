"""Actions, prompts, and the pool with real worker processes."""

import ast
import json
import os
import random
import re
import signal
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from interpreters import other_pythons

from envs_bridge.actions import WEBSHOP_TAIL, project, spelled
from envs_bridge.household.engine import Household
from envs_bridge.household.game import load_game
from envs_bridge.pool import Pool, WorkerError, _parse
from envs_bridge.prompts import History, Notes, piece_ends
from envs_bridge.turn import SEARCH_COMMAND, Goal, Observation
from envs_bridge.worker import Worker, load_fast

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("answer", "command", "valid"),
    [
        ("<think>a</think>\n<action>  GO TO Drawer 2 </action> tail", "go to drawer 2", True),
        ("<action>look</action>", "look", False),
        ("<THINK>a</THINK><action>look</action>", "look", False),
        ("<think>我</think><action>look</action>", "look", False),
        ("<think>a</think><action>one</action><action>two</action>", "one", True),
        ("</action><think>r</think><action>look", "", True),
        ("", "", False),
    ],
)
def test_projection(answer, command, valid):
    assert project(answer) == (command, valid)


def test_projection_falls_back_to_the_tail():
    long = "no tags and a very long tail: click[< prev] and then something else entirely"
    assert project(long) == ("d then something else entirely", False)
    assert project(long, WEBSHOP_TAIL) == ("ething else entirely", False)


def test_projection_equals_the_official_one(official):
    for case in json.loads((official / "95_projection.json").read_text(encoding="utf-8")):
        assert project(case["text"]) == (case["alfworld_action"], bool(case["alfworld_valid"]))
        assert project(case["text"], WEBSHOP_TAIL) == (case["webshop_action"], bool(case["webshop_valid"]))


def test_commands_are_spelled_as_the_world_spells_them():
    known = ("click[8 fl oz (pack of 1)]", "click[b0123]", "click[< prev]", SEARCH_COMMAND)
    for said, command in (
        ("click [ 8 fl oz ( pack of 1 ) ]", known[0]), ("click [ b 01 23 ]", known[1]), ("click [ < prev ]", known[2]),
        ("search [ red  lamp ]", "search[red lamp]"), ("click [ b 99 ]", "click [ b 99 ]"), ("look", "look"),
    ):  # fmt: skip
        assert spelled(said, known) == command
    assert spelled("go to cabinet 1", ("go to cabinet 1",)) == "go to cabinet 1"


def test_memory_takes_notes(games):
    world = Household.load(games[3])  # put a hot thing somewhere
    seen = world.reset()
    memory = Notes.start(world.task, seen)
    assert set(memory.places) == set(world.game.receptacles)
    assert all(things is None for things in memory.places.values())
    for command in world.game.walkthrough:
        memory.remember(command, world.step(command))
        if command.startswith("heat"):
            assert memory.hand == "hot " + world.game.objects[world.holding]
        elif command.startswith("take"):
            assert memory.hand == world.game.objects[world.holding]
    assert memory.hand == ""
    inside = [world.game.objects[o] for o in world._in(world.game.receptacles.index(memory.here))]
    assert sorted(memory.places[memory.here]) == sorted(inside)
    memory.remember("go to mars 1", Observation("Nothing happens.", ()))
    assert "last go to mars 1 failed" in memory.prompt()


def test_a_shortened_prompt_keeps_the_task(games):
    world = Household.load(games[0])
    memory = Notes.start(world.task, world.reset())
    for receptacle in world.game.receptacles:
        memory.remember(f"go to {receptacle}", world.step(f"go to {receptacle}"))
    check_cuts(memory)


def check_cuts(memory):
    """Each cut begins where the one before it ended, the more is kept the longer it is, and the task goes last."""
    before = memory.prompt()
    for cut in memory.shortened():
        prompts = [cut.write(n) for n in range(cut.size + 1)]
        if cut.size:
            assert prompts[-1] == before
        assert list(map(len, prompts)) == sorted(map(len, prompts))
        assert all(memory.task in prompt for prompt in prompts) or cut.what == "task"
        before = prompts[0]
    assert cut.what == "task"
    assert memory.task not in before


def test_history_is_the_last_turns_as_they_were(games):
    world = Household.load(games[0])
    memory = History.start(world.task, first := world.reset(), kept=2)
    prompt = memory.prompt()
    assert "Turn 1." in prompt
    assert prompt.count(world.task) == 1  # the first observation ends with it; the prompt has a place for it
    assert all(f"\n{action}\n" in prompt for action in first.admissible if action != "help")
    places = world.game.receptacles[:3]
    texts = []
    for place in places:
        texts.append(world.step(f"go to {place}"))
        memory.remember(f"go to {place}", texts[-1])
    prompt = memory.prompt()
    assert f"did: go to {places[0]}" not in prompt
    for turn, place, saw in ((2, places[1], texts[0]), (3, places[2], texts[1])):
        assert f"[{turn}] saw: {saw.text}\n[{turn}] did: go to {place}" in prompt
    assert f"Turn 4. You see: {texts[2].text}" in prompt
    check_cuts(memory)
    assert "Possible actions" not in History.start(world.task, first, list_actions=False).prompt()
    forgetful = History.start(world.task, first, kept=0)
    forgetful.remember("look", world.step("look"))
    assert "did:" not in forgetful.prompt()


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("drawer 12 of 3", ["drawer", " 12", " of", " 3"]),
        ("请把苹果", ["请", "把", "苹", "果"]),
        ('{"a":[1]}', [*'{"', "a", *'":[', "1", *"]}"]),
        ("x" * 60, ["x" * 24, "x" * 24, "x" * 12]),
        ("👩‍👩‍👧👍🏽🇩🇪1️⃣", ["👩‍👩‍👧", "👍🏽", "🇩🇪", "1️⃣"]),
        ("cafe\u0301 ,", ["cafe\u0301", " ,"]),
        ("  \n\n", ["  \n\n"]),
        ("", []),
    ],
)
def test_texts_are_cut_between_words_or_whole_characters(text, pieces):
    ends = piece_ends(text)
    assert [text[a:b] for a, b in pairwise(ends)] == pieces


def test_pool_plays_as_the_engine_does(games):
    worlds = [Household.load(game) for game in games]
    with Pool(2) as pool:
        started = pool.reset(list(enumerate(games)))
        for world, (seen, task) in zip(worlds, started, strict=True):
            assert (seen, task) == (world.reset(), world.task)
        answers = pool.step([(i, world.game.walkthrough[0]) for i, world in enumerate(worlds)])
        for world, seen in zip(worlds, answers, strict=True):
            assert seen == world.step(world.game.walkthrough[0])


def test_a_missing_game_is_lost_alone(games, tmp_path):
    with Pool(1) as pool:
        gone, there = pool.reset([(0, str(tmp_path / "gone.tw-pddl")), (1, games[0])])
        assert gone is None
        assert there[0].admissible
        assert "gone.tw-pddl: cannot be read" in pool.fault
        assert pool.step([(0, "look"), (1, "look")])[0] is None
        assert pool.faults == 2


def kill(pool):
    os.kill(pool._links[0].process.pid, signal.SIGKILL)


def stop(pool):
    os.kill(pool._links[0].process.pid, signal.SIGSTOP)


@pytest.mark.parametrize(("harm", "message"), [(kill, "exit status -9"), (stop, "did not answer within 2 s")])
def test_a_lost_worker_is_replaced(games, harm, message):
    """Its episodes are lost, those of the other worker are not, and the next reset finds a new one."""
    with Pool(2, timeout=2) as pool:
        slots = [(slot, games[0]) for slot in (0, 1, 8)]
        first = pool.reset(slots)
        harm(pool)
        answers = pool.step([(slot, "look") for slot, _ in slots])
        assert [answer is None for answer in answers] == [True, True, False]
        assert pool.faults == 1
        assert message in pool.fault
        assert pool.reset(slots) == first


def test_a_worker_killed_in_mid_step_loses_its_episodes_alone(games):
    with Pool(2) as pool:
        slots = [(slot, games[0]) for slot in range(16)]
        assert None not in pool.reset(slots)
        many = [(slot, "look") for slot in range(16)] * 400  # long enough to be killed while it plays
        pool.send_step(many)
        kill(pool)
        answers = pool.receive()
        lost = [answer is None for answer in answers]
        assert lost == [slot < 8 for slot, _ in many]
        assert "exit status -9" in pool.fault
        assert None not in pool.reset(slots)


def test_a_worker_that_does_not_read_does_not_hold_us(games):
    """A megabyte does not fit a pipe: writing it to a worker that hangs must time out as reading does."""
    with Pool(1, timeout=2) as pool:
        assert pool.reset([(0, games[0])])[0]
        stop(pool)
        assert pool.step([(0, "x" * 3_000_000)]) == [None]
        assert "did not answer within 2 s" in pool.fault
        assert pool.reset([(0, games[0])])[0]
        assert pool.step([(0, "x" * 3_000_000)])[0].text == "Nothing happens."


def test_words_are_counted_in_the_worker_and_nothing_is_said_twice(games):
    with Pool(1) as pool:
        pool.reset([(0, games[0]), (1, games[0])])
        for command in ("look", "inventory", "look"):
            for seen in pool.step([(0, command), (1, command)]):
                assert dict(seen.words) == Counter(re.findall(r"\b\w\w+\b", seen.text.lower()))
        assert len(pool._links[0].said) == 3  # the room, look, inventory


def test_worker_and_pool_forget_texts_together(games, monkeypatch):
    """Both sides keep at most so much; when one forgets, so does the other, and nothing is mistaken or lost."""
    monkeypatch.setattr("envs_bridge.pool.SAID_AT_MOST", 3)
    monkeypatch.setattr("envs_bridge.worker.SAID_AT_MOST", 3)
    worker, said, world = Worker(load_fast), [], Household.load(games[0])
    ask = [
        {"reset": [[0, games[0]]]},
        *({"step": [[0, f"go to {place}"]]} for place in load_game(games[0]).receptacles * 3),
    ]
    for request in ask:
        ((seen, _),) = _parse(json.loads(json.dumps(worker.answer(request))), 1, said)
        command = request.get("step", [[0, ""]])[0][1]
        assert seen == (world.step(command) if command else world.reset())
        assert dict(seen.words) == Counter(re.findall(r"\b\w\w+\b", seen.text.lower()))
        assert len(said) <= 3


class Odd:
    """A world whose second answer lists a command of two lines, which no line can carry."""

    task = "t"

    def __init__(self):
        self.turn = 0

    def reset(self):
        return Observation("start", ("look",))

    def step(self, command):
        self.turn += 1
        return Observation(f"turn {self.turn}", ("one\ntwo", "look") if self.turn == 2 else ("look",))


def test_a_command_of_two_lines_is_left_out_and_the_episode_goes_on(monkeypatch):
    """And neither side forgets for it what the other still remembers."""
    for side in ("pool", "worker"):
        monkeypatch.setattr(f"envs_bridge.{side}.SAID_AT_MOST", 2)
    worker, said = Worker(lambda path: Odd()), []
    heard = [_parse(worker.answer({"reset": [[0, ""]]}), 1, said)]
    heard += [_parse(worker.answer({"step": [[0, ""]]}), 1, said) for _ in range(4)]
    assert [seen.text for ((seen, _),) in heard] == ["start", "turn 1", "turn 2", "turn 3", "turn 4"]
    assert all(seen.admissible == ("look",) for ((seen, _),) in heard)
    again = worker.answer({"reset": [[1, ""]]})
    assert _parse(again, 1, said)[0][0].text == "start"


class Numeric:
    """An environment that says what Gymnasium's say."""

    task = "count"

    def reset(self):
        return Observation("start", ["look", "go"], reward=np.float32(0), done=np.bool_(False))

    def step(self, command):
        return Observation("end", ["look"], reward=np.float64(1.5), done=np.bool_(True), won=np.bool_(True))


def test_numbers_of_numpy_and_lists_of_commands_go_over_the_pipe():
    worker, said = Worker(lambda path: Numeric()), []
    asked = ({"reset": [[0, ""]]}, {"step": [[0, "look"]]})
    start, end = (_parse(json.loads(json.dumps(worker.answer(one))), 1, said)[0][0] for one in asked)
    assert (start.admissible, start.reward, start.done) == (("look", "go"), 0.0, False)
    assert (end.text, end.reward, end.done, end.won) == ("end", 1.5, True, True)


def strange_actions(count):
    """Actions as a broken or hostile model may write them: Unicode, control characters, code, at times a megabyte."""
    rng = random.Random(0)
    seeds = [
        "go to desk 1", "take ", "'; rm -rf / #", "$(touch HERE)", "`touch HERE`", "open('HERE', 'w')", "\ud800",
        "__import__('os').system('touch HERE')", "{o.name}", "#look.feedback#", "[{r.name | holds(a, o)}]", "%s%n",
        "\x00", "\x1b[2J", "\u202e",
        "🍎" * 9, '"}]}', "\r\n", "(define (problem x)", "<action>look</action>", "../../etc/passwd",
        "NaN", "[1, 2", "ＬＯＯＫ",
    ]  # fmt: skip
    for i in range(count):
        kind = i % 5
        if kind == 0:
            yield "".join(
                chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(rng.randrange(30))
            )
        elif kind == 4 and i % 9999 == 4:
            yield rng.choice(seeds) * (1_000_000 // 8)
        else:
            yield rng.choice(seeds) + rng.choice(seeds) * (kind - 1)


@pytest.mark.slow
def test_a_hundred_thousand_strange_actions(games, tmp_path, monkeypatch):
    """No crash, no hang, nothing executed, and the worlds play on."""
    monkeypatch.chdir(tmp_path)
    with Pool(2, timeout=60) as pool:
        slots = [(slot, games[slot % len(games)]) for slot in range(16)]
        pool.reset(slots)
        before = pool.step([(slot, "look") for slot, _ in slots])
        actions = strange_actions(100_000)
        while part := list(islice(actions, 2000)):
            projected = [project(f"<think></think><action>{action}</action>") for action in part]
            commands = [(i % 16, command) for i, (command, _) in enumerate(projected)]
            answers = pool.step(commands)
            assert None not in answers
        assert pool.faults == 0
        pool.reset(slots)
        assert pool.step([(slot, "look") for slot, _ in slots]) == before
    assert not list(tmp_path.iterdir())


GARBAGE = """
import sys
print('{"version": 4}', flush=True)
for line in sys.stdin:
    print(GARBAGE, flush=True)
"""


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("'}{'", "which is not JSON"),
        ("'[]'", "need a list of 1"),
        ("'[[1, 2]]'", "for an episode"),
        ("'{}'", "need a list of 1"),
        ("'x' * (1 << 27)", "answered more than"),
    ],
)
def test_garbage_is_a_lost_worker(games, tmp_path, answer, message):
    with Pool(1) as pool:
        pool.reset([(0, games[0])])
        good = pool._command
        script = tmp_path / "garbage.py"
        script.write_text(GARBAGE.replace("GARBAGE", answer))
        pool._command = [sys.executable, str(script)]
        kill(pool)
        assert pool.step([(0, "look")]) == [None]  # killed; what is started now answers garbage
        pool._command = good
        assert pool.reset([(0, games[0])]) == [None]
        assert message in pool.fault
        assert pool.reset([(0, games[0])])[0][0].admissible


def test_a_worker_of_another_version_is_refused(tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho '{\"version\": 99}'\ncat >/dev/null\n")
    script.chmod(0o755)
    with pytest.raises(WorkerError, match=r"version.*99.*need one of protocol version 4"):
        Pool(1, python=str(script))


def unnamed_encodings(path: Path) -> list[str]:
    """Calls that read or write text in whatever encoding the locale has."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        words = [a.value for a in [*node.args, *given.values()] if isinstance(a, ast.Constant)]
        binary = any(isinstance(word, str) and re.fullmatch("[rwxa]b[+]?", word) for word in words)
        opens = name in ("read_text", "write_text", "fdopen", "TextIOWrapper") or name == "open"
        text = name in ("run", "Popen", "check_output", "check_call") and given.keys() & {"text", "universal_newlines"}
        if (text or (opens and not binary)) and "encoding" not in given:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    return found


def test_no_text_is_read_or_written_in_the_locales_encoding():
    paths = [path for room in ("proxmo_jax", "envs_bridge", "experiments") for path in (ROOT / room).rglob("*.py")]
    assert [call for path in paths for call in unnamed_encodings(path)] == []


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


@pytest.mark.parametrize("python", other_pythons())
def test_workers_speak_utf8_in_every_locale(python, tmp_path, monkeypatch):
    """A task in other letters goes both ways unharmed; half a character, which no pipe can carry, is replaced."""
    for name, value in ASCII.items():
        monkeypatch.setenv(name, value)
    package = tmp_path / "web_agent_site" / "envs"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("", encoding="utf-8")
    (package / "__init__.py").write_text(ECHO, encoding="utf-8")
    with Pool(1, python=python, engine="webshop") as pool:
        ((seen, task),) = pool.reset([(0, Goal(str(tmp_path), 0, "human"))])
        assert (task, seen.admissible) == ("thé 茶 🍵 ?", (SEARCH_COMMAND,))
        assert pool.step([(0, "search[日本 🍎]")])[0].text == "日本 🍎"


ECHO = """
class WebAgentTextEnv:
    def __init__(self, **options):
        self.server, self.goals = self, [{"instruction_text": "thé 茶 🍵 \\ud83d"}]
    def reset(self, session):
        return "seen \\ud83d", None
    def step(self, action):
        return action[7:-1], 0.0, False, None
    def get_available_actions(self):
        return {"has_search_bar": True, "clickables": []}
"""
