"""The worked examples of CONTRIBUTING.md and docs/tutorial.md work.

Those of CONTRIBUTING.md are applied to a copy of the sources, that of the tutorial is a file beside the run.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r'```python file=(\S+)(?: after="([^"]+)")?\n(.*?)```', re.S)


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """The sources with every example in them."""
    folder = tmp_path_factory.mktemp("contributed")
    for name in ("proxmo_jax", "envs_bridge"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    found = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert [path for path, _, _ in found] == [
        "proxmo_jax/estimator/presets.py",
        "proxmo_jax/ablation/studies/discount.py",
        "proxmo_jax/ablation/runner.py",
    ]
    for path, after, code in found:
        file = folder / path
        if after:
            text = file.read_text(encoding="utf-8")
            assert text.count(after) == 1
            assert code.count("\n") == 1  # one line elsewhere
            code = text.replace(after, f"{after}\n{code}")
        file.write_text(code, encoding="utf-8")
    return folder


def proxmo(folder: Path, *arguments: str) -> str:
    """What a command says that is run in a folder, by the sources there if it has them."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [str(Path(sys.executable).with_name("proxmo")), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_preset_is_known(changed):
    (changed / "steps.jsonl").write_text(
        "".join(
            f'{{"group": 1, "trajectory": {t}, "step": 0, "reward": {t}, "success": {"true" if t else "false"},'
            f' "action_valid": true, "texts": "you see a desk"}}\n'
            for t in (0, 1)
        )
    )
    said = proxmo(changed, "advantages", "steps.jsonl", "advantages.jsonl", "--preset", "half_steps")
    assert "advantages of 2 steps by half_steps" in said


@pytest.mark.slow
def test_the_environment_is_trained_in(tmp_path):
    ((file, _, code),) = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    (tmp_path / file).write_text(code, encoding="utf-8")
    said = proxmo(
        tmp_path, "train", "--env", "corridor:SPEC", "--out", "run", "--iterations", "1", "--env.train-games", "8",
        "--env.eval-games", "8", "--warm-start.steps", "2", "--rollout.num-groups", "2", "--rollout.max-turns", "3",
        "--optimizer.rows-per-batch", "8", "--model.hidden-size", "32", "--model.layers", "1", "--env.workers", "1",
        "--output.no-page",
    )  # fmt: skip
    assert "proxmo on 8 corridor games, 8 held out" in said
    assert "Done in" in said


def test_the_study_is_listed(changed):
    code = "from proxmo_jax.ablation.runner import load; print(len(load('discount').cells))"
    environment = {**os.environ, "PYTHONPATH": str(changed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=changed, env=environment, capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == "3", done.stderr
