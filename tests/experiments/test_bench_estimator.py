import numpy as np
import pytest
from nested import plain

from experiments import bench_estimator
from experiments.bench_estimator import Config, all_distinct, first_groups, main, play
from experiments.embedding_agreement import agreement, nearest_in_common, ranks
from proxmo_jax.cli import main as proxmo


@pytest.fixture(scope="module")
def steps():
    from rich.console import Console

    return play(3, 0, Console(quiet=True), turns=12)


def test_the_table_is_appended(tmp_path, monkeypatch):
    shown = ("graphgpo", "gagpo", "empg")  # what they need beside texts
    monkeypatch.setattr(bench_estimator, "PRESETS", {name: bench_estimator.PRESETS[name] for name in shown})
    (tmp_path / "B.md").write_text("# Before\n")
    monkeypatch.setattr(bench_estimator, "MEMORY_AT", (50, 100))
    text = main(Config(groups=(2,), preset_groups=(1,), million=False, repeat=1, append=tmp_path / "B.md"))
    rows = [line for line in text.splitlines() if line.startswith("| 2 |")]
    assert len(rows) == 2  # as played, and with every text distinct
    assert "| dense |" in text
    assert "| blockwise |" in text
    for preset in shown:
        assert f"| {preset} | " in text
    assert (tmp_path / "B.md").read_text(encoding="utf-8") == f"# Before\n\n{text}\n"


def test_played_steps_are_what_a_rollout_gives(steps):
    assert sorted(set(steps["group"])) == [f"task-{g:06d}" for g in range(3)]
    assert len(set(steps["trajectory"])) == 24
    assert len(set(steps["texts"])) < len(steps["texts"])
    assert len(set(all_distinct(steps)["texts"])) == len(steps["texts"])
    assert set(first_groups(steps, 2)["group"]) == {"task-000000", "task-000001"}


def test_words_and_tokens_agree_on_the_whole(steps):
    groups, distinct, correlation, overlap = agreement(steps["texts"], steps["group"].tolist())
    assert groups == 3
    assert distinct > 18
    assert correlation > 0.4
    assert overlap > 0.4


def test_ranks_and_neighbours_by_hand():
    assert ranks(np.array([0.3, 0.1, 0.3, 0.9])).tolist() == [2.5, 1, 2.5, 4]
    a = np.eye(8) + np.arange(8)
    assert nearest_in_common(a, a) == 1
    assert nearest_in_common(a, -a) < 1


def test_no_official_checkout(tmp_path, capsys):
    assert proxmo(["bench", "estimator", "--official", str(tmp_path)]) == 2
    assert "holds no proxmo/core_proxmo.py" in capsys.readouterr().err
    assert proxmo(["bench", "everything"]) == 2
    assert "Unrecognized options: everything" in plain(capsys.readouterr().err)
