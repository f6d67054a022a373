"""The commands that README.md and docs/ show are commands of this version, and each kind is run by a test."""

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
    "panel": "tests/agent/test_panel.py",
    "play": "tests/agent/test_play.py",
    "doctor": "tests/agent/test_doctor.py",
    "report": "tests/page/test_page.py",
    "export": "tests/agent/test_language_model.py",
    "check-model": "tests/agent/test_model_files.py",
    "convert-gguf": "tests/policy/test_gguf.py",
    "fetch-model": "tests/agent/test_fetch_model.py",
    "plan": "tests/plan/test_plan.py",
    "advantages": "tests/estimator/test_steps_file.py",
    "steps trl": "tests/integrations/test_trainers.py",
    "steps verl": "tests/integrations/test_trainers.py",
    "ablate estimator": "tests/ablation/test_grid.py",
    "ablate train": "tests/ablation/test_runner.py",
    "verify-env household": "tests/envs_bridge/test_verify.py",
    "verify-env shop": "tests/envs_bridge/test_shop.py",
}


def commands() -> list[str]:
    """The `proxmo` lines of the shell blocks of README and docs, without their comments."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [
        block for page in pages for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    ]
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("proxmo ")})


def test_there_are_commands():
    assert len(commands()) >= 12


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one_of_this_version(line, tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python file=corridor.py\n(.*?)```", tutorial, re.S)
    (tmp_path / "corridor.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "runs" / "household"  # the one that is resumed
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"iterations": 50}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
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


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page):
    """A fresh clone has them: continuous integration sees no file that git ignores."""
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert re.match(r"https?:|mailto:", link) or (page.parent / link).exists(), f"{page.name}: {link}"
