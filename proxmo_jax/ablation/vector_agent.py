"""A whole training run as one function of arrays: rollout, estimator and update, to be mapped over settings and seeds.

The policy scores the admissible commands from the goal, the last text, what is in hand and which commands were given
before. What this leaves out against a language model: it reads texts as bags of pieces, it cannot say anything that is
not a possible command, its commands are one token, and it knows the goal as two types rather than from a sentence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from proxmo_jax.ablation import vector_household as vh
from proxmo_jax.ablation.vector_household import Houses, State, Texts
from proxmo_jax.estimator.estimator import advantages
from proxmo_jax.estimator.types import Group, Settings, pytree
from proxmo_jax.training.losses import LossSettings, policy_loss


@dataclass(frozen=True)
class Spec:
    """What is the same in all runs of a study; a program is compiled for each.

    groups, members, turns: the rectangle of a rollout. iterations: updates; evaluated every `eval_every` of them and at
    the start. hidden: width of the policy. paraphrases: whether texts are said otherwise by chance (`Knobs`).
    """

    groups: int = 8
    members: int = 8
    turns: int = 20
    iterations: int = 160
    eval_every: int = 10
    hidden: int = 32
    epochs: int = 1
    reward_scale: float = 10.0
    paraphrases: bool = False


@pytree
@dataclass(frozen=True)
class Knobs:
    """What runs of one program may differ in: the estimator's floats, the learning rate, the weight of the entropy, and
    the chance that a phrase of a text is said otherwise (if `Spec.paraphrases`)."""

    estimator: Settings
    learning_rate: Any = 0.01
    entropy: Any = 0.01
    paraphrase: Any = 0.0


class Seen(NamedTuple):
    """What the policy is shown at a turn.

    text int32 [L] pieces; held bool [O], what is in hand; flags bool [4]: it is the target, it is as the goal wants it,
    a place of the goal is here, the lamp is here; used float32 [A], how often each command was given; last bool [A];
    in_place bool [O], targets that lie where they should; possible bool [A].
    """

    text: Any
    held: Any
    flags: Any
    used: Any
    last: Any
    in_place: Any
    possible: Any


# The policy's tables and how many rows each has; 0: as many as there are pieces.
TABLES = {
    "command_object": 0, "command_place": 0, "verb": len(vh.VERBS), "target": 1, "lamp": 1, "place": 1, "text": 0,
    "held": 0, "flags": 4, "kind": 6, "goal_target": 0, "goal_place": 0, "history": 3,
}  # fmt: skip


class Scores(nn.Module):
    """Logits [A] of the commands in one house: the product of what the state calls for and what the command is.

    state = MLP(goal, text, hand); command = the sum of its words' embeddings, and of what was done with it before times
    a learned vector. Products and no [A, hidden] layer: a layer of each pair was three times as slow.
    """

    pieces: int
    hidden: int

    @nn.compact
    def __call__(self, house: Houses, seen: Seen, bag: jax.Array | None = None) -> jax.Array:
        """bag: `bag_of` the text, to be given where there is a gradient; the same without is faster."""

        # One parameter, cut up: a draw of random numbers for each table is most of what there is to compile.
        rows = {name: self.pieces if rows == 0 else rows for name, rows in TABLES.items()}
        tables = self.param("tables", nn.initializers.normal(0.3), (sum(rows.values()), self.hidden))
        table = dict(zip(rows, jnp.split(tables, np.cumsum(list(rows.values()))[:-1]), strict=True))
        receptacles, objects = house.receptacle.shape[0], house.object.shape[0]
        things = table["command_object"][house.object]  # [O, H]
        places = table["command_place"][house.receptacle]
        verbs = table["verb"]
        target, lamp, place = (
            flag[:, None] * table[name]
            for name, flag in (("target", house.target), ("lamp", house.lamp), ("place", house.place))
        )
        about = things + target + lamp
        commands = jnp.concatenate(
            [
                verbs[: len(vh.COMMANDS)],
                verbs[vh.GO] + places + place,
                verbs[vh.TAKE] + about,
                verbs[vh.USE] + about,
                verbs[vh.SLICE] + about,
            ]
        )
        done = jnp.pad(seen.in_place, (len(vh.COMMANDS) + receptacles, 2 * objects))  # of commands to take
        before = jnp.stack([jnp.log1p(seen.used), seen.last.astype(jnp.float32), done.astype(jnp.float32)])

        # A product where there is a gradient: that of a look-up is a scatter, slow on a CPU.
        said = table["text"]
        state = (said[seen.text] * (seen.text > 0)[:, None]).sum(0) if bag is None else bag @ said
        state = state / 4.0 + seen.held @ table["held"][house.object]
        state = state + seen.flags.astype(jnp.float32) @ table["flags"] + table["kind"][house.kind]
        state = state + table["goal_target"][house.goal[0]]
        state = state + table["goal_place"][house.goal[1]]
        state = nn.Dense(self.hidden)(nn.relu(nn.Dense(2 * self.hidden)(nn.relu(state)))) + state
        wanted = nn.Dense(self.hidden)(nn.relu(state))
        logits = commands @ wanted + (table["history"] @ wanted) @ before
        return jnp.where(seen.possible, logits, -1e9)


class Rollout(NamedTuple):
    """[G, M, T, ...]: what was shown, what was done; mask of turns that happened; won [G, M, T], at the turn."""

    seen: Any
    command: Any
    log_prob: Any
    mask: Any
    won: Any


def bag_of(text: jax.Array, pieces: int) -> jax.Array:
    """How often each piece is said in texts [..., L]: float32 [..., P]; piece 0 says nothing.

    Compared with every piece: a scatter would be a loop on a CPU.
    """
    return ((text[..., None] == jnp.arange(pieces)) & (text[..., None] > 0)).sum(-2).astype(jnp.float32)


def show(house: Houses, state: State, text: jax.Array, used: jax.Array, last: jax.Array) -> Seen:
    """What the policy is shown of a state."""
    held, here = state.held, state.here
    ready = jnp.select(
        [house.state == 1, house.state == 2, house.state == 3], [state.clean, state.hot, state.cool], True
    )

    def at(table, index):
        return (index >= 0) & table[jnp.maximum(index, 0)]

    flags = jnp.stack(
        [at(house.target, held), at(house.target & ready, held), at(house.place, here),
         (here >= 0) & (house.lamp & (state.inside == here)).any()]
    )  # fmt: skip
    where = jnp.maximum(state.inside, 0)
    in_place = house.target & ready & (state.inside >= 0) & house.place[where]
    in_hand = jnp.arange(house.object.shape[0]) == held
    return Seen(text, in_hand, flags, used, last, in_place, vh.admissible(house, state))


def paraphrased(text: jax.Array, table: jax.Array, chance: jax.Array, key: jax.Array) -> jax.Array:
    """The text with each phrase that has other wordings said otherwise with this chance."""
    which, other = jax.random.split(key)
    choice = jax.random.randint(other, text.shape, 1, table.shape[1])
    return jnp.where(jax.random.uniform(which, text.shape) < chance, table[text, choice], text)


def choose(log_probs: jax.Array, uniform: jax.Array) -> jax.Array:
    """The command that a number in [0, 1) falls to: one random number, where Gumbel noise is one for each command."""
    chance = jnp.exp(log_probs)
    upper = jnp.tril(jnp.ones((len(chance), len(chance)))) @ chance
    return jnp.argmax((upper > uniform * upper[-1]) & (chance > 0))


def play(
    params, net: Scores, house: Houses, spec: Spec, paraphrases: jax.Array, chance: jax.Array, key: jax.Array
) -> Rollout:
    """One episode; arrays [T, ...]."""
    length = max(house.start.shape[0], 9 + 3 * house.object.shape[0])
    commands = len(vh.COMMANDS) + house.receptacle.shape[0] + 3 * house.object.shape[0]

    def fit(text):
        return jnp.pad(text, (0, length - text.shape[0]))

    def turn(carry, key):
        state, text, used, last, done = carry
        draw, noise = jax.random.split(key)
        read = paraphrased(text, paraphrases, chance, noise) if spec.paraphrases else text
        seen = show(house, state, read, used, last)
        logits: Any = net.apply({"params": params}, house, seen)
        log_probs = jax.nn.log_softmax(logits)
        command = choose(log_probs, jax.random.uniform(draw))
        after, said, won = vh.step(house, state, command)
        row = Rollout(seen, command, log_probs[command], ~done, won & ~done)
        chosen = jnp.arange(commands) == command
        following = (after, fit(said), used + chosen, chosen, done | won)
        kept = jax.tree.map(lambda new, old: jnp.where(done, old, new), following, carry)
        return kept, row

    zero = jnp.zeros(commands, jnp.float32)
    start = (vh.reset(house), fit(house.start), zero, zero > 0, jnp.bool_(False))
    return jax.lax.scan(turn, start, jax.random.split(key, spec.turns))[1]


def merged(words: np.ndarray) -> np.ndarray:
    """Words float32 [P, V] with those that every piece says equally often made one, times the root of how many they
    are: such words have one document frequency, so that no similarity changes."""
    distinct, alike = np.unique(words, axis=1, return_counts=True)
    return distinct * np.sqrt(alike, dtype=np.float32)


def embed(bag: jax.Array, mask: jax.Array, words: jax.Array) -> jax.Array:
    """TF-IDF unit vectors [..., V] of bags of pieces [..., P], over all texts under the mask.

    The rule of `embeddings.tfidf`, by a product with the pieces' words: scattering sparse counts is a loop on a CPU.
    """
    counts = jnp.where(mask.reshape(-1, 1), bag.reshape(-1, bag.shape[-1]) @ words, 0.0)
    idf = jnp.log((1.0 + mask.sum()) / (1.0 + (counts > 0).sum(0))) + 1.0
    value = counts * idf
    norm = jnp.sqrt(jnp.square(value).sum(1, keepdims=True))
    return (value / jnp.where(norm > 0, norm, 1.0)).reshape(*mask.shape, -1)


def estimate(rollout: Rollout, bag: jax.Array, settings: Settings, words: jax.Array, reward_scale: float) -> jax.Array:
    """Advantages [G, M, T]; bag: of the rollout's texts.

    Equal texts are told by a 32-bit sum of random numbers, one for each piece and place.
    """
    mask, text = rollout.mask, rollout.seen.text
    embedding = anchor = None
    if settings.aggregation == "soft":
        embedding = embed(bag, mask, words)
    if settings.aggregation == "hard":
        numbers = np.random.default_rng(0).integers(0, 2**32, (words.shape[0], text.shape[-1]), np.uint32)
        anchor = jnp.asarray(numbers)[text, jnp.arange(text.shape[-1])].sum(-1).astype(jnp.int32)
    group = Group(
        reward=reward_scale * rollout.won.astype(jnp.float32),
        mask=mask,
        success=rollout.won.any(-1),
        action_valid=mask,
        anchor=anchor,
        embedding=embedding,
    )
    return jax.vmap(advantages, (0, None))(group, settings).joint


def make_update(net: Scores, texts: Texts, spec: Spec, optimizer: optax.GradientTransformation, kinds: Sequence):
    """(params, optimiser's state, houses [G], rollout, knobs, kind) -> the first two: estimator, loss, optimiser's
    steps. kind int32 []: whose of `kinds` the static choices of the estimator are."""
    words = jnp.asarray(merged(texts.words))

    def loss(params, at: Houses, rollout: Rollout, bag, advantage, entropy):
        score = jax.vmap(jax.vmap(partial(net.apply, {"params": params}), (None, 0, 0)), (0, 0, 0))
        flat = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), rollout)
        logits: Any = score(at, flat.seen, bag.reshape(*flat.mask.shape, -1))
        parts = policy_loss(
            logits, flat.command, flat.mask, advantage.reshape(flat.mask.shape), flat.log_prob,
            flat.log_prob, LossSettings(kl_weight=0.0, entropy_weight=0.0),
        )  # fmt: skip
        return parts.policy - entropy * parts.entropy

    def advantage_by(choices: Settings, rollout: Rollout, bag: jax.Array, floats: Settings) -> jax.Array:
        settings = jax.tree.unflatten(jax.tree.structure(choices), jax.tree.leaves(floats))
        advantage = estimate(rollout, bag, settings, words, spec.reward_scale)
        # Of about the same size for all, beside the entropy's weight.
        return advantage if settings.episode_std else advantage / spec.reward_scale

    def update(params, opt_state, at: Houses, rollout: Rollout, knobs: Knobs, kind: jax.Array):
        bag = bag_of(rollout.seen.text, net.pieces)
        branches = [partial(advantage_by, choices) for choices in kinds]
        advantage = jax.lax.switch(kind, branches, rollout, bag, knobs.estimator)
        for _ in range(spec.epochs):
            gradient = jax.grad(loss)(params, at, rollout, bag, advantage, knobs.entropy)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, opt_state

    return update


def make_optimizer() -> optax.GradientTransformation:
    """Adam whose learning rate is part of its state, so that it may differ between runs of one program."""
    return optax.inject_hyperparams(optax.adam)(learning_rate=0.01, b2=0.99)


def fresh(net: Scores, house: Houses, key: jax.Array):
    """Parameters that have learned nothing."""
    commands = len(vh.COMMANDS) + house.receptacle.shape[0] + 3 * house.object.shape[0]
    none = jnp.zeros(commands)
    seen = show(house, vh.reset(house), house.start, none, none > 0)
    return net.init(key, house, seen)["params"]


def make_run(train: Houses, held_out: Houses, texts: Texts, spec: Spec, kinds: Sequence[Settings]):
    """(Knobs, key, kind) -> curves: a run from fresh parameters, to be put under `vmap` and `jit`.

    kinds: settings of the estimator whose static choices runs may have; kind int32 [] says whose a run has, and is to
    be the same for all runs under a `vmap`, so that no estimator is computed but theirs.

    Curves: `eval` float32 [iterations / eval_every + 1], success on every held-out house, sampled as in training;
    `success`, `mixed` (share of groups with wins and losses), `turns`, `log_prob` (of the commands given) float32
    [iterations / eval_every], means of the training rollouts since the last evaluation; `by_kind` [6], the last
    evaluation by task type.

    Training and evaluation take turns in one loop of equal rollouts: two loops would be compiled apart, the household
    and the policy in each.
    """
    net = Scores(len(texts.pieces), spec.hidden)
    paraphrases = jnp.asarray(texts.paraphrases)
    optimizer = make_optimizer()
    update = make_update(net, texts, spec, optimizer, kinds)
    houses = jax.tree.map(lambda *x: jnp.concatenate(x), train, held_out)
    known, unknown, attempts = len(train.kind), len(held_out.kind), spec.groups * spec.members
    passes, parts = -(-unknown // attempts), spec.iterations // spec.eval_every
    # An evaluation, `eval_every` iterations, and so on, an evaluation; the last pass of one is filled up.
    learns = np.array(([False] * passes + [True] * spec.eval_every) * parts + [False] * passes)
    examined = known + np.arange(passes * attempts).reshape(passes, attempts) % unknown
    number = np.where(learns, passes + np.cumsum(learns) - 1, np.arange(len(learns)) % (passes + spec.eval_every))

    def one(carry, step, knobs: Knobs, kind: jax.Array):
        params, opt_state = carry
        key, learning, examined = step
        draw, playing = jax.random.split(key)
        drawn = jax.random.choice(draw, known, (spec.groups,), replace=False)
        at = vh.pick(houses, jnp.where(learning, jnp.repeat(drawn, spec.members), examined))
        episode = partial(play, params, net, spec=spec, paraphrases=paraphrases, chance=knobs.paraphrase)
        played = jax.vmap(lambda house, key: episode(house, key=key))(at, jax.random.split(playing, attempts))
        rollout = jax.tree.map(lambda x: x.reshape(spec.groups, spec.members, *x.shape[1:]), played)

        def learn(params, opt_state):
            return update(params, opt_state, vh.pick(houses, drawn), rollout, knobs, kind)

        carry = jax.lax.cond(learning, learn, lambda *kept: kept, params, opt_state)
        won = played.won.any(1)
        share = won.reshape(spec.groups, spec.members).mean(1)
        row = {
            "success": won.mean(),
            "mixed": ((share > 0) & (share < 1)).mean(),
            "turns": played.mask.sum(1).mean(),
            "log_prob": jnp.where(played.mask, played.log_prob, 0.0).sum() / played.mask.sum(),
        }
        return carry, (row, won)

    def run(knobs: Knobs, key: jax.Array, kind: jax.Array | int = 0) -> dict[str, jax.Array]:
        start, examining, training = jax.random.split(key, 3)
        params = fresh(net, vh.pick(train, 0), start)
        opt_state = optimizer.init(params)
        opt_state.hyperparams["learning_rate"] = jnp.asarray(knobs.learning_rate, jnp.float32)
        keys = jnp.concatenate([jax.random.split(examining, passes), jax.random.split(training, spec.iterations)])
        steps = keys[number], jnp.asarray(learns), jnp.asarray(examined[np.where(learns, 0, number)])
        body = partial(one, knobs=knobs, kind=jnp.asarray(kind))
        _, (rows, won) = jax.lax.scan(body, (params, opt_state), steps)
        won = won[~learns].reshape(parts + 1, -1)[:, :unknown].astype(jnp.float32)
        curves = {name: x[learns].reshape(parts, spec.eval_every).mean(1) for name, x in rows.items()}
        kinds_of_task = jnp.asarray(held_out.kind)
        by_kind = jax.vmap(
            lambda k: (won[-1] * (kinds_of_task == k)).sum() / jnp.maximum((kinds_of_task == k).sum(), 1)
        )(jnp.arange(6))
        return {**curves, "eval": won.mean(1), "by_kind": by_kind}

    return run
