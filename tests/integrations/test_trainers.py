"""Rollouts of TRL and verl as steps: samples in their formats, written by the code that writes them there (TRL 1.16,
verl 0.9.1), and batches with the fields of verl and verl-agent."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import proxmo_jax as pj
from proxmo_jax.cli import main
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.steps_file import read_steps, steps_advantages
from proxmo_jax.integrations import trl, verl

CASES = Path(__file__).parents[1] / "cases" / "trainers"


def converted(trainer, name, folder, *options):
    target = folder / "steps.jsonl"
    assert main(["steps", trainer, str(CASES / name), str(target), *options]) == 0
    return read_steps(target)


def turns(steps, trajectory):
    """(text, next text, reward, valid) of each turn of a trajectory."""
    names = ("texts", "next_texts", "reward", "action_valid")
    rows = zip(*(steps[name] for name in ("trajectory", *names)), strict=True)
    return [row[1:] for row in rows if row[0] == trajectory]


def test_trl_conversations_have_a_turn_for_each_response(tmp_path, capsys):
    steps = converted("trl", "trl_tools.jsonl", tmp_path)
    assert "the reward is found + short; 1 trajectories without a reward or a turn left out" in capsys.readouterr().out
    assert turns(steps, 0) == [
        ("Find the lamp.", "You see a lamp.", 0.0, True), ("You see a lamp.", "", 1.5, True)
    ]  # fmt: skip
    assert [turn[3] for turn in turns(steps, 1)] == [False, True, True]  # its first tool call failed
    assert sum(turn[2] for turn in turns(steps, 1)) == 1.25
    assert turns(steps, 2) == [("Find the lamp.", "", 0.0, True)]
    episodes = dict(zip(steps["trajectory"], zip(steps["group"], steps["success"], strict=True), strict=True))
    assert episodes == {0: (0, True), 1: (0, True), 2: (0, False), 3: (1, True), 4: (1, False)}
    advantage = steps_advantages(steps, pj.proxmo())["advantage"]
    assert np.isfinite(advantage).all()
    assert len(set(advantage.round(6))) > 4  # turns of an episode differ


def test_trl_parquet_is_the_same(tmp_path):
    pytest.importorskip("pyarrow")
    assert converted("trl", "trl_tools.parquet", tmp_path) == converted("trl", "trl_tools.jsonl", tmp_path)


def test_trl_parquet_without_pyarrow_is_one_sentence(tmp_path, capsys):
    if importlib.util.find_spec("pyarrow"):
        pytest.skip("pyarrow is here")
    assert main(["steps", "trl", str(CASES / "trl_tools.parquet"), str(tmp_path / "steps.jsonl")]) == 2
    assert "Parquet needs pyarrow (pip install 'proxmo-jax[trl]')" in capsys.readouterr().err


def test_trl_texts_are_one_turn_and_their_advantages_are_grpo(tmp_path):
    steps = converted("trl", "trl_text.jsonl", tmp_path)
    assert steps["texts"] == ["2+2=", "2+2=", "3+3=", "3+3="]
    advantage = steps_advantages(steps, pj.grpo())["advantage"]
    logged = [json.loads(line)["advantage"] for line in (CASES / "trl_text.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(advantage, logged, atol=0.01)  # TRL adds 1e-4 to the deviation


def test_trl_weights(tmp_path):
    steps = converted("trl", "trl_tools.jsonl", tmp_path, "--rewards", "short", "found", "--weights", "2", "0")
    assert [sum(turn[2] for turn in turns(steps, i)) for i in range(5)] == [1.0, 0.5, 0.0, 1.0, 0.0]


def test_verl_lines_of_one_prompt_are_a_group(tmp_path):
    steps = converted("verl", "verl_classic.jsonl", tmp_path)
    assert steps["group"] == [0] * 4 + [1] * 4
    assert steps["reward"] == [1.0, 0, 0, 1, 0, 0, 0, 1]
    assert steps["success"] == [score == 1 for score in steps["reward"]]
    assert set(steps["step"]) == {0}


def test_verl_outputs_of_one_session_are_its_turns(tmp_path):
    steps = converted("verl", "verl_sessions.jsonl", tmp_path)
    assert steps["trajectory"] == [0, 0, 1, 1, 1, 2]
    assert set(steps["group"]) == {0}
    assert steps["reward"] == [0, 1.0, 0, 0, 0, 0]  # verl repeats the score on every output
    assert turns(steps, 0)[0][1] == turns(steps, 0)[1][0] == "user\nYou are in room 1.\nassistant\n"


WORDS = "<pad> find the lamp go attic you see a . hall nothing take".split()


def decode(ids):
    return " ".join(WORDS[i] for i in ids)


def test_verl_batch_has_a_turn_for_each_run_of_its_response_mask():
    """Prompts padded on the left, responses on the right, as in verl; a tool has answered the first two."""
    ids = lambda text: [WORDS.index(word) for word in text.split()]  # noqa: E731
    prompt = [0, *ids("find the lamp")]
    responses = ["go attic | you see a lamp | take lamp", "go hall | you see nothing |", "take"]
    batch = {"uid": np.array(["q", "q", "q"]), "prompts": np.array([prompt] * 3)}
    rows = np.zeros((4, 3, 10), int)
    for row, text in enumerate(responses):
        at = 0
        for part, said in enumerate(text.split("|")):
            tokens = ids(said)
            rows[0, row, at : at + len(tokens)] = tokens
            rows[1, row, at : at + len(tokens)] = part % 2 == 0
            rows[2, row, at : at + len(tokens)] = 1
            at += len(tokens)
        rows[3, row, at - 1] = row == 0
    attention = np.concatenate([np.array([[0, 1, 1, 1]] * 3), rows[2]], axis=1)
    batch |= {"responses": rows[0], "response_mask": rows[1], "attention_mask": attention, "rm_scores": rows[3] * 1.0}
    steps = verl.steps_of_batch(batch, decode)
    assert turns(steps, 0) == [
        ("find the lamp", "you see a lamp", 0.0, True), ("you see a lamp", "", 1.0, True)
    ]  # fmt: skip
    assert turns(steps, 1) == [("find the lamp", "you see nothing", 0.0, True)]
    assert turns(steps, 2) == [("find the lamp", "", 0.0, True)]
    assert steps["success"] == [True, True, False, False]
    silent = {**batch, "response_mask": rows[1] * (np.arange(3) < 2)[:, None]}  # nothing of the third is its own
    assert len(verl.steps_of_batch(silent, decode)["texts"]) == 3
    with pytest.raises(UserError, match="attention_mask is missing"):
        verl.steps_of_batch({name: x for name, x in batch.items() if name != "attention_mask"}, decode)


def test_verl_agent_batch_has_a_row_for_each_turn():
    batch = {
        "uid": np.array(["g"] * 5, object), "traj_uid": np.array(["a", "b", "a", "b", "b"], object),
        "anchor_obs": np.array(["hall", "hall", "attic", "cellar", "attic"], object),
        "rewards": np.array([0.0, 0.0, 10.0, 0.0, 0.0]), "is_action_valid": np.array([True, False, True, True, True]),
        "active_masks": np.array([True, True, True, True, False]),
    }  # fmt: skip
    steps = verl.steps_of_batch(batch, decode, success_threshold=10)
    assert turns(steps, 0) == [("hall", "attic", 0.0, True), ("attic", "", 10.0, True)]
    assert turns(steps, 1) == [("hall", "cellar", 0.0, False), ("cellar", "", 0.0, True)]
    assert steps["success"] == [True, True, False, False]


@pytest.mark.parametrize(
    ("trainer", "lines", "message"),
    [
        ("verl", ['{"prompt": "a"}'], "input: row 0 has None, need verl's input, score and step"),
        ("verl", ['{"input": "a", "score": "b", "step": 1}'], "score: row 0 has 'b'"),
        ("verl", ["[1]"], "line 1 is list, need an object"),
        ("verl", [], "holds no step"),
        ("trl", ['{"step": 1, "prompt": "a", "completion": "b"}'], "rewards: no column of numbers"),
        ("trl", ['{"prompt": "a", "reward": 1}'], "step: row 0 has no such column"),
        ("trl", ['{"step": 1, "prompt": "a", "completion": 3, "r": 1}'], "completion: row 0 has 3, need a string or"),
        (
            "trl",
            ['{"step": 1, "prompt": ["a"], "completion": "b", "r": 1}'],
            "prompt: row 0 has ['a'], need a string or",
        ),
        ("trl", ['{"step": 1, "prompt": "a", "completion": "b", "r": 1%s}' % ("0" * 400)], "no column of numbers"),
        ("trl", ['{"step": 1, "prompt": "a", "completion": "b", "r": NaN}'], "r: no row has a reward"),
    ],
)
def test_bad_files_are_one_sentence(trainer, lines, message, tmp_path, capsys):
    source, target = tmp_path / "rollouts.jsonl", tmp_path / "steps.jsonl"
    source.write_text("\n".join(lines))
    assert main(["steps", trainer, str(source), str(target)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(source) in error
    assert "Traceback" not in error
    assert not target.exists()


def test_a_file_that_is_no_parquet(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    shutil.copy(CASES / "trl_text.jsonl", tmp_path / "broken.parquet")
    assert main(["steps", "trl", str(tmp_path / "broken.parquet"), str(tmp_path / "steps.jsonl")]) == 2
    assert "not a readable Parquet file" in capsys.readouterr().err


def test_rewards_that_are_none_are_left_out():
    rows = [{"step": 1, "prompt": "p", "completion": "c", "a": None, "b": value} for value in (None, 2.0, float("nan"))]
    steps = trl.steps_of_completions(rows, ("a", "b"))
    assert steps["reward"] == [2.0]
