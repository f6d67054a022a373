"""The estimators of the field and their soft variants, in easy, mixed (easy and medium), medium and hard houses.

    proxmo ablate train --study methods

GraphGPO's recipe for ALFWorld compares more than texts: the place, what is held and was moved, the commands. So it is
here twice: with texts, as the others, and with texts and states of the house.

Every run has the same budget: 160 iterations of 64 episodes, with as many turns for all methods in houses of a level.
The learning rate is tuned for each method at each level: four rates from eight seeds that the study does not use, in
groups of 8 without paraphrases, with the budget of a run of the study. The rate with the highest success over the whole
run is used for this method in all cases of the level. Advantages are brought to similar sizes first (in standard
deviations, or divided by the reward of a win), and Adam is indifferent to their scale except beside the entropy bonus.
"""

from proxmo_jax.ablation.study import Cell, Study
from proxmo_jax.estimator.presets import g2po, gagpo, gigpo, graphgpo, grpo, hgpo, proxmo

ON_STATES = "GraphGPO on states"
METHODS = {
    "ProxMO": proxmo(), "GRPO": grpo(), "GiGPO": gigpo(), "HGPO": hgpo(), "GraphGPO": graphgpo(), "G2PO": g2po(),
    "GAGPO": gagpo(), "soft HGPO": hgpo(aggregation="soft"), "soft GraphGPO": graphgpo(aggregation="soft"),
    "soft G2PO": g2po(aggregation="soft"), "soft GAGPO": gagpo(aggregation="soft"), ON_STATES: graphgpo(),
}  # fmt: skip
LEVELS = {"easy": ("easy", 20), "mixed": ("easy+medium", 30), "medium": ("medium", 30), "hard": ("hard", 60)}  # turns
TUNED = "groups of 8"  # of a level, without paraphrases
SIZES = {4: 16, 8: 8}  # trajectories per group: groups
PARAPHRASED = {"": 0.0, ", paraphrased": 0.5}

STUDY = Study(
    "methods",
    "Which estimator trains agents best from equal budgets, and what do soft variants gain?",
    [
        Cell(
            f"{name}, {level}, groups of {members}{said}", settings, level=houses, groups=groups, members=members,
            turns=turns, paraphrase=chance, states=name == ON_STATES, method=name,
            baseline=f"ProxMO, {level}, groups of {members}{said}", case=f"{level}, groups of {members}{said}",
            tuned_with=f"{name}, {level}, {TUNED}",
        )
        for level, (houses, turns) in LEVELS.items()
        for said, chance in PARAPHRASED.items()
        for members, groups in SIZES.items()
        for name, settings in METHODS.items()
    ],
    remark="Each phrase that has paraphrases is replaced with a chance of 50% where texts are paraphrased. GRPO divides"
    " by the standard deviation of the group. No command of these agents is invalid."
    " GraphGPO on states compares texts and the state of the house, as its recipe does for ALFWorld. The entropy bonus"
    " is that of the command line (0.01 by default) for all, and was not tuned. Rates are those of groups of 8 without"
    " paraphrases, for all cases of the same houses.",
    seeds=32,
    reference="ProxMO",
    learning_rates=(0.003, 0.01, 0.03, 0.1),
)  # fmt: skip
