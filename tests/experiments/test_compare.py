"""The table and figure of finished runs."""

import dataclasses

from nested import config_with

from experiments import compare
from proxmo_jax.agent.report import Metrics
from proxmo_jax.agent.run_files import open_folder


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
    compare.main((tmp_path / "0", tmp_path / "1"), tmp_path / "figure.png")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows[0].startswith("| proxmo | 0 | 50% | 75% | 60% to 86% | 1 | 4.00 | 0.25% |")
    assert rows[1].startswith("| proxmo | 1 | 50% | 25% |")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
