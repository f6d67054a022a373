"""Every block and command of docs/use_in_your_loop.md, run; and the metrics of docs/metrics.md are those that are."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import proxmo_jax as pj
from proxmo_jax import cli
from proxmo_jax.agent.metrics import NAMES
from proxmo_jax.estimator.steps_file import read_steps

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "cases" / "trainers"
BLOCKS = re.findall(r"```(\w+)(?: (\w+))?\n(.*?)```", (ROOT / "docs/use_in_your_loop.md").read_text("utf-8"), re.S)
JAX, NUMPY, TORCH, TUNIX, VERL = (code for kind, _, code in BLOCKS if kind == "python")


def rollout() -> dict:
    """Turns of two tasks, three attempts each, in no order; the names are the page's."""
    rng = np.random.default_rng(0)
    rows = [(task, 3 * task + i, turn) for task in range(2) for i in range(3) for turn in range(2 + i)]
    rng.shuffle(rows)
    task, attempt, turn = map(np.array, zip(*rows, strict=True))
    solved = attempt % 3 == 1
    last = turn == 1 + attempt % 3
    return {
        "task": task, "attempt": attempt, "turn": turn, "reward": (solved & last) * 10.0, "solved": solved,
        "valid": rng.random(len(rows)) < 0.8, "observation": [f"you are in room {t} of house {g}" for g, _, t in rows],
    }  # fmt: skip


def tokens(count):
    rng = np.random.default_rng(1)
    log_probs = -rng.random((count, 4)).astype(np.float32)
    return log_probs, log_probs + 0.3 * rng.standard_normal((count, 4)).astype(np.float32), rng.random((count, 4)) < 0.8


def run(code: str, **names) -> dict:
    exec(compile(code, "docs/use_in_your_loop.md", "exec"), names)
    return names


def test_each_is_about_ten_lines():
    for code in (JAX, NUMPY + TORCH):
        lines = [line for line in code.splitlines() if line.strip() and not re.match("import|from|def", line)]
        assert len(lines) <= 10


def test_jax():
    given = rollout()
    found = run(JAX, **given)
    expected = run(NUMPY, **given)["advantage"]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found["advantage"][:, 0], expected, atol=1e-5)
    new, old, mask = tokens(len(expected))
    gradient = jax.grad(found["loss"])(jnp.array(new), old, mask)
    ratio = np.exp(new - old)
    free = ~np.where(expected[:, None] > 0, ratio > 1.2, ratio < 0.8)
    np.testing.assert_allclose(gradient, -ratio * expected[:, None] * free * mask / mask.sum(), atol=1e-5)


def test_pytorch():
    given = rollout()
    found = run(NUMPY, **given)
    torch = pytest.importorskip("torch")
    expected = run(JAX, **given)
    arrays = tokens(len(found["advantage"]))
    loss = run(TORCH, **found)["loss"](*(torch.from_numpy(x) for x in arrays))
    np.testing.assert_allclose(float(loss), expected["loss"](*arrays), atol=1e-5)


def test_verl_batch(tmp_path, monkeypatch):
    tensor = lambda x: SimpleNamespace(numpy=lambda: np.array(x))  # noqa: E731
    batch = SimpleNamespace(
        batch={
            "prompts": tensor([[1, 2]]), "responses": tensor([[3, 4, 5]]), "response_mask": tensor([[1, 0, 1]]),
            "attention_mask": tensor([[1] * 5]), "token_level_scores": tensor([[0, 0, 1.0]]),
        },
        non_tensor_batch={"uid": np.array(["a"], object)},
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run(VERL, batch=batch, tokenizer=SimpleNamespace(decode=str))
    written = read_steps(Path("steps.jsonl"))
    assert written["texts"] == ["[1, 2]", "[4]"]
    assert written["reward"] == [0, 1]


def test_commands(tmp_path, monkeypatch):
    shutil.copy(CASES / "trl_tools.parquet", tmp_path / "completions_00010.parquet")
    shutil.copy(CASES / "verl_classic.jsonl", tmp_path / "120.jsonl")
    monkeypatch.chdir(tmp_path)
    (shell,) = (code for kind, _, code in BLOCKS if kind == "sh")
    lines = [line.partition("#")[0] for line in shell.splitlines()]
    assert len(lines) == 3
    for line in lines:
        arguments = shlex.split(line)[1:]
        without = arguments[1] == "trl" and importlib.util.find_spec("pyarrow") is None
        assert cli.main(arguments) == (2 if without else 0)
    assert len(read_steps(Path("advantages.jsonl"))["advantage"]) == 8


def test_the_metrics_page_has_the_names_that_are_reported():
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"\| `([\w/]+)` \| `([\w/]+)` \|", page)) == NAMES


@pytest.mark.parametrize("line", re.findall(r"^proxmo .*", (ROOT / "docs/metrics.md").read_text("utf-8"), re.M))
def test_the_metrics_page_has_commands_of_this_version(line):
    arguments = shlex.split(line.partition("#")[0])[1:]
    config = cli.parse(arguments, cli.find(arguments))
    assert config.output.report_to == tuple(arguments[arguments.index("--report-to") + 1 :])


@pytest.mark.slow
def test_tunix():
    pytest.importorskip("tunix")
    import tunix_record as record

    cluster, config = record.make_cluster(1), record.make_config()
    names = {"cluster": cluster, "config": config, "parser": record.Parser(), "House": record.House}
    learner = run(TUNIX, dataset=record.dataset(1), **names)["learner"]
    assert learner.settings == pj.proxmo()
    assert learner.rl_cluster.global_steps == 1
