"""When does each mechanism help? Easy, medium and mixed houses, small and large groups.

proxmo ablate train --study difficulty
"""

from proxmo_jax.ablation.study import Cell, Study
from proxmo_jax.estimator.presets import dr_grpo, gigpo, proxmo

# (name, settings, what it is compared with in the same case)
KINDS = (("GRPO", dr_grpo(), "GRPO"), ("GiGPO", gigpo(), "GRPO"), ("ProxMO", proxmo(), "GiGPO"))
# (case, level, groups, trajectories per group): 64 episodes per iteration in every case.
CASES = (
    ("easy, groups of 8", "easy", 8, 8),
    ("mixed, groups of 8", "easy+medium", 8, 8),
    ("medium, groups of 8", "medium", 8, 8),
    ("mixed, groups of 2", "easy+medium", 32, 2),
    ("mixed, groups of 32", "easy+medium", 2, 32),
)

STUDY = Study(
    "difficulty",
    "In which houses, and with which group sizes, do step advantages and modulation help?",
    [
        Cell(
            f"{name}, {case}", settings, level=level, groups=groups, members=members,
            turns=20 if level == "easy" else 30, baseline=f"{other}, {case}",
        )
        for case, level, groups, members in CASES
        for name, settings, other in KINDS
    ],
    remark="GRPO is mean-centred. Mixed: every second round of the task types is in medium houses (8 to 12 receptacles,"
    " 8 to 14 objects), the others in easy houses (4 or 5 receptacles, 3 to 5 objects). An iteration has 64 episodes in"
    " every case, with at most 20 turns in easy houses and 30 in others.",
)  # fmt: skip
