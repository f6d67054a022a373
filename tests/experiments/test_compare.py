"""The table and figure of finished runs."""

import dataclasses

import pytest
from nested import config_with

from experiments import compare
from proxmo_jax.agent.report import Metrics
from proxmo_jax.agent.run_files import open_folder
from proxmo_jax.agent.settings import of_preset
from proxmo_jax.errors import UserError


def test_runs_are_compared(tmp_path, capsys):
    for seed, end in enumerate((0.75, 0.25)):
        config = config_with(seed=seed, output__dir=tmp_path / str(seed))
        open_folder(dataclasses.replace(config, resume=True))
        metrics = Metrics(tmp_path / str(seed) / "metrics.jsonl")
        metrics.write({"iteration": 0, "eval/success_rate": 0.5, "eval/games": 40})
        metrics.write(
            {"iteration": 1, "train/success_rate": 0.4, "time/iteration": 4.0, "time/estimator": 0.01,
             "eval/success_rate": end, "eval/games": 40}
        )  # fmt: skip
    open_folder(config_with(output__dir=tmp_path / "new"))
    with pytest.raises(UserError, match="new: has no iteration or no evaluation yet"):
        compare.main((tmp_path / "new",))
    capsys.readouterr()
    compare.main((tmp_path / "0", tmp_path / "1"), tmp_path / "figure.png")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows[0].startswith("| proxmo | 0 | 50% | 75% | 60% to 86% | 1 | 4.00 | 0.25% |")
    assert rows[1].startswith("| proxmo | 1 | 50% | 25% |")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_methods_are_named_by_what_is_not_the_presets():
    soft = dataclasses.replace(of_preset("gagpo").estimator, aggregation="soft")
    for estimator, name in ((of_preset("gagpo").estimator, "gagpo"), (soft, "gagpo, aggregation soft")):
        assert compare.method_of({"preset": "gagpo", "estimator": dataclasses.asdict(estimator)}) == name
