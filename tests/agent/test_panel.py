"""Panels: tasks recognised by content, disjoint from training, the same everywhere; results compared pair by pair."""

import json
import random
import re
import shutil
from math import comb
from pathlib import Path

import jax
import numpy as np
import pytest
from nested import plain
from rich.console import Console
from scripted import ScriptedPool, say, small_player

from envs_bridge.household.fingerprint import content_hash, fingerprint, world_hash
from envs_bridge.household.game import build_game
from envs_bridge.household.generate import generate_games, make_game
from envs_bridge.shop.generate import FILES, generate_catalogue
from proxmo_jax import cli
from proxmo_jax.agent import evaluate, paired
from proxmo_jax.agent.evaluate import Config
from proxmo_jax.agent.panel import Config as PanelConfig
from proxmo_jax.agent.panel import panel_games, read_panel, settings_for, with_panel
from proxmo_jax.agent.rollout import NothingPlayed
from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import init_params
from proxmo_jax.policy.sharding import replicate


def renamed(problem: str, seed: int) -> str:
    """The problem with every id drawn anew, as the generator might have drawn it."""
    rng, found = random.Random(seed), {}

    def anew(match: re.Match) -> str:
        return found.setdefault(match.group(), re.sub(r"\d\d", lambda _: f"{rng.randint(0, 99):02d}", match.group()))

    return re.sub(r"\b[A-Za-z]+_bar_[\w]*_dot_\w*", anew, problem)


def test_a_problem_is_recognised_whatever_its_ids_and_names():
    """Ids decide the order and numbers of names, so a redrawn house looks different and is the same problem."""
    _, game, _ = make_game("train", 5, 3, "medium", "pick_two_obj_and_place")
    built = build_game(game)
    others = [{**game, "pddl_problem": renamed(game["pddl_problem"], seed)} for seed in range(4)]
    assert any(build_game(other).inside != built.inside for other in others)
    assert {world_hash(build_game(other)) for other in others} == {world_hash(built)}
    assert len({content_hash(other) for other in [game, *others]}) == 5
    spaced = {**game, "pddl_problem": game["pddl_problem"].replace("\n", "\n  "), "walkthrough": []}
    assert content_hash(spaced) == content_hash(game)


def test_a_problem_with_one_thing_elsewhere_is_another():
    _, game, _ = make_game("train", 0, 3, "easy", "pick_and_place_simple")
    inside = re.findall(r"\(inReceptacle (\S+) (\S+)\)", game["pddl_problem"])
    thing, place = inside[0]
    elsewhere = next(r for r in re.findall(r"\(receptacleType (\S+) ", game["pddl_problem"]) if r != place)
    moved = game["pddl_problem"].replace(f"(inReceptacle {thing} {place})", f"(inReceptacle {thing} {elsewhere})")
    assert moved != game["pddl_problem"]
    assert world_hash(build_game({**game, "pddl_problem": moved})) != world_hash(build_game(game))


def test_a_game_of_both_wordings_is_one_problem(upstream_games):
    """The data set before and after December 2024: other texts and rules, the same houses."""
    pairs = [(game, Path(str(game).replace("/current/", "/earlier/"))) for game in upstream_games]
    pairs = [(fingerprint(str(now)), fingerprint(str(before))) for now, before in pairs if before.is_file()]
    assert len(pairs) >= 6
    for now, before in pairs:
        assert (now["wording"], before["wording"]) == ("move", "put")
        assert (now["name"], now["world"]) == (before["name"], before["world"])
        assert now["content"] != before["content"]
    assert len({now["world"] for now, _ in pairs}) == len(pairs)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder laid out as ALFWorld's."""
    folder = tmp_path_factory.mktemp("alfworld")
    for split, count in (("train", 6), ("valid_seen", 3), ("valid_unseen", 3)):
        generate_games(folder / "json_2.1.1", split=split, count=count, seed=5)
    return folder


@pytest.fixture(scope="module")
def written(data, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("panel") / "alfworld.json"
    assert cli.main(["panel", "alfworld", "--data", str(data), "--out", str(file), "--seeds", "0", "1"]) == 0
    return file


def test_a_panel_is_the_same_wherever_it_is_written(data, written, tmp_path, capsys):
    elsewhere = tmp_path / "moved"
    shutil.copytree(data, elsewhere)
    command = ["panel", "alfworld", "--data", str(elsewhere), "--seeds", "0", "1", "--out"]
    assert cli.main([*command, str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_bytes() == written.read_bytes()
    out = plain(capsys.readouterr().out)
    assert "valid_seen 3, valid_unseen 3; 50 turns; seeds 0, 1" in out
    assert "wording: move 6" in out
    assert "disjoint from the training split's 6 tasks" in out
    assert cli.main(["panel", "alfworld", "--data", str(data), "--games", "2", "--out", str(written)]) == 2
    assert "holds another panel; name a new file" in plain(capsys.readouterr().err)


def test_a_check_finds_what_is_missing_changed_or_trained_on(data, written, tmp_path, capsys):
    assert cli.main(["panel", "alfworld", "--check", str(written), "--data", str(data)]) == 0
    assert "all tasks are here, unchanged; disjoint from" in plain(capsys.readouterr().out)
    changed = tmp_path / "changed"
    shutil.copytree(data, changed)
    games = sorted((changed / "json_2.1.1").glob("valid_seen/*/*/game.tw-pddl"))
    games[0].unlink()
    text = games[1].read_text(encoding="utf-8")
    games[1].write_text(text.replace("Your task is to: put", "Your task is to: place", 1), encoding="utf-8")
    leaked = changed / "json_2.1.1" / "train" / games[2].parts[-3] / "trial_leak"
    shutil.copytree(games[2].parent, leaked)
    assert cli.main(["panel", "alfworld", "--check", str(written), "--data", str(changed)]) == 1
    out = plain(capsys.readouterr().out)
    assert "/".join(games[0].parts[-4:-1]) + " is not here" in out
    assert "/".join(games[2].parts[-4:-1]) + " is a training task, too" in out
    if text != games[1].read_text(encoding="utf-8"):
        assert "its content differs" in out
    panel = read_panel(written)
    settings = with_panel(panel, settings_for(PanelConfig("alfworld", data=changed), tmp_path), tmp_path)
    with pytest.raises(UserError, match="of its 6 tasks cannot be played here; the first"):
        panel_games(panel, settings, Console(quiet=True))
    # A new panel leaves the leaked game out.
    assert cli.main(["panel", "alfworld", "--data", str(changed), "--out", str(tmp_path / "new.json")]) == 0
    assert "left out: 1 tasks that are training tasks, too" in plain(capsys.readouterr().out)
    assert leaked.parts[-2] not in {Path(task["name"]).parts[1] for task in read_panel(tmp_path / "new.json").tasks}


def test_a_file_that_was_changed_is_refused(written, tmp_path):
    values = json.loads(written.read_text(encoding="utf-8"))
    for name, value in (("turns", 30), ("seeds", [3]), ("tasks", values["tasks"][1:])):
        (tmp_path / "changed.json").write_text(json.dumps({**values, name: value}))
        with pytest.raises(UserError, match="was changed after it was written"):
            read_panel(tmp_path / "changed.json")
    for text, message in (("{", "is no panel"), ("[]", "is no panel"), ('{"format": 9}', "of format 9, need 1")):
        (tmp_path / "changed.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_panel(tmp_path / "changed.json")


def test_a_shops_panel_holds_price_limits_and_notices_another_price(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROXMO_CACHE", str(tmp_path / "cache"))
    shop = generate_catalogue(tmp_path / "shop", count=60, seed=2)
    file = tmp_path / "shop.json"
    assert cli.main(["panel", "shop", "--data", str(shop), "--out", str(file)]) == 0
    assert "price limits: " in capsys.readouterr().out
    panel = read_panel(file)
    assert panel.turns == 15
    limited = [task for task in panel.tasks if task["price_limit"] is not None]
    assert limited
    assert all(f"lower than {task['price_limit']:.2f} dollars" in task["instruction"] for task in limited)
    assert cli.main(["panel", "shop", "--check", str(file)]) == 2
    assert "is a panel of a data set; name it with --data" in plain(capsys.readouterr().err)
    products = json.loads((shop / FILES[0]).read_text(encoding="utf-8"))
    priced = next(product for product in products if product["pricing"].count("$") == 1)
    priced["pricing"] = "$1.00"
    (shop / FILES[0]).write_text(json.dumps(products), encoding="utf-8")
    assert cli.main(["panel", "shop", "--check", str(file), "--data", str(shop)]) == 1
    assert f"{len(panel.tasks)} faults" in capsys.readouterr().out


def result(won: list[list[bool]], **changes) -> dict:
    """A result file's content of tasks in two splits."""
    episodes = [
        {"name": f"task {i}", "content": f"c{i}", "split": "seen" if i % 2 else "unseen", "won": row,
         "finished": [True] * len(row), "score": [float(x) for x in row]}
        for i, row in enumerate(won)
    ]  # fmt: skip
    panel = {"hash": "a" * 64, "seeds": list(range(len(won[0])))}
    return {"run": "runs/x", "iteration": 1, "temperature": 0.4, "splits": {"seen": {}, "unseen": {}}, "panel": panel,
            "episodes": episodes, **changes}  # fmt: skip


def test_pairs_are_compared_by_mcnemars_exact_test():
    """9 tasks gained and 1 lost of 40: p is twice the tail of Binomial(10, 1/2)."""
    one = [[i < 10] for i in range(40)]
    other = [[(i < 10 and i != 3) or 10 <= i < 19] for i in range(40)]
    found = paired.compare(result(one), result(other))["All"]
    assert (found["better"], found["worse"], found["pairs"]) == (9, 1, 40)
    assert found["p"] == pytest.approx(2 * (comb(10, 0) + comb(10, 1)) / 2**10)
    assert found["difference"] == pytest.approx(8 / 40)
    assert found["low"] < 8 / 40 < found["high"]
    assert "is significantly better than" in paired.verdict(["a", "b"], {"All": found})
    assert paired.mcnemar(0, 0) == 1.0
    assert paired.mcnemar(3, 3) == 1.0
    same = paired.compare(result(one), result(one))["All"]
    assert (same["difference"], same["p"]) == (0.0, 1.0)
    assert same["low"] == -same["high"] == pytest.approx(-1.96 / 42)  # no task differs, which does not make it certain


def test_the_interval_covers_the_difference_and_the_test_keeps_its_level():
    """600 comparisons of 40 tasks: 95% intervals that hold the truth, and at most 5% of equal agents told apart."""
    rng = np.random.default_rng(1)
    held, rejected = 0, 0
    for _ in range(600):
        easy = rng.random(40)
        one, equal, better = (rng.random(40) < easy, rng.random(40) < easy, rng.random(40) < easy**0.5)
        low, high = paired.agresti_min(int((better & ~one).sum()), int((one & ~better).sum()), 40)
        held += low <= float((easy**0.5 - easy).mean()) <= high
        rejected += paired.mcnemar(int((equal & ~one).sum()), int((one & ~equal).sum())) < 0.05
    assert held / 600 > 0.93
    assert rejected / 600 < 0.06


def test_attempts_at_a_task_are_one_pair():
    """Ten copies of each attempt are no more evidence than one of them."""
    rng = np.random.default_rng(0)
    one, other = rng.random((30, 1)) < 0.4, rng.random((30, 1)) < 0.6
    once = paired.pair(one.astype(float), other.astype(float), np.ones(30, bool))
    often = paired.pair(one.repeat(10, 1).astype(float), other.repeat(10, 1).astype(float), np.ones(30, bool))
    assert often.difference == pytest.approx(once.difference)
    assert (often.low, often.high) == pytest.approx((once.low, once.high), abs=0.05)
    assert often.p == pytest.approx(once.p, abs=0.03)


def test_lost_episodes_leave_their_pair_out():
    one, other = result([[True]] * 6), result([[False]] * 6)
    other["episodes"][2]["finished"] = [False]
    found = paired.compare(one, other)
    assert (found["All"]["pairs"], found["All"]["lost"]) == (5, 1)
    assert found["seen"]["lost"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"panel": {"hash": "b" * 64, "seeds": [0]}}, "runs/x is of panel aaaaaaaaaaaa, runs/x of panel bbbbbbbbbbbb"),
        ({"temperature": 0.0}, "is of temperature 0.4, runs/x of 0; need the same"),
        ({"panel": None}, "was not played on a panel"),
        ({"episodes": [{"won": [1]}]}, "is damaged"),
        ({"splits": None}, "is no result of proxmo eval"),
    ],
)
def test_a_mixed_comparison_is_refused(tmp_path, capsys, changes, message):
    one, other = result([[True], [False]]), result([[True], [True]], **changes)
    other = {name: value for name, value in other.items() if value is not None}
    for name, values in (("one", one), ("other", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    assert cli.main(["eval", str(tmp_path / "other.json"), "--against", str(tmp_path / "one.json")]) == 2
    assert message in plain(capsys.readouterr().err)


def test_two_results_are_compared_without_playing(tmp_path, capsys):
    for name, won in (("one", [[True], [False]]), ("other", [[True], [True]])):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(won, run=name)))
    assert cli.main(["eval", str(tmp_path / "other.json"), "--against", str(tmp_path / "one.json")]) == 0
    out = plain(capsys.readouterr().out)
    assert "+50.0" in out
    assert "other (1) and one (1) are not significantly different (p 1)." in out


def test_a_result_is_not_compared_with_itself(written, tmp_path, capsys):
    options = ["eval", str(tmp_path), "--panel", str(written), "--against", str(tmp_path / "eval.json")]
    assert cli.main(options) == 2
    assert "eval.json is what this evaluation writes; name another file with --out" in plain(capsys.readouterr().err)


class Recording(ScriptedPool):
    """Writes down what was said in each game."""

    def __init__(self, script):
        super().__init__(script)
        self.said: dict[str, list[str]] = {}

    def reset(self, games):
        self.games = dict(games)
        return super().reset(games)

    def send_step(self, commands):
        for slot, command in commands:
            self.said.setdefault(self.games[slot], []).append(command)
        super().send_step(commands)


def play_in_batches(folder, batch, script):
    """Five games by a policy that has learned nothing."""
    player, pool = small_player(folder), Recording(script)
    with jax.set_mesh(player.mesh):
        params = replicate(player.mesh, init_params(player.config, jax.random.key(0)))
        config, games = Config(run=folder, batch=batch, temperature=1.0), list("abcde")
        won, finished, _ = evaluate.play(config, (0,), player, params, pool, games, "seen", 0, Console(quiet=True))
    return won, finished, pool.said


def test_batches_do_not_change_what_is_played(tmp_path):
    script = lambda slot, attempt, turn: say(f"turn {turn}")  # noqa: E731
    _, _, one = play_in_batches(tmp_path, 1, script)
    _, _, other = play_in_batches(tmp_path, 3, script)
    assert one == other
    assert len({tuple(said) for said in one.values()}) > 1


def test_a_batch_that_cannot_be_played_does_not_end_the_evaluation(tmp_path):
    # The third batch has one game, which is lost in every attempt.
    script = lambda slot, attempt, turn: None if attempt > 1 else say("x", done=turn > 0, won=turn > 0)  # noqa: E731
    won, finished, _ = play_in_batches(tmp_path, 2, script)
    assert won.tolist() == finished.tolist() == [[True, True, True, True, False]]
    with pytest.raises(NothingPlayed, match="lost by the script"):
        play_in_batches(tmp_path, 2, lambda *_: None)
