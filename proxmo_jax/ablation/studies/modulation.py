"""Strength and shape of the success-rate-aware modulation: range and exponent.

proxmo ablate train --study modulation
"""

from proxmo_jax.ablation.study import Cell, Study
from proxmo_jax.estimator.presets import proxmo

STUDY = Study(
    "modulation",
    "How do the range of the modulation (published: 0.05) and its exponent alpha (published: 4) affect learning?",
    [
        Cell("none", proxmo(modulation_range=0.0)),
        *(
            Cell(f"range {width:g}, alpha {alpha:g}", proxmo(modulation_range=width, alpha=alpha))
            for width in (0.05, 0.3, 0.9)
            for alpha in (1.0, 4.0, 8.0)
        ),
    ],
)
