"""The paper's ablation: what each of ProxMO's two parts adds to GRPO and GiGPO.

proxmo ablate train --study components
"""

from proxmo_jax.ablation.study import Cell, Study
from proxmo_jax.estimator.presets import (
    dr_grpo,
    gigpo,
    grpo,
    proxmo,
    proxmo_without_modulation,
    proxmo_without_proximity,
)

STUDY = Study(
    "components",
    "What do success-rate-aware modulation and proximity-based aggregation add to mean-centred GRPO and to GiGPO?",
    [
        Cell("GRPO, mean-centred", dr_grpo()),
        Cell("GRPO, over the std", grpo()),
        Cell("GiGPO", gigpo()),
        Cell("GiGPO + modulation", proxmo_without_proximity(), baseline="GiGPO"),
        Cell("GiGPO + proximity", proxmo_without_modulation(), baseline="GiGPO"),
        Cell("ProxMO", proxmo(), baseline="GiGPO"),
    ],
)
