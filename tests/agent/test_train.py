"""The main job, small: trained, evaluated and refused, in processes of its own; test_saves.py interrupts it."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nested import config_with, plain
from orbax.checkpoint._src.serialization import ocdbt_utils
from rich.console import Console
from rich.table import Table
from test_profile import traced

from proxmo_jax import cli
from proxmo_jax.agent import kept_rollouts
from proxmo_jax.agent.loop import Loop, steps_of
from proxmo_jax.agent.panel import read_panel
from proxmo_jax.agent.report import (
    Metrics,
    ProgressLines,
    learning_curve,
    progress_bar,
    read_metrics,
    terminal,
    wilson,
)
from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.agent.train import goes_on_from, page_at_the_end
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.presets import dr_grpo
from proxmo_jax.estimator.steps_file import read_steps, steps_advantages, write_steps
from proxmo_jax.policy.sharding import make_mesh
from proxmo_jax.policy.tokenizer import build_word_tokenizer, load_tokenizer
from proxmo_jax.training.buffers import Buffer
from proxmo_jax.training.checkpoint import Checkpoints, load_params, save_params

ROOT = Path(__file__).parents[2]
SMALL = (
    "--env.train-games 24 --env.eval-games 8 --rollout.num-groups 2 --rollout.group-size 4 --rollout.max-turns 4"
    " --warm-start.steps 6 --optimizer.rows-per-batch 8"
    " --model.hidden-size 32 --model.layers 1 --env.workers 1 --output.eval-every 2 --output.save-every 2"
    " --output.no-page"
).split()


ONE_DEVICE = {"JAX_NUM_CPU_DEVICES": "1"}  # whatever the user's XLA_FLAGS say


def proxmo(*arguments: str, environment: dict[str, str] | None = None, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, **ONE_DEVICE, **(environment or {})}
    command = [sys.executable, "-m", "proxmo_jax", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
        check=False,
        **kwargs,
    )


def here(*arguments: str) -> subprocess.CompletedProcess:
    """The same in this process, for what is refused: a process takes seconds to import."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(arguments))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    done = proxmo("train", "--out", str(out), "--iterations", "3", "--profile", "2", *SMALL, "--output.page")
    assert done.returncode == 0, done.stderr
    assert f"{out}/page.html shows its turns" in done.stdout
    assert "--resume" in done.stdout
    assert f"perfetto.dev: {out}/profile/plugins" in done.stdout
    return out


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(run):
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert "eval/success_rate" in rows[0]
    assert "eval/success_rate" in rows[3]
    for key in ("train/success_rate", "time/rollout", "time/estimator", "time/update", "train/valid_action_rate",
                "train/overlong_rate", "perf/throughput", "perf/update_flops_per_second"):  # fmt: skip
        assert key in rows[1]
    (trace,) = (run / "profile").rglob("perfetto_trace.json.gz")
    assert traced(trace) >= {"rollout", "estimator", "update"}
    for name in ("learning_curve.png", "episodes_before.txt", "episodes_after.txt", "tokenizer/tokenizer.json"):
        assert (run / name).stat().st_size > 0
    reported = b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    for name in (b"critic/score/mean", b"timing_s/gen", b"episodes_before", b"episodes_after", b"learning_curve"):
        assert name in reported
    assert (run / "episodes_before.txt").read_text(encoding="utf-8").count("===") == 3
    steps = read_steps(run / "rollout.npz")
    assert len(steps["texts"]) == len(steps_advantages(steps, dr_grpo())["advantage"]) >= 8
    assert list(kept_rollouts.kept(run)) == [1, 3]
    last = read_steps(kept_rollouts.kept(run)[3])
    assert last["texts"] == steps["texts"]
    for task, prompt, response, command in zip(*(last[n] for n in "task prompt response command".split()), strict=True):
        assert task.split()[0] in prompt
        assert prompt.startswith("task")
        assert "".join(command.split()[-1:]) in response.lower()  # of a response without tags, the last characters
    assert (run / "page.html").stat().st_size > 20_000


def test_a_page_that_cannot_be_made_does_not_end_a_run(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "The page could not be made (UserError: " in page_at_the_end(tmp_path, terminal())


@pytest.mark.slow
def test_evaluation_prints_the_papers_table(run, tmp_path):
    """Counts by task type and split, the newest checkpoint by default, written as JSON."""
    done = proxmo("eval", str(run), "--greedy", "--out", str(tmp_path / "eval.json"))
    assert done.returncode == 0, done.stderr
    for word in ("Pick2", "valid_seen", "valid_unseen", "greedy", "iteration 3"):
        assert word in done.stdout
    answer = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert answer["temperature"] == 0
    assert answer["iteration"] == 3
    for cells in answer["splits"].values():
        assert sum(cells[name]["games"] for name in ("Pick", "Look", "Clean", "Heat", "Cool", "Pick2")) == 4
        assert cells["All"]["games"] == 4
        assert cells["All"]["low"] <= cells["All"]["rate"] <= cells["All"]["high"]
    warm = proxmo("eval", str(run), "--checkpoint", "0", "--games", "3", "--batch", "2", "--splits", "valid_seen")
    assert "iteration 0" in plain(warm.stdout)
    assert list(json.loads((run / "eval.json").read_text(encoding="utf-8"))["splits"]) == ["valid_seen"]


@pytest.mark.slow
def test_a_panel_is_played_task_by_task(run, tmp_path):
    """Every task once with each seed, the outcomes in the panel's order; compared with a result of the same panel."""
    panel, first, second = (tmp_path / name for name in ("panel.json", "first.json", "second.json"))
    options = "--games 2 --train-games 24 --turns 4 --seeds 0 1".split()
    assert here("panel", "household", "--out", str(panel), *options).returncode == 0
    done = proxmo("eval", str(run), "--panel", str(panel), "--out", str(first))
    assert done.returncode == 0, done.stderr
    answer = json.loads(first.read_text(encoding="utf-8"))
    assert answer["panel"]["hash"] == json.loads(panel.read_text(encoding="utf-8"))["hash"]
    names = [task["name"] for task in read_panel(panel).tasks]
    assert [episode["name"] for episode in answer["episodes"]] == names
    assert len(names) == 4
    assert all(len(episode[name]) == 2 for episode in answer["episodes"] for name in ("won", "finished", "score"))
    for split, cells in answer["splits"].items():
        wins = sum(sum(episode["won"]) for episode in answer["episodes"] if episode["split"] == split)
        assert (cells["All"]["wins"], cells["All"]["games"]) == (wins, 4)
    for episode in answer["episodes"]:
        episode["won"] = [True, True]
    second.write_text(json.dumps(answer), encoding="utf-8")
    compared = here("eval", str(second), "--against", str(first))
    assert compared.returncode == 0, compared.stderr
    assert f"on panel {answer['panel']['hash'][:12]}" in plain(compared.stdout)
    refused = here("eval", str(run), "--panel", str(panel), "--against", str(first), "--greedy")
    assert "is of temperature 0.4" in refused.stderr
    assert (
        "--panel: fixes --games; leave that out" in here("eval", str(run), "--panel", str(panel), "--games", "3").stderr
    )


@pytest.mark.slow
def test_a_run_is_not_evaluated_on_what_it_was_trained_on(run, tmp_path):
    trained = sorted((run / "games" / "train").glob("*/*"))
    for split, folder in (("train", trained[0]), ("valid_seen", trained[1])):
        shutil.copytree(folder, tmp_path / split / folder.parts[-2] / folder.parts[-1])
    panel = tmp_path / "panel.json"
    options = ["--data", str(tmp_path), "--splits", "valid_seen"]
    written = here("panel", "alfworld", "--out", str(panel), *options)
    assert written.returncode == 0, written.stderr
    refused = here("eval", str(run), "--panel", str(panel), "--data", str(tmp_path))
    assert refused.returncode == 2
    assert "was trained on 1 of the panel's 1 tasks" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "7"], "has none of iteration 7; it has 0, 2, 3"),
        (["--splits", "test"], "--splits must be of train, valid_seen, valid_unseen; got test"),
        (["--temperature", "0"], "--greedy takes the likeliest token"),
        (["--env", "alfworld", "--data", "/nowhere"], "--data: /nowhere holds none of the folders train"),
        (["--engine", "warp"], "invalid choice 'warp' for argument '--engine'"),
    ],
)
def test_evaluation_refuses(run, options, message):
    command = proxmo if "--checkpoint" in options else here  # a run of one device; there are eight here
    refused = command("eval", str(run), *options)
    assert refused.returncode == 2
    assert message in plain(refused.stderr)
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_alfworlds_data_are_trained_on(run, tmp_path):
    """The small run's games, laid out as ALFWorld's are, and history prompts."""
    data = tmp_path / "data"
    shutil.copytree(run / "games", data / "json_2.1.1")
    next((data / "json_2.1.1" / "train").glob("*/*/game.tw-pddl")).unlink()
    out = tmp_path / "out"
    options = (
        "--env alfworld --rollout.prompt history --rollout.history 1 --rollout.max-prompt-length 300"
        " --rollout.max-response-length 16"
    ).split()
    done = proxmo("train", "--out", str(out), "--data", str(data), "--iterations", "1", *SMALL, *options,
                  "--optimizer.row-length", "320")  # fmt: skip
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "Unrecognized options: fly"),
        (["train", "--env", "zoo"], "or module:attribute of a Spec of your own; got 'zoo'"),
        (["train", "--env.level", "huge"], "invalid choice 'huge' for argument '--level/--env.level'"),
        (["train", "--rollout.group-size", "1"], "--rollout.group-size must be at least 2, got 1"),
        (["train", "--env.train-games", "0"], "--env.train-games must be at least 1, got 0"),
        (["train", "--preset", "sarsa"], "--preset must be one of grpo"),
        (["train", "--config", "absent.toml"], "absent.toml cannot be read"),
        (["train", "--resume", "--out", "absent"], "absent holds no run"),
        (
            ["train", "--rollout.max-prompt-length", "16", "--env.train-games", "6", "--env.eval-games", "6"],
            "need at most 16",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path):
    if arguments[0] == "train" and "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "run")]
    refused = here(*arguments)
    assert refused.returncode == 2
    assert message in plain(refused.stderr)
    assert "Traceback" not in refused.stderr
    assert len(re.findall("^proxmo:|For full helptext", refused.stderr, re.M)) == 1
    assert not (tmp_path / "run").exists() or "need at most 16" in message


def test_unknown_option_is_refused(tmp_path):
    refused = proxmo("train", "--colour", "blue", "--out", str(tmp_path / "run"))
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groups = ", "is not TOML"),
        ("colour = 1", "sets colour"),
        ('[rollout]\nnum_groups = "many"', "rollout.num_groups: input should be a valid integer, got 'many'"),
    ],
)
def test_bad_config_files(tmp_path, text, message):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    refused = here("train", "--config", str(path), "--out", str(tmp_path / "run"))
    assert refused.returncode == 2
    assert message in refused.stderr


ODD_NAMES = (
    "lr[1e-4]", "a*b", "a?b", "[!x]", "{a,b}", "run#1", "50%20", "a b", "~x", "-lead", "a[/b]", "[red]", ":heart:",
    "a\\b", "gs:", "ünïcode 漢字 🍎", "a'b\"c", "$HOME", "x" * 250, "two\nlines",
    "\udcff",
)  # fmt: skip


def can_be_named(name: str) -> bool:
    """Whether the locale that the tests run in can name such a file."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def test_checkpoints_live_in_folders_of_any_name(tmp_path):
    """Also beside a folder that a pattern would find."""
    like = {"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4, jnp.bfloat16)}}
    other = jax.tree.map(lambda x: x + 7, like)
    save_params(tmp_path / "axb" / "warm_start", other, {})
    for number, name in enumerate(filter(can_be_named, ODD_NAMES)):
        run, state = tmp_path / name, jax.tree.map(lambda x, number=number: x + number, like)
        save_params(run / "warm_start", state, {})
        checkpoints = Checkpoints(run / "checkpoints")
        checkpoints.save(number + 1, state, {"iteration": number + 1})
        checkpoints.close()
        checkpoints = Checkpoints(run / "checkpoints")
        restored, progress = checkpoints.restore(like, number + 1)
        checkpoints.close()
        assert progress == {"iteration": number + 1}
        build_word_tokenizer(["go to desk 1"], run / "tokenizer")
        assert load_tokenizer(run / "tokenizer").vocab_size > 6
        for found in (load_params(run / "warm_start", like), restored):
            assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), found, state)), name


def test_a_checkpoint_that_cannot_be_read_back_is_none(tmp_path, monkeypatch):
    """What Orbax leaves where it merges nothing: no `config.json` says there are parameters, no iteration is listed."""
    state = {"a": jnp.ones((2, 3))}
    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", nothing)
    with pytest.raises(UserError, match="what was written is not what was to be saved"):
        save_params(tmp_path / "warm_start", state, {})
    assert not (tmp_path / "warm_start" / "config.json").exists()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, {})
    with pytest.raises(UserError, match="what was written is not what was to be saved"):
        checkpoints.wait()
    assert checkpoints.steps() == []
    checkpoints.close()


async def nothing(*arguments, **options) -> None:
    pass


def test_a_disk_that_is_full_or_damaged_is_one_sentence(tmp_path):
    state = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)), jnp.float32)}
    save_params(tmp_path / "good", state, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=r"a checkpoint cannot be written there [(]File too large"):
            save_params(tmp_path / "full", state, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for like in ({"b": jnp.ones(2)}, {"a": jnp.ones((2, 2))}):
        with pytest.raises(UserError, match="good: holds no checkpoint that can be read as this policy's"):
            load_params(tmp_path / "good", like)
    shutil.rmtree(next((tmp_path / "good" / "params").glob("ocdbt.process_*")))
    for folder in ("good", "nowhere"):
        with pytest.raises(UserError, match=f"{folder}: holds no checkpoint that can be read as this policy's"):
            load_params(tmp_path / folder, state)


def test_bugs_keep_their_traceback_and_mistakes_do_not(monkeypatch, capsys):
    for error in (ValueError("ours"), RuntimeError("ours"), KeyError("ours"), AssertionError("ours")):
        with pytest.raises(type(error), match="ours"):
            main_that_raises(monkeypatch, error)
    for error in (UserError("theirs"), OSError("theirs"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory, theirs")):
        assert main_that_raises(monkeypatch, error) == 2
        assert "theirs" in capsys.readouterr().err


def main_that_raises(monkeypatch, error: Exception) -> int:
    def raises(module, config):
        raise error

    monkeypatch.setattr(cli, "run", raises)
    return cli.main(["train"])


def test_a_platform_that_is_not_there_is_one_sentence():
    for platform in ("cuda", "no_such"):
        done = proxmo("train", "--out", "/nowhere/x", environment={"JAX_PLATFORMS": platform})
        assert done.returncode == 2
        assert done.stderr.startswith(f"proxmo: JAX_PLATFORMS={platform}: JAX finds no such device")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["a[/b]", "[red]x[/]", "[link=x]", ":heart:", "[not closed", "\\[x]"])
def test_texts_are_printed_as_they_are(text):
    """Names, notes, cells and titles: neither markup nor emoji, and nothing breaks."""
    for kind in (terminal_of, log_of):
        console = kind()
        with progress_bar(console) as bar:
            task = bar.add_task(text, total=2, note=text)
            bar.update(task, completed=2, note=text)
        grid = Table(title=text)
        grid.add_column(text)
        grid.add_row(text)
        console.print(grid)
        console.print(text)
        assert console.file.getvalue().count(text) >= 5


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of() -> Console:
    console = terminal()
    return Console(file=Screen(), force_terminal=True, width=200, markup=console._markup, emoji=console._emoji,
                   color_system=None)  # fmt: skip


def log_of() -> Console:
    console = terminal_of()
    console.file = io.StringIO()
    console._force_terminal = False
    return console


def test_a_log_has_a_line_now_and_then():
    """One for every tenth or half a minute, at most one in three seconds, and one at the end; with the time left."""
    now, console = [0.0], Console(file=io.StringIO(), width=40)
    with ProgressLines(console, clock=lambda: now[0]) as bar:
        task = bar.add_task("training", total=1000, completed=100, note="")
        for step in range(101, 1001):
            now[0] += 1.0
            bar.update(task, completed=step, note="loss 0.5\nsecond line")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "training: 130 of 1000, 14 min left, loss 0.5, second line"
    assert lines[-1] == "training: 1000 of 1000, loss 0.5, second line"
    assert len(lines) == 30
    console.file = io.StringIO()
    with ProgressLines(console, clock=lambda: now[0]) as bar:
        task = bar.add_task("fast", total=100)
        for step in range(1, 101):
            bar.update(task, completed=step)
        counting = bar.add_task("reading products", total=None)
        bar.update(counting, completed=31)
    assert console.file.getvalue().splitlines() == ["fast: 100 of 100", "reading products: 31"]


def test_a_task_that_does_not_move_has_its_line_too():
    console = Console(file=io.StringIO())
    began = time.monotonic()
    with ProgressLines(console, clock=lambda: 40 * (time.monotonic() - began)) as bar:
        bar.add_task("compiling", total=5)
        time.sleep(1.2)
    assert console.file.getvalue().startswith("compiling: 0 of 5\n")


def test_what_a_terminal_cannot_show_ends_nothing(tmp_path):
    done = proxmo("bench", os.fsdecode("日本".encode()), environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    code = (
        "import sys; from proxmo_jax import cli; cli.run = lambda *a: print('\\u65e5\\u672c');"
        " sys.exit(cli.main(['train']))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, encoding="ascii", check=True
    )
    assert shown.stdout == "\\u65e5\\u672c\n"


def test_a_damaged_run_is_one_sentence(tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json: is damaged"):
        load_tokenizer(tmp_path)
    for text in ("{", "[]", "{}", '{"iterations": 3, "colour": 1}'):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        for arguments in (["train", "--resume", "--out", str(tmp_path)], ["eval", str(tmp_path)]):
            assert cli.main(arguments) == 2
            assert "config.json" in capsys.readouterr().err
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    assert cli.main(["train", "--out", str(file)]) == 2
    assert f"--out: {file} is a file; name a new folder" in capsys.readouterr().err


def test_eval_says_what_can_be_done_where_a_setting_is_missing(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"iterations": 1, "env": {"name": "shop"}}), encoding="utf-8")
    assert cli.main(["eval", str(tmp_path), "--env", "webshop"]) == 2
    said = capsys.readouterr().err
    assert "--env webshop needs --env.webshop DIR" in said
    assert "--webshop, --engine, --python and --workers can be given here" in said
    assert cli.main(["eval", str(tmp_path), "--env", "webshop", "--webshop", str(tmp_path)]) == 2
    assert f"--env.webshop: {tmp_path} is no checkout of WebShop" in capsys.readouterr().err


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
def test_a_shop_run_in_an_ascii_locale_and_an_odd_folder(tmp_path):
    """Its own recipe, scores beside success, dense rewards where they are asked for; then evaluated and exported.

    All is told in words, as there is no terminal; the samples of episodes hold more than ASCII.
    """
    out = tmp_path / "lr[1e-4]" / "run#1 [/b] ü"
    options = ["--env", "shop", "--iterations", "1", "--env.reward", "score", *SMALL]
    done = proxmo("train", "--out", str(out), *options, environment=ASCII)
    assert done.returncode == 0, done.stderr
    for phase in ("demonstrations: 24 of 24", "warm start: 6 of 6", "training: 1 of 1", "mean score"):
        assert phase in done.stdout
    assert "—" in (out / "episodes_before.txt").read_text(encoding="utf-8")
    stored = json.loads((out / "config.json").read_text(encoding="utf-8"))
    # The recipe's, the command line's.
    assert (stored["rollout"]["max_response_length"], stored["env"]["train_games"]) == (20, 24)
    rows = read_metrics(out / "metrics.jsonl")
    kinds = {key.rpartition("/")[2] for key in rows[0] if "success_rate/" in key}
    assert kinds <= {"beauty", "electronics", "fashion", "garden", "grocery"}
    assert 0 <= rows[0]["eval/score"] <= 1
    assert rows[1]["train/reward"] == pytest.approx(10 * rows[1]["train/score"])
    done = proxmo("eval", str(out), "--splits", "valid", "test", "--games", "4", environment=ASCII)
    assert done.returncode == 0, done.stderr
    assert "Score" in done.stdout
    assert "Succ." in done.stdout
    cells = json.loads((out / "eval.json").read_text(encoding="utf-8"))["splits"]["test"]
    assert cells["All"]["games"] == cells["Score"]["games"] == 4
    assert here("eval", str(out), "--splits", "valid_seen").stderr == (
        "proxmo: --splits must be of train, valid, test; got valid_seen\n"
    )
    done = proxmo("export", str(out), str(tmp_path / "policy[1]"), environment=ASCII)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "policy[1]" / "model.safetensors").is_file()


def test_a_resumed_run_evaluates_what_has_no_evaluation_yet():
    rows = [{"iteration": 0}, {"iteration": 1}]
    assert goes_on_from(0, {}, rows[:1]) == (True, None)
    assert goes_on_from(1, {"evaluated": True}, rows) == (True, 1)
    assert goes_on_from(2, {"evaluated": False}, rows) == (False, 1)
    # A checkpoint that was written when the run was stopped in the evaluation, which it made after it was resumed.
    assert goes_on_from(1, {"evaluated": False}, rows) == (True, 1)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--env", "webshop"], "--env webshop needs --env.webshop DIR, a checkout of WebShop"),
        (
            ["--env", "webshop", "--env.webshop", "x"],
            "--env webshop has no demonstrations for a warm start; need a --model",
        ),
        (["--env", "shop", "--data", "tests/golden"], "tests/golden: holds no items_shuffle*.json"),
        (["--env", "shop", "--env.goals", "few"], "invalid choice 'few' for argument '--env.goals'"),
        (["--env", "shop", "--env.reward", "joy"], "invalid choice 'joy' for argument '--env.reward'"),
    ],
)
def test_a_shop_that_cannot_be_is_refused(tmp_path, capsys, options, message):
    assert cli.main(["train", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in plain(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def played() -> Rollout:
    """Two groups of two episodes, the third of them lost before its first turn; two texts alike."""
    seen = [
        ["You see a red lamp on desk 1. " * 3, "Nothing happens."],
        ["Nothing happens."],
        [],
        ["You are at bed 1."],
    ]
    seen[1].append(seen[0][0].replace("desk 1", "desk 2", 1))
    buffer = Buffer.empty(2, 2, 3, prompt=4, response=4, words=4)
    lengths = np.zeros((4, 3), np.int32)
    return Rollout(
        buffer, lengths, lengths, won=np.array([True, False, False, True]), score=np.zeros(4),
        transcripts=[[(text, "look") for text in texts] for texts in seen], tasks=[""] * 4,
        endings=["You won.", "The end.", "", "The end."],
    )  # fmt: skip


def test_steps_of_a_rollout_are_those_that_happened(tmp_path):
    steps = steps_of(played(), 2)
    assert steps["group"].tolist() == [0, 0, 0, 0, 1]
    assert steps["trajectory"].tolist() == [0, 0, 1, 1, 3]
    assert steps["step"].tolist() == [0, 1, 0, 1, 0]
    write_steps(tmp_path / "rollout.npz", steps)
    assert read_steps(tmp_path / "rollout.npz")["texts"] == [
        seen for turns in played().transcripts for seen, _ in turns
    ]
    assert steps["next_texts"] == [
        played().transcripts[0][1][0],
        "You won.",
        played().transcripts[1][1][0],
        *["The end."] * 2,
    ]
    assert len(steps_advantages(read_steps(tmp_path / "rollout.npz"), dr_grpo())["advantage"]) == 5


def test_similar_texts_share_an_anchor_of_the_buffer():
    player = SimpleNamespace(local_mesh=make_mesh())
    loop = SimpleNamespace(config=config_with(rollout__group_size=2), player=player)
    rollout = played()
    Loop.number_similar_texts(loop, rollout)
    anchor = np.asarray(rollout.buffer.anchor)
    assert anchor[0, 0] == anchor[1, 1]
    assert anchor[0, 1] == anchor[1, 0] != anchor[0, 0]
