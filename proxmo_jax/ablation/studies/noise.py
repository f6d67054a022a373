"""Random paraphrases of the observations break exact matching: how much do the step advantages still help?

proxmo ablate train --study noise
"""

from proxmo_jax.ablation.study import Cell, Study
from proxmo_jax.estimator.presets import dr_grpo, gigpo, proxmo

# (name, settings, what it is compared with at the same noise)
KINDS = (("GRPO", dr_grpo(), "GRPO"), ("GiGPO", gigpo(), "GRPO"), ("ProxMO", proxmo(), "GiGPO"))

STUDY = Study(
    "noise",
    "What do exact matching and proximity lose when texts are paraphrased at random?",
    [
        Cell(
            f"{name}, {chance:.0%} paraphrased", settings, paraphrase=chance,
            baseline=f"{other}, {chance:.0%} paraphrased",
        )
        for chance in (0.1, 0.5, 0.9)
        for name, settings, other in KINDS
    ],
    remark="Each phrase that has paraphrases is replaced by one of three with this chance, drawn anew each turn. The"
    " policy reads the paraphrased texts. GRPO is mean-centred.",
)  # fmt: skip
