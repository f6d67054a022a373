"""The estimator in plain Python loops and float64: slow, obvious, and sharing no code with the real one."""

import math

import numpy as np


def returns(steps: list[dict], gamma: float) -> list[float]:
    """Discounted return of each step; a step is a dict with trajectory, step and reward."""
    answer = []
    for own in steps:
        later = [s for s in steps if s["trajectory"] == own["trajectory"] and s["step"] >= own["step"]]
        later.sort(key=lambda s: s["step"])
        answer.append(sum(gamma**k * s["reward"] for k, s in enumerate(later)))
    return answer


def modulation(p: float, success: bool, alpha: float, span: float) -> float:
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    beta = span / (sigmoid(1) - 0.5)
    return 1 + beta * ((sigmoid((1 - p) ** alpha) if success else sigmoid(-(p**alpha))) - 0.5)


def advantages(steps: list[dict], *, gamma=0.95, penalty=0.1, alpha=4.0, span=0.05, tau=0.1, omega=1.0, mode="soft"):
    """(episode, step, joint) advantages of the steps of ONE group.

    A step is a dict with trajectory, step, reward, success, valid, text and vector.
    """
    discounted = returns(steps, gamma)
    total = {}
    for s in steps:
        total[s["trajectory"]] = total.get(s["trajectory"], 0.0) + s["reward"]
    episode_score = [total[s["trajectory"]] - penalty * (not s["valid"]) for s in steps]
    step_score = [g - penalty * (not s["valid"]) for g, s in zip(discounted, steps, strict=True)]
    mean = sum(episode_score) / len(steps) if len(steps) > 1 else 0.0
    won = {s["trajectory"]: s["success"] for s in steps}
    p = sum(won.values()) / len(won)
    episode = [
        (score - mean) * modulation(p, s["success"], alpha, span) for score, s in zip(episode_score, steps, strict=True)
    ]
    step = []
    for i, own in enumerate(steps):
        if mode == "none":
            step.append(0.0)
        elif mode == "hard":
            same = [step_score[j] for j, other in enumerate(steps) if other["text"] == own["text"]]
            step.append(step_score[i] - sum(same) / len(same))
        else:
            weights = [math.exp(float(np.dot(own["vector"], other["vector"])) / tau) for other in steps]
            baseline = sum(w * q for w, q in zip(weights, step_score, strict=True)) / sum(weights)
            step.append(step_score[i] - baseline)
    return episode, step, [e + omega * s for e, s in zip(episode, step, strict=True)]
