"""The main job, small: trained, interrupted, resumed and refused, in processes of its own."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxmo_jax import cli
from proxmo_jax.advantages import dr_grpo
from proxmo_jax.report import Metrics, learning_curve, read_metrics, wilson
from proxmo_jax.steps_file import read_steps, steps_advantages

ROOT = Path(__file__).parents[1]
SMALL = (
    "--train-games 24 --eval-games 8 --groups 2 --members 4 --max-turns 4 --warm-start-steps 6 --rows-per-batch 8"
    " --hidden-size 32 --layers 1 --workers 1 --eval-every 2 --save-every 2"
).split()


def proxmo(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "proxmo_jax", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False, **kwargs
    )


def here(*arguments: str) -> subprocess.CompletedProcess:
    """The same in this process, for what is refused: a process takes seconds to import."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(list(arguments))
        except SystemExit as error:  # options that the parser does not know
            code = error.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    done = proxmo("train", "--out", str(out), "--iterations", "3", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout
    return out


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(run):
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert "eval/success_rate" in rows[0]
    assert "eval/success_rate" in rows[3]
    for key in ("train/success_rate", "time/rollout", "time/estimator", "time/update", "train/valid_action_rate"):
        assert key in rows[1]
    for name in ("learning_curve.png", "episodes_before.txt", "episodes_after.txt", "tokenizer/tokenizer.json"):
        assert (run / name).stat().st_size > 0
    assert (run / "episodes_before.txt").read_text().count("===") == 3
    steps = read_steps(run / "rollout.npz")
    assert len(steps["texts"]) == len(steps_advantages(steps, dr_grpo())["advantage"]) >= 8


@pytest.mark.slow
def test_evaluation_prints_the_papers_table(run, tmp_path):
    """Counts by task type and split, the newest checkpoint by default, written as JSON."""
    done = proxmo("eval", str(run), "--greedy", "--out", str(tmp_path / "eval.json"))
    assert done.returncode == 0, done.stderr
    for word in ("Pick2", "valid_seen", "valid_unseen", "greedy", "iteration 3"):
        assert word in done.stdout
    answer = json.loads((tmp_path / "eval.json").read_text())
    assert answer["temperature"] == 0
    assert answer["iteration"] == 3
    for cells in answer["splits"].values():
        assert sum(cells[name]["games"] for name in ("Pick", "Look", "Clean", "Heat", "Cool", "Pick2")) == 4
        assert cells["All"]["games"] == 4
        assert cells["All"]["low"] <= cells["All"]["rate"] <= cells["All"]["high"]
    again = proxmo("eval", str(run), "--greedy", "--out", str(tmp_path / "again.json"))
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again.json").read_text())["splits"] == answer["splits"]  # greedy is repeatable
    warm = proxmo("eval", str(run), "--checkpoint", "0", "--games", "3", "--batch", "2", "--splits", "valid_seen")
    assert "iteration 0" in warm.stdout
    assert list(json.loads((run / "eval.json").read_text())["splits"]) == ["valid_seen"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "7"], "has none of iteration 7; it has 0, 2, 3"),
        (["--splits", "test"], "--splits must be of train, valid_seen, valid_unseen; got test"),
        (["--temperature", "0"], "--greedy takes the likeliest token"),
        (["--env", "alfworld", "--data", "/nowhere"], "--data: /nowhere holds none of the folders train"),
        (["--engine", "warp"], "--engine must be one of fast, textworld, textworld-stock"),
    ],
)
def test_evaluation_refuses(run, options, message):
    command = proxmo if "--checkpoint" in options else here  # a run of one device; there are eight here
    refused = command("eval", str(run), *options)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_alfworlds_data_are_trained_on(run, tmp_path):
    """The small run's games, laid out as ALFWorld's are, and history prompts."""
    data = tmp_path / "data"
    shutil.copytree(run / "games", data / "json_2.1.1")
    next((data / "json_2.1.1" / "train").glob("*/*/game.tw-pddl")).unlink()
    out = tmp_path / "out"
    options = "--env alfworld --prompt history --history 1 --max-prompt-tokens 300 --max-response-tokens 16".split()
    done = proxmo("train", "--out", str(out), "--data", str(data), "--iterations", "1", *SMALL, *options,
                  "--row-length", "320")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train 23, valid_seen 4, valid_unseen 4" in done.stdout
    assert "on 23 ALFWorld games" in done.stdout
    assert "'move X to Y', as since December 2024: 31 games" in done.stdout
    assert not (out / "games").exists()


@pytest.mark.slow
def test_a_folder_with_another_run_is_refused_and_left_alone(run):
    before = (run / "metrics.jsonl").read_bytes()
    refused = proxmo("train", "--out", str(run), *SMALL)
    assert refused.returncode == 2
    assert "holds another run" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    out = tmp_path / "run"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "proxmo_jax", "train", "--out", str(out), "--iterations", "400", *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 240
    while len(read_metrics(out / "metrics.jsonl")) < 4:
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    words = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0
    assert "--resume" in words
    stopped = read_metrics(out / "metrics.jsonl")[-1]["iteration"]
    assert stopped < 400

    stored = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**stored, "iterations": stopped + 2}))
    resumed = proxmo("train", "--out", str(out), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(stopped + 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "unknown command 'fly'"),
        (["train", "--members", "1"], "--members must be at least 2, got 1"),
        (["train", "--train-games", "0"], "--train-games must be at least 1, got 0"),
        (["train", "--method", "sarsa"], "--method must be one of grpo"),
        (["train", "--config", "absent.toml"], "absent.toml cannot be read"),
        (["train", "--resume", "--out", "absent"], "absent holds no run"),
        (["train", "--max-prompt-tokens", "16", "--train-games", "6", "--eval-games", "6"], "need at most 16"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path):
    if arguments[0] == "train" and "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "run")]
    refused = here(*arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert len([line for line in refused.stderr.splitlines() if line.startswith("proxmo:")]) == 1


def test_unknown_option_is_refused(tmp_path):
    refused = proxmo("train", "--colour", "blue", "--out", str(tmp_path / "run"))
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("groups = ", "is not TOML"), ("colour = 1", "sets colour"), ('groups = "many"', "groups must be int")],
)
def test_bad_config_files(tmp_path, text, message):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    refused = here("train", "--config", str(path), "--out", str(tmp_path / "run"))
    assert refused.returncode == 2
    assert message in refused.stderr


def test_metrics_survive_a_line_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iteration": 1}\n{"iterat')
    assert len(read_metrics(path)) == 2
    Metrics(path, keep_until=0).write({"iteration": 1, "x": 2})
    assert read_metrics(path) == [{"iteration": 0}, {"iteration": 1, "x": 2}]


def test_wilson_interval():
    low, high = wilson(50, 100)
    assert low == pytest.approx(0.404, abs=1e-3)
    assert high == pytest.approx(0.596, abs=1e-3)
    assert wilson(0, 10)[0] == 0.0


def test_learning_curve_is_a_picture(tmp_path):
    rows = [
        {"iteration": i, "train/success_rate": i / 9, "eval/success_rate": i / 10, "eval/games": 64} for i in range(9)
    ]
    learning_curve(tmp_path / "curve.png", [("proxmo", rows)], "title")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_shop_is_trained_in_and_evaluated(tmp_path):
    """Its own recipe, scores beside success, and only dense rewards where they are asked for."""
    out = tmp_path / "shop"
    done = proxmo("train", "--env", "shop", "--out", str(out), "--iterations", "2", "--reward", "score", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "mean score" in done.stdout
    stored = json.loads((out / "config.json").read_text())
    assert (stored["max_response_tokens"], stored["train_games"]) == (20, 24)  # the recipe's, the command line's
    rows = read_metrics(out / "metrics.jsonl")
    assert 0 <= rows[0]["eval/score"] <= 1
    assert rows[1]["train/reward"] == pytest.approx(10 * rows[1]["train/score"])
    done = proxmo("eval", str(out), "--splits", "valid", "test", "--games", "4")
    assert done.returncode == 0, done.stderr
    assert "Score" in done.stdout
    assert "Succ." in done.stdout
    cells = json.loads((out / "eval.json").read_text())["splits"]["test"]
    assert cells["All"]["games"] == cells["Score"]["games"] == 4
    assert here("eval", str(out), "--splits", "valid_seen").stderr == (
        "proxmo: --splits must be of train, valid, test; got valid_seen\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--env", "webshop"], "--env webshop needs --webshop DIR, a checkout of WebShop"),
        (["--env", "webshop", "--webshop", "x"], "--env webshop needs a --model"),
        (["--env", "shop", "--data", "tests/golden"], "tests/golden: holds no items_shuffle*.json"),
        (["--env", "shop", "--goals", "few"], "--goals must be one of human, synthetic; got 'few'"),
        (["--env", "shop", "--reward", "joy"], "--reward must be one of success, score; got 'joy'"),
    ],
)
def test_a_shop_that_cannot_be_is_refused(tmp_path, capsys, options, message):
    assert cli.main(["train", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
