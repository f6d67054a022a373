"""The definition of the success rate: the paper's share of trajectories, or the official code's clamped mean score.

proxmo ablate train --study success_rate
"""

from proxmo_jax.ablation.study import Cell, Study
from proxmo_jax.estimator.presets import official, proxmo

STUDY = Study(
    "success_rate",
    "Does it matter that the official code computes the success rate from penalised scores clamped to [0, 1], with a"
    " reward of 10?",
    [
        Cell("no modulation", proxmo(modulation_range=0.0)),
        Cell("paper, range 0.05", proxmo()),
        Cell("official, range 0.05", official(), baseline="paper, range 0.05"),
        Cell("paper, range 0.9", proxmo(modulation_range=0.9)),
        Cell("official, range 0.9", official(modulation_range=0.9), baseline="paper, range 0.9"),
    ],
    remark="With a reward of 10 the official p is 1 in every group with more than about one win in ten: there a win"
    " has weight 1 and a failure 1 - range.",
)
