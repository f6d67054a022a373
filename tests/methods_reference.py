"""HGPO, GraphGPO, G2PO, GAGPO and EMPG in plain loops and float64: slow, obvious, sharing no code with the estimator.

A step is a dict with group, trajectory, step, reward, valid, text, and for some methods next_text and entropy.
`rules` are the parameters by the names of tests/golden/methods/cases.json. Every function returns lists by name.
"""

import difflib
import math
from itertools import pairwise

TOLERANCE = 1e-6  # scores that are as near to their mean are equal to it


def divided(values, of, std, epsilon, *, biased=False, lone=0.0):
    """(value - mean) of one value among some, over their standard deviation + epsilon; `lone` if there is no other."""
    if len(of) == 1:
        return lone
    mean = math.fsum(of) / len(of)
    deviation = [x - mean if abs(x - mean) > TOLERANCE * max(1e-30, *map(abs, of)) else 0.0 for x in of]
    own = values - mean
    if abs(own) <= TOLERANCE * max(1e-30, *map(abs, of)):
        return 0.0
    if not std:
        return own
    return own / (math.sqrt(math.fsum(d * d for d in deviation) / (len(of) - (not biased))) + epsilon)


def trajectories(steps):
    """Indices of each trajectory's steps, in order, by trajectory."""
    found = {}
    for i, s in enumerate(steps):
        found.setdefault(s["trajectory"], []).append(i)
    return {name: sorted(at, key=lambda i: steps[i]["step"]) for name, at in found.items()}


def same(steps, i, key):
    """Steps of the group of step i with an equal key."""
    return [j for j, s in enumerate(steps) if s["group"] == steps[i]["group"] and key[j] == key[i]]


def returns(steps, gamma):
    answer = [0.0] * len(steps)
    for at in trajectories(steps).values():
        for k, i in enumerate(at):
            answer[i] = sum(gamma**n * steps[j]["reward"] for n, j in enumerate(at[k:]))
    return answer


def episode_returns(steps):
    answer = [0.0] * len(steps)
    for at in trajectories(steps).values():
        for i in at:
            answer[i] = math.fsum(steps[j]["reward"] for j in at)
    return answer


def episode_part(steps, penalty, std, epsilon):
    """(scores, advantages) of whole episodes, over the steps of each group; a lone step keeps its score."""
    score = [r - penalty * (not s["valid"]) for r, s in zip(episode_returns(steps), steps, strict=True)]
    group = [0] * len(steps)
    advantage = []
    for i, own in enumerate(score):
        others = [score[j] for j in same(steps, i, group)]
        advantage.append(divided(own, others, std, epsilon, lone=own / (1 + epsilon) if std else own))
    return score, advantage


def hgpo(steps, rules, levels="official"):
    gamma, epsilon, std = rules["gamma"], rules["epsilon"], rules["mode"] == "mean_std_norm"
    discounted = returns(steps, gamma)
    score = [g - rules["invalid_penalty"] * (not s["valid"]) for g, s in zip(discounted, steps, strict=True)]
    episode_score, base = episode_part(steps, rules["invalid_penalty"], std, epsilon)
    depths = rules["history_length"] + 1
    level = [[math.nan] * depths for _ in steps]
    for depth in range(1, depths + 1):
        key = [None] * len(steps)
        for at in trajectories(steps).values():
            for k, i in enumerate(at):
                key[i] = tuple(steps[j]["text"] for j in at[k + 1 - depth : k + 1]) if k + 1 >= depth else None
        for i in range(len(steps)):
            if key[i] is not None:
                others = [score[j] for j in same(steps, i, key)]
                level[i][depth - 1] = divided(score[i], others, std, epsilon, biased=True, lone=math.nan)
    alpha, joint = rules["length_weight_alpha"], []
    for i, own in enumerate(level):
        parts = [((d + 1 + (levels == "official")) ** alpha, a) for d, a in enumerate(own)]
        parts += [(1.0, base[i])] if rules["base_group"] else []
        if levels == "official":
            parts = [(w, a) for w, a in parts if a != 0 and not math.isnan(a)]
        total = sum(w for w, _ in parts) + (epsilon if levels == "official" else 0.0)
        joint.append(sum(w * (0.0 if math.isnan(a) else a) for w, a in parts) / total if parts else 0.0)
    return {
        "discounted_return": discounted, "step_score": score, "episode_score": episode_score,
        "level_advantage": level, "step_advantage": joint, "advantage": joint,
        "episode_advantage": base if rules["base_group"] else [0.0] * len(steps),
    }  # fmt: skip


def first_fit(texts, threshold):
    """The representative of each text: the first one whose difflib ratio reaches the threshold."""
    found = []
    for text in texts:
        near = (r for r in found if difflib.SequenceMatcher(None, text, r).ratio() >= threshold)
        found.append(next(near, text))
    return found


GOAL = object()


def distances(steps, rules):
    """(distance of the step's observation, of the one after it) to the goal within the group."""
    total = episode_returns(steps)
    last = {at[-1] for at in trajectories(steps).values()}
    here, there = [0.0] * len(steps), [0.0] * len(steps)
    for group in {s["group"] for s in steps}:
        own = [i for i, s in enumerate(steps) if s["group"] == group]
        nodes = [x for i in own for x in (steps[i]["text"], steps[i]["next_text"])]
        if rules["enable_similarity"]:
            nodes = first_fit(nodes, rules["similarity_thresh"])
        source, target = nodes[::2], nodes[1::2]
        target = [GOAL if i in last and total[i] > 0 else t for i, t in zip(own, target, strict=True)]
        found, frontier, length = {GOAL: 0}, {GOAL}, 0
        while frontier:  # breadth first, from the goal backwards
            length += 1
            frontier = {s for s, t in zip(source, target, strict=True) if t in frontier and s not in found}
            found |= dict.fromkeys(frontier, length)
        far = max(found.values()) + 1
        for i, s, t in zip(own, source, target, strict=True):
            here[i], there[i] = found.get(s, far), found.get(t, far)
    return here, there


def graphgpo(steps, rules, paper=False):
    gamma, epsilon, std = rules["gamma"], rules["epsilon"], rules["mode"] == "mean_std_norm"
    here, there = distances(steps, rules)
    power = [b - a + 1 if rules["normalize_distance"] else b + paper for a, b in zip(here, there, strict=True)]
    gain = [rules["success_reward"] * gamma**p for p in power]
    score = [g - rules["invalid_penalty"] * (not s["valid"]) for g, s in zip(gain, steps, strict=True)]
    episode_score, episode = episode_part(steps, rules["invalid_penalty"], std, epsilon)
    text = [s["text"] for s in steps]
    step = [divided(score[i], [score[j] for j in same(steps, i, text)], std, epsilon) for i in range(len(steps))]
    weights = rules["step_advantage_w"], rules["episode_advantage_w"]
    return {
        "distance": here, "next_distance": there, "graph_return": gain, "step_score": score,
        "episode_score": episode_score, "episode_advantage": episode, "step_advantage": step,
        "advantage": [weights[0] * s + weights[1] * e for s, e in zip(step, episode, strict=True)],
    }  # fmt: skip


def means(steps, values, key):
    return [math.fsum(values[j] for j in same(steps, i, key)) / len(same(steps, i, key)) for i in range(len(steps))]


def g2po(steps, rules):
    epsilon, std = rules["epsilon"], rules["mode"] == "mean_std_norm"
    total, text = episode_returns(steps), [s["text"] for s in steps]
    visit, following = [0.0] * len(steps), [None] * len(steps)
    for at in trajectories(steps).values():
        for t, i in enumerate(at):
            visit[i] = rules["value_discount"] ** (len(at) - t) * total[i]
            following[i] = at[t + 1] if t + 1 < len(at) else None
    value = means(steps, visit, text)
    won = rules["success_reward"]
    after = [
        value[j] if j is not None else won * (total[i] == won) for i, j in enumerate(following)
    ]  # fmt: skip
    x = [a - rules["step_invalid_penalty"] * (not s["valid"]) for a, s in zip(after, steps, strict=True)]
    gain = [a - v for a, v in zip(after, value, strict=True)]
    largest = {s["group"]: 0.0 for s in steps}
    for i, s in enumerate(steps):
        largest[s["group"]] = max(largest[s["group"]], abs(value[i]), abs(after[i]))
    gain = [0.0 if abs(g) < 1e-9 * largest[s["group"]] else g for g, s in zip(gain, steps, strict=True)]
    group = [0] * len(steps)
    node = [divided(x[i], [x[j] for j in same(steps, i, text)], std, epsilon) for i in range(len(steps))]
    edge = [divided(gain[i], [gain[j] for j in same(steps, i, group)], std, epsilon) for i in range(len(steps))]
    episode_score, episode = episode_part(steps, rules["invalid_penalty"], std, epsilon)
    step = [n + e for n, e in zip(node, edge, strict=True)]
    return {
        "state_value": value, "next_value": after, "node_advantage": node, "step_advantage": step,
        "episode_score": episode_score, "episode_advantage": episode,
        "advantage": [e + rules["step_advantage_w"] * s for e, s in zip(episode, step, strict=True)],
    }  # fmt: skip


def gagpo(steps, rules):
    gamma, epsilon = rules["gamma"], rules["epsilon"]
    text, discounted = [s["text"] for s in steps], returns(steps, gamma)
    anywhere = [{**s, "group": 0} for s in steps] if rules["values_over"] == "batch" else steps
    value, raw = means(anywhere, discounted, text), [0.0] * len(steps)
    for at in trajectories(steps).values():
        following, carried = 0.0, 0.0
        for i in reversed(at):
            carried = steps[i]["reward"] + gamma * following - value[i] + gamma * rules["lambda"] * carried
            raw[i], following = carried, value[i]
    group, answer = [0] * len(steps), []
    for i in range(len(steps)):
        others = [raw[j] for j in same(steps, i, group)]
        spread = 0.0
        if len(others) > 1:
            mean = math.fsum(others) / len(others)
            spread = math.sqrt(math.fsum((x - mean) ** 2 for x in others) / (len(others) - 1))
        answer.append(0.0 if spread < rules["zero_std"] else (raw[i] - mean) / (spread + epsilon))
    answer = answer if rules["standardize"] else raw
    return {
        "state_value": value, "raw_advantage": raw, "step_advantage": answer, "advantage": answer,
    }  # fmt: skip


def empg(steps, rules):
    score, base = episode_part(steps, rules["invalid_penalty"], rules["norm_adv_by_std"], rules["epsilon"])
    entropy = [s["entropy"] for s in steps]
    low, high = min(entropy), max(entropy)
    h = [(e - low) / (high - low + 1e-8) for e in entropy]
    mean = math.fsum(math.exp(-rules["k"] * x) for x in h) / len(h)
    scale = [math.exp(-rules["k"] * x) / (mean + 1e-8) for x in h]
    clarity = [math.exp(-rules["k_f"] * x) for x in h]
    joint = [b * g for b, g in zip(base, scale, strict=True)]
    for at in trajectories(steps).values():
        for i, following in pairwise(at):
            joint[i] += rules["zeta"] * clarity[following]
    centre = math.fsum(joint) / len(joint)
    return {
        "episode_score": score, "episode_advantage": base, "clarity": clarity, "advantage": [a - centre for a in joint],
    }  # fmt: skip


METHODS = {"hgpo": hgpo, "graphgpo": graphgpo, "g2po": g2po, "gagpo": gagpo, "empg": empg}
