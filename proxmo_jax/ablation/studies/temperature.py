"""How soft should the step baseline be? From exact matching to the mean of the group.

proxmo ablate train --study temperature
"""

from proxmo_jax.ablation.study import Cell, Study
from proxmo_jax.estimator.presets import dr_grpo, gigpo, proxmo

STUDY = Study(
    "temperature",
    "How does the temperature of the proximity softmax (published: 0.1) affect learning?",
    [
        Cell("0.1", proxmo()),
        *(Cell(f"{value:g}", proxmo(temperature=value)) for value in (0.01, 0.02, 0.05, 0.2, 0.5, 2.0)),
        Cell("exact matching", gigpo(modulation_range=0.05)),
        Cell("no step advantage", dr_grpo(modulation_range=0.05)),
    ],
    remark="All settings use modulation; only the step baseline differs.",
)
