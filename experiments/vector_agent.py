"""A whole training run as one function of arrays: rollout, estimator and update, to be mapped over settings and seeds.

The policy scores the admissible commands from the goal, the last text, what is in hand and which commands were given
before. What this leaves out against a language model: it reads texts as bags of pieces, it cannot say anything that is
not a possible command, its commands are one token, and it knows the goal as two types rather than from a sentence.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import vector_household as vh
from experiments.vector_household import Houses, State, Texts
from proxmo_jax.advantages import advantages
from proxmo_jax.losses import LossSettings, policy_loss
from proxmo_jax.types import Group, Settings, pytree


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

    text int32 [L] pieces; bag float32 [P], how often each is said; held bool [O], what is in hand; flags bool [4]: it
    is the target, it is as the goal wants it, a place of the goal is here, the lamp is here; used float32 [A], how
    often each command was given; last bool [A]; in_place bool [O], targets that lie where they should; possible bool
    [A].
    """

    text: Any
    bag: Any
    held: Any
    flags: Any
    used: Any
    last: Any
    in_place: Any
    possible: Any


class Scores(nn.Module):
    """Logits [A] of the commands in one house: the product of what the state calls for and what the command is.

    state = MLP(goal, text, hand); command = the sum of its words' embeddings, and of what was done with it before times
    a learned vector. Products and no [A, hidden] layer: a layer of each pair was three times as slow.
    """

    pieces: int
    hidden: int

    @nn.compact
    def __call__(self, house: Houses, seen: Seen) -> jax.Array:
        def table(name: str, rows: int) -> jax.Array:
            return self.param(name, nn.initializers.normal(0.3), (rows, self.hidden))

        receptacles, objects = house.receptacle.shape[0], house.object.shape[0]
        things = table("command_object", self.pieces)[house.object]  # [O, H]
        places = table("command_place", self.pieces)[house.receptacle]
        verbs = table("verb", len(vh.VERBS))
        target, lamp, place = (
            flag[:, None] * table(name, 1)
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

        # A product where a turn decides: the gradient of a look-up is a scatter, slow on a CPU.
        state = seen.bag @ table("text", self.pieces) / 4.0 + seen.held @ table("held", self.pieces)[house.object]
        state = state + seen.flags.astype(jnp.float32) @ table("flags", 4) + table("kind", 6)[house.kind]
        state = state + table("goal_target", self.pieces)[house.goal[0]]
        state = state + table("goal_place", self.pieces)[house.goal[1]]
        state = nn.Dense(self.hidden)(nn.relu(nn.Dense(2 * self.hidden)(nn.relu(state)))) + state
        wanted = nn.Dense(self.hidden)(nn.relu(state))
        logits = commands @ wanted + (table("history", 3) @ wanted) @ before
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


def show(house: Houses, state: State, text: jax.Array, pieces: int, used: jax.Array, last: jax.Array) -> Seen:
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
    return Seen(text, bag_of(text, pieces), in_hand, flags, used, last, in_place, vh.admissible(house, state))


def paraphrased(text: jax.Array, table: jax.Array, chance: jax.Array, key: jax.Array) -> jax.Array:
    """The text with each phrase that has other wordings said otherwise with this chance."""
    which, other = jax.random.split(key)
    choice = jax.random.randint(other, text.shape, 1, table.shape[1])
    return jnp.where(jax.random.uniform(which, text.shape) < chance, table[text, choice], text)


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
        seen = show(house, state, read, net.pieces, used, last)
        logits: Any = net.apply({"params": params}, house, seen)
        log_probs = jax.nn.log_softmax(logits)
        command = jax.random.categorical(draw, log_probs)
        after, said, won = vh.step(house, state, command)
        row = Rollout(seen, command, log_probs[command], ~done, won & ~done)
        chosen = jnp.arange(commands) == command
        following = (after, fit(said), used + chosen, chosen, done | won)
        kept = jax.tree.map(lambda new, old: jnp.where(done, old, new), following, carry)
        return kept, row

    zero = jnp.zeros(commands, jnp.float32)
    start = (vh.reset(house), fit(house.start), zero, zero > 0, jnp.bool_(False))
    return jax.lax.scan(turn, start, jax.random.split(key, spec.turns))[1]


def embed(bag: jax.Array, mask: jax.Array, words: jax.Array) -> jax.Array:
    """TF-IDF unit vectors [..., V] of bags of pieces [..., P], over all texts under the mask.

    The rule of `embeddings.tfidf`, by a product with the pieces' words: scattering sparse counts is a loop on a CPU.
    """
    counts = jnp.where(mask.reshape(-1, 1), bag.reshape(-1, bag.shape[-1]) @ words, 0.0)
    idf = jnp.log((1.0 + mask.sum()) / (1.0 + (counts > 0).sum(0))) + 1.0
    value = counts * idf
    norm = jnp.sqrt(jnp.square(value).sum(1, keepdims=True))
    return (value / jnp.where(norm > 0, norm, 1.0)).reshape(*mask.shape, -1)


def estimate(rollout: Rollout, settings: Settings, words: jax.Array, reward_scale: float) -> jax.Array:
    """Advantages [G, M, T]. Equal texts are told by a 32-bit sum of random numbers, one for each piece and place."""
    mask, text = rollout.mask, rollout.seen.text
    embedding = anchor = None
    if settings.aggregation == "soft":
        embedding = embed(rollout.seen.bag, mask, words)
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


def make_update(net: Scores, texts: Texts, spec: Spec, optimizer: optax.GradientTransformation):
    """(params, optimiser's state, houses [G], rollout, knobs) -> the first two: estimator, loss, optimiser's steps."""
    words = jnp.asarray(texts.words)

    def loss(params, at: Houses, rollout: Rollout, advantage, entropy):
        score = jax.vmap(jax.vmap(partial(net.apply, {"params": params}), (None, 0)), (0, 0))
        flat = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), rollout)
        logits: Any = score(at, flat.seen)
        parts = policy_loss(
            logits, flat.command, flat.mask, advantage.reshape(flat.mask.shape), flat.log_prob,
            flat.log_prob, LossSettings(kl_weight=0.0, entropy_weight=0.0),
        )  # fmt: skip
        return parts.policy - entropy * parts.entropy

    def update(params, opt_state, at: Houses, rollout: Rollout, knobs: Knobs):
        advantage = estimate(rollout, knobs.estimator, words, spec.reward_scale)
        if not knobs.estimator.episode_std:  # of about the same size for all, beside the entropy's weight
            advantage = advantage / spec.reward_scale
        for _ in range(spec.epochs):
            gradient = jax.grad(loss)(params, at, rollout, advantage, knobs.entropy)
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
    seen = show(house, vh.reset(house), house.start, net.pieces, none, none > 0)
    return net.init(key, house, seen)["params"]


def make_run(train: Houses, held_out: Houses, texts: Texts, spec: Spec):
    """(Knobs, key) -> curves: a run from fresh parameters, to be put under `vmap` and `jit`.

    Curves: `eval` float32 [iterations / eval_every + 1], success on every held-out house, sampled as in training;
    `success`, `mixed` (share of groups with wins and losses), `turns`, `log_prob` (of the commands given) float32
    [iterations / eval_every], means of the training rollouts since the last evaluation; `by_kind` [6], the last
    evaluation by task type.
    """
    net = Scores(len(texts.pieces), spec.hidden)
    paraphrases = jnp.asarray(texts.paraphrases)
    optimizer = make_optimizer()
    update = make_update(net, texts, spec, optimizer)
    houses = len(train.kind)

    def rollout(params, at: Houses, members: int, chance, key) -> Rollout:
        keys = jax.random.split(key, (len(at.kind), members))
        one = partial(play, params, net)
        return jax.vmap(
            lambda house, keys: jax.vmap(lambda key: one(house, spec, paraphrases, chance, key))(keys)
        )(at, keys)  # fmt: skip

    def evaluate(params, knobs: Knobs, key):
        won = rollout(params, held_out, 1, knobs.paraphrase, key).won.any((1, 2))
        return won.astype(jnp.float32)

    def iteration(carry, key, knobs: Knobs):
        params, opt_state = carry
        draw, playing = jax.random.split(key)
        at = vh.pick(train, jax.random.choice(draw, houses, (spec.groups,), replace=False))
        played = rollout(params, at, spec.members, knobs.paraphrase, playing)
        params, opt_state = update(params, opt_state, at, played, knobs)
        wins = played.won.any(-1)
        share = wins.mean(-1)
        row = {
            "success": wins.mean(),
            "mixed": ((share > 0) & (share < 1)).mean(),
            "turns": played.mask.sum(-1).mean(),
            "log_prob": jnp.where(played.mask, played.log_prob, 0.0).sum() / played.mask.sum(),
        }
        return (params, opt_state), row

    def run(knobs: Knobs, key: jax.Array) -> dict[str, jax.Array]:
        start, examining, training = jax.random.split(key, 3)
        params = fresh(net, vh.pick(train, 0), start)
        opt_state = optimizer.init(params)
        opt_state.hyperparams["learning_rate"] = jnp.asarray(knobs.learning_rate, jnp.float32)

        def part(carry, keys):
            carry, rows = jax.lax.scan(partial(iteration, knobs=knobs), carry, keys)
            won = evaluate(carry[0], knobs, examining)
            return carry, ({name: x.mean() for name, x in rows.items()}, won)

        parts = spec.iterations // spec.eval_every
        keys = jax.random.split(training, (parts, spec.eval_every))
        before = evaluate(params, knobs, examining)
        _, (curves, won) = jax.lax.scan(part, (params, opt_state), keys)
        kind = jnp.asarray(held_out.kind)
        by_kind = jax.vmap(lambda k: (won[-1] * (kind == k)).sum() / jnp.maximum((kind == k).sum(), 1))(jnp.arange(6))
        success = jnp.concatenate([before.mean()[None], won.mean(1)])
        return {**curves, "eval": success, "by_kind": by_kind}

    return run
