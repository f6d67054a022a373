"""The paper's ablation: what each of ProxMO's two parts adds to GRPO and GiGPO.

python -m proxmo_jax.ablation.studies.components --quick     # a short test; without --quick: 16 seeds
"""

from proxmo_jax.ablation.runner import Cell, Study, from_command_line
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

if __name__ == "__main__":
    from_command_line(STUDY)
