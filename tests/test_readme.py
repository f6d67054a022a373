"""The commands that README.md shows are commands of this version, and each kind of them is run by a test."""

import re
import shlex
from pathlib import Path

import pytest

from proxmo_jax import cli

ROOT = Path(__file__).parents[1]
# Which tests run a command for real, on small data; README's own sizes and data sets are not for tests.
RUN_BY = {
    "train": "tests/agent/test_train.py",
    "eval": "tests/agent/test_train.py",
    "export": "tests/agent/test_language_model.py",
    "check-model": "tests/agent/test_model_files.py",
    "convert-gguf": "tests/policy/test_gguf.py",
    "fetch-model": "tests/agent/test_fetch_model.py",
    "plan": "tests/plan/test_plan.py",
    "advantages": "tests/estimator/test_steps_file.py",
    "ablate estimator": "tests/ablation/test_grid.py",
    "ablate train": "tests/ablation/test_runner.py",
    "verify-env household": "tests/envs_bridge/test_verify.py",
    "verify-env shop": "tests/envs_bridge/test_shop.py",
}


def commands() -> list[str]:
    """The `proxmo` lines of README's shell blocks, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("proxmo ")]


def test_there_are_commands():
    assert len(commands()) >= 12


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one_of_this_version(line, tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    arguments = shlex.split(line)[1:]
    command = cli.find(arguments)
    assert command is not None
    config = cli.parse(arguments, command)
    assert type(config).__name__ == "Config"
    test = (ROOT / RUN_BY[cli.name_of(command)]).read_text(encoding="utf-8")
    word = cli.name_of(command).split()[0]
    assert f'"{word}"' in test or word.replace("-", "_") in test


def test_make_runs_what_is_shown():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "proxmo train $(ARGS)" in text
    assert "pytest $(ARGS)" in text
