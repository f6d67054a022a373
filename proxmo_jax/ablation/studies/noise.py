"""Observations said otherwise by chance, which breaks exact matching: what is left of the step advantages?

python -m proxmo_jax.ablation.studies.noise --quick
"""

from proxmo_jax.ablation.runner import Cell, Study, from_command_line
from proxmo_jax.estimator.presets import dr_grpo, gigpo, proxmo

# (name, settings, what it is compared with at the same noise)
KINDS = (("GRPO", dr_grpo(), "GRPO"), ("GiGPO", gigpo(), "GRPO"), ("ProxMO", proxmo(), "GiGPO"))

STUDY = Study(
    "noise",
    "What do exact matching and proximity lose when texts are paraphrased at random?",
    [
        Cell(
            f"{name}, {chance:.0%} said otherwise", settings, paraphrase=chance,
            baseline=f"{other}, {chance:.0%} said otherwise",
        )
        for chance in (0.1, 0.5, 0.9)
        for name, settings, other in KINDS
    ],
    remark="The chance is for each phrase of a text that has three other wordings, anew each turn. The policy reads the"
    " same texts. GRPO is mean-centred.",
)  # fmt: skip

if __name__ == "__main__":
    from_command_line(STUDY)
