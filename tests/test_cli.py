"""The command line as a whole: every command's help, and the options that the documentation names."""

import re
from pathlib import Path

import pytest

from proxmo_jax import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "BENCHMARKS.md", "LOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "proxmo_jax" / "agent" / "recipes").glob("*.toml")),
]
OF_OTHERS = {
    "--figure": "experiments.compare",
    "--shop-traces": "experiments.embedding_agreement",
    "--logdir": "tensorboard",
    "--xla_cpu_max_isa": "XLA",
}
OPTION = re.compile(r"(?<![\w-])--[a-zA-Z][\w.-]*\w")


def commands() -> list[list[str]]:
    """The words of every command."""
    return [
        [name, *more]
        for name, what in cli.COMMANDS.items()
        for more in ([[part] for part in what] if isinstance(what, dict) else [[]])
    ]


def help_of(words: list[str], capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "400")  # no option is broken over two lines
    assert cli.main([*words, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help(words, capsys, monkeypatch):
    assert f"usage: proxmo {' '.join(words)}" in help_of(words, capsys, monkeypatch)


def test_the_documentation_names_options_that_there_are(capsys, monkeypatch):
    known = {option for words in commands() for option in OPTION.findall(help_of(words, capsys, monkeypatch))}
    assert len(known) > 200
    for page in PAGES:
        for option in OPTION.findall(page.read_text(encoding="utf-8")):
            assert option in known or option in OF_OTHERS, f"{page.name}: {option}"
