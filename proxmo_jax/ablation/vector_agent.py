"""A whole training run as one function of arrays: rollout, estimator and update, mapped over settings and seeds.

The policy scores the admissible commands from the goal, the last text, the object in hand and the earlier commands. Its
limits compared with a language model: it reads texts as bags of pieces, it can only choose admissible commands, a
command is one token, and the goal is given as two types instead of a sentence.
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
from proxmo_jax.estimator.states import at_next
from proxmo_jax.estimator.types import Group, Settings, pytree
from proxmo_jax.training.losses import LossSettings, policy_loss


@dataclass(frozen=True)
class Spec:
    """Static sizes of runs; a program is compiled for each.

    groups, members, turns: the shape of a rollout. iterations: number of updates; the policy is evaluated at the start
    and every `eval_every` of them. hidden: width of the policy. paraphrases: whether texts are paraphrased (`Knobs`).
    states: whether equal observations must also be of equal states of the house, as in GraphGPO's recipe.
    """

    groups: int = 8
    members: int = 8
    turns: int = 20
    iterations: int = 160
    eval_every: int = 10
    hidden: int = 32
    reward_scale: float = 10.0
    paraphrases: bool = False
    states: bool = False


@pytree
@dataclass(frozen=True)
class Knobs:
    """Values in which runs of one program may differ; under `vmap` each is a scalar.

    estimator: its floats. learning_rate. entropy: coefficient of the entropy bonus. paraphrase: probability that a
    phrase of a text is paraphrased (if `Spec.paraphrases`).
    """

    estimator: Settings
    learning_rate: float | jax.Array = 0.01
    entropy: float | jax.Array = 0.01
    paraphrase: float | jax.Array = 0.0


class Seen(NamedTuple):
    """The policy's input in a turn.

    text int32 [L]: pieces. bag float32 [P]: `bag_of` it. held bool [O]: the object in hand. flags bool [4]: the object
    in hand is a target; it is in the goal's state; a receptacle of the goal is here; the lamp is here. used float32
    [A]: log(1 + how often each command was given). last float32 [A]: 1 for the previous command. in_place bool [O]:
    targets that are where the goal wants them. possible int8 [A]: 1 for admissible commands (XLA for CPUs copies bools
    slowly).
    """

    text: jax.Array
    bag: jax.Array
    held: jax.Array
    flags: jax.Array
    used: jax.Array
    last: jax.Array
    in_place: jax.Array
    possible: jax.Array


# Rows of each of the policy's embedding tables; 0: the number of pieces.
TABLES = {
    "command_object": 0, "command_place": 0, "verb": len(vh.VERBS), "target": 1, "lamp": 1, "place": 1, "text": 0,
    "held": 0, "flags": 4, "kind": 6, "goal_target": 0, "goal_place": 0, "history": 3,
}  # fmt: skip


class Scores(nn.Module):
    """Logits [A] of the commands in one house: inner products of a state vector and command vectors.

    state = MLP(goal, text, object in hand); command = the sum of the embeddings of its words, plus learned vectors
    times its history. There is no [A, hidden] layer: a layer over pairs was three times as slow.
    """

    pieces: int
    hidden: int

    @nn.compact
    def __call__(self, house: Houses, seen: Seen) -> jax.Array:
        """Score the commands.

        Args:
            house: one house.
            seen: the input of one turn.

        Returns:
            float32 [A], -1e9 for commands that are not admissible.
        """

        # One parameter, split into tables: a random draw per table would dominate the compile time.
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
        # A product, since the gradient of a look-up is a scatter, which is slow on a CPU.
        state = seen.bag @ table["text"] / 4.0 + seen.held @ table["held"][house.object]
        state = state + seen.flags.astype(jnp.float32) @ table["flags"] + table["kind"][house.kind]
        state = state + table["goal_target"][house.goal[0]]
        state = state + table["goal_place"][house.goal[1]]
        state = nn.Dense(self.hidden)(nn.relu(nn.Dense(2 * self.hidden)(nn.relu(state)))) + state
        wanted = nn.Dense(self.hidden)(nn.relu(state))
        # Sums instead of a product with stacked rows, which XLA for CPUs would copy twice to transpose them.
        often, again, placed = table["history"] @ wanted
        logits = commands @ wanted + often * seen.used + again * seen.last + placed * done
        return jnp.where(seen.possible > 0, logits, -1e9)


class Rollout(NamedTuple):
    """Episodes [G, M, T]: inputs, commands int32, their log-probabilities float32, mask bool of the turns that
    happened, and won bool in the turn that wins. ending int32 [G, M, L]: the text after the last command, which only
    distances to the goal need. state int32 [G, M, T] and last_state [G, M]: `state_number` where texts and the ending
    are read, for `Spec.states`."""

    seen: Seen
    command: jax.Array
    log_prob: jax.Array
    mask: jax.Array
    won: jax.Array
    ending: jax.Array | None = None
    state: jax.Array | None = None
    last_state: jax.Array | None = None


def bag_of(text: jax.Array, pieces: int) -> jax.Array:
    """Counts of each piece in texts.

    Every position is compared with every piece: a scatter is slow on a CPU. Eight positions at a time, in 16 bits, so
    that the counts seldom pass through memory (hard houses: 3 ms a rollout; one position at a time in float32 takes 18,
    a scatter 33).

    Args:
        text: int32 [..., L]; piece 0 is padding.
        pieces: number of pieces, P; below 2^15.

    Returns:
        float32 [..., P].
    """
    number = jnp.arange(pieces, dtype=jnp.int16)

    def count(total, piece):
        return total + (piece[..., None] == number), None

    empty, positions = jnp.zeros((*text.shape[:-1], pieces), jnp.int16), jnp.moveaxis(text.astype(jnp.int16), -1, 0)
    total, _ = jax.lax.scan(count, empty, positions, unroll=8)
    return jnp.where(number > 0, total, 0).astype(jnp.float32)


def show(house: Houses, state: State, text: jax.Array, pieces: int, used: jax.Array, last: jax.Array) -> Seen:
    """The policy's input for a state; pieces: their number."""
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
    return Seen(
        text, bag_of(text, pieces), in_hand, flags, used, last, in_place, vh.admissible(house, state).astype(jnp.int8)
    )


def paraphrased(text: jax.Array, table: jax.Array, chance: float | jax.Array, key: jax.Array) -> jax.Array:
    """Paraphrase each phrase of a text that has paraphrases with a given probability.

    Args:
        text: int32 [L], pieces.
        table: int32 [P, 4], `Texts.paraphrases`.
        chance: the probability, a scalar.
        key: of the random draws.

    Returns:
        int32 [L].
    """
    which, other = jax.random.split(key)
    choice = jax.random.randint(other, text.shape, 1, table.shape[1])
    return jnp.where(jax.random.uniform(which, text.shape) < chance, table[text, choice], text)


def choose(log_probs: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draw a command by inverse transform sampling: one random number, where Gumbel noise needs one per command.

    Args:
        log_probs: float32 [A].
        uniform: float32 [], a random number in [0, 1).

    Returns:
        int32 [].
    """
    chance = jnp.exp(log_probs)
    upper = jnp.tril(jnp.ones((len(chance), len(chance)))) @ chance
    return jnp.argmax((upper > uniform * upper[-1]) & (chance > 0))


def play(
    params, net: Scores, house: Houses, spec: Spec, paraphrases: jax.Array, chance: float | jax.Array,
    key: jax.Array,
) -> Rollout:  # fmt: skip
    """Play one episode; arrays [T, ...], and its ending [L]."""
    length = max(house.start.shape[0], 9 + 3 * house.object.shape[0])
    commands = len(vh.COMMANDS) + house.receptacle.shape[0] + 3 * house.object.shape[0]

    def fit(text):
        return jnp.pad(text, (0, length - text.shape[0]))

    def worded(text, key):
        return paraphrased(text, paraphrases, chance, key) if spec.paraphrases else text

    def turn(carry, key):
        state, text, times, used, last, done = carry
        draw, noise = jax.random.split(key)
        read = worded(text, noise)
        seen = show(house, state, read, net.pieces, used, last)
        logits: Any = net.apply({"params": params}, house, seen)
        log_probs = jax.nn.log_softmax(logits)
        command = choose(log_probs, jax.random.uniform(draw))
        after, reply, won = vh.step(house, state, command)
        here = state_number(state) if spec.states else None
        row = Rollout(seen, command, log_probs[command], ~done, won & ~done, state=here)
        chosen = (jnp.arange(commands) == command).astype(jnp.float32)
        used = jnp.where(chosen > 0, jnp.log1p(times[command] + 1.0), used)
        following = (after, fit(reply), times + chosen, used, chosen, done | won)
        kept = jax.tree.map(lambda new, old: jnp.where(done, old, new), following, carry)
        return kept, row

    zero = jnp.zeros(commands, jnp.float32)
    start = (vh.reset(house), fit(house.start), zero, zero, zero, jnp.bool_(False))
    (state, text, *_), rollout = jax.lax.scan(turn, start, jax.random.split(key, spec.turns))
    ending = worded(text, jax.random.fold_in(key, spec.turns))
    return rollout._replace(ending=ending, last_state=state_number(state) if spec.states else None)


def state_number(state: State) -> jax.Array:
    """A number of a state of a house, int32 []: its values times random numbers, added up. States that differ have the
    same by a chance of 2^-32."""
    values = jnp.concatenate([jnp.ravel(x).astype(jnp.uint32) for x in state])
    numbers = np.random.default_rng(1).integers(0, 2**32, values.shape, np.uint32)
    return (values * numbers).sum().astype(jnp.int32)


def merged(words: np.ndarray) -> np.ndarray:
    """Merge words with equal counts in all pieces: one column per distinct column of float32 [P, V].

    A merged column is scaled by the square root of the number of its words. Such words have the same document
    frequency, so similarities do not change.
    """
    distinct, alike = np.unique(words, axis=1, return_counts=True)
    return distinct * np.sqrt(alike, dtype=np.float32)


def embed(bag: jax.Array, mask: jax.Array, words: jax.Array) -> jax.Array:
    """TF-IDF unit vectors of bags of pieces, with document frequencies over all texts under the mask.

    The same values as `embeddings.tfidf`, computed by a product with the words of the pieces: scattering sparse counts
    is a loop on a CPU.

    Args:
        bag: float32 [..., P].
        mask: bool [...].
        words: float32 [P, V], word counts of the pieces.

    Returns:
        float32 [..., V].
    """
    counts = jnp.where(mask.reshape(-1, 1), bag.reshape(-1, bag.shape[-1]) @ words, 0.0)
    idf = jnp.log((1.0 + mask.sum()) / (1.0 + (counts > 0).sum(0))) + 1.0
    value = counts * idf
    norm = jnp.sqrt(jnp.square(value).sum(1, keepdims=True))
    return (value / jnp.where(norm > 0, norm, 1.0)).reshape(*mask.shape, -1)


def estimate(rollout: Rollout, settings: Settings, words: jax.Array, reward_scale: float) -> jax.Array:
    """Joint advantages of a rollout.

    Exact matching and the graph of observations compare 32-bit hashes of texts: sums of random numbers, one for each
    piece and position; with states (`Spec.states`) plus their numbers.

    Args:
        rollout: [G, M, T]; with its ending for the score distance.
        settings: of the estimator.
        words: float32 [P, V], word counts of the pieces.
        reward_scale: the reward of a win.

    Returns:
        float32 [G, M, T].
    """
    mask, text = rollout.mask, rollout.seen.text
    numbers = np.random.default_rng(0).integers(0, 2**32, (words.shape[0], text.shape[-1]), np.uint32)

    def hashed(text, state):
        of_text = jnp.asarray(numbers)[text, jnp.arange(text.shape[-1])].sum(-1).astype(jnp.int32)
        return of_text if state is None else of_text + state

    embedding = anchor = edge = None
    if settings.aggregation == "soft":
        embedding = embed(rollout.seen.bag, mask, words)
    if settings.aggregation == "hard":
        anchor = hashed(text, rollout.state)
    if settings.score == "distance" and rollout.ending is not None:
        here, last = hashed(text, rollout.state), hashed(rollout.ending, rollout.last_state)
        edge = jnp.stack([here, jax.vmap(at_next)(here, mask, last)], -1)
    group = Group(
        reward=reward_scale * rollout.won.astype(jnp.float32),
        mask=mask,
        success=rollout.won.any(-1),
        action_valid=mask,
        anchor=anchor,
        embedding=embedding,
        edge=edge,
    )
    return jax.vmap(advantages, (0, None))(group, settings).joint


def standardised(settings: Settings) -> bool:
    """Whether the advantages are in standard deviations, by the episode part if there is one; else they are rewards."""
    if settings.episode_over != "none":
        return settings.episode_std
    return settings.step_std and (settings.score != "td" or settings.standardize)


def make_update(net: Scores, texts: Texts, spec: Spec, optimizer: optax.GradientTransformation, kinds: Sequence):
    """Make the update of the policy: estimator, loss and optimizer steps.

    Returns:
        A function (params, optimizer state, houses [G], rollout, knobs, kind) -> (params, optimizer state). kind
        int32 []: the index in `kinds` of the static settings of the estimator.
    """
    words = jnp.asarray(merged(texts.words))

    def loss(params, at: Houses, rollout: Rollout, advantage, entropy):
        score = jax.vmap(jax.vmap(partial(net.apply, {"params": params}), (None, 0)))
        turns = rollout._replace(ending=None, state=None, last_state=None)
        flat = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), turns)
        logits: Any = score(at, flat.seen)
        parts = policy_loss(
            logits, flat.command, flat.mask, advantage.reshape(flat.mask.shape), flat.log_prob,
            flat.log_prob, LossSettings(kl_coef=0.0, entropy_coef=0.0),
        )  # fmt: skip
        return parts.policy - entropy * parts.entropy

    def advantage_by(choices: Settings, rollout: Rollout, floats: Settings) -> jax.Array:
        settings = jax.tree.unflatten(jax.tree.structure(choices), jax.tree.leaves(floats))
        advantage = estimate(rollout, settings, words, spec.reward_scale)
        # Advantages of similar size for all estimators, relative to the entropy bonus.
        return advantage if standardised(settings) else advantage / spec.reward_scale

    def update(params, opt_state, at: Houses, rollout: Rollout, knobs: Knobs, kind: jax.Array):
        branches = [partial(advantage_by, choices) for choices in kinds]
        advantage = jax.lax.switch(kind, branches, rollout, knobs.estimator)
        gradient = jax.grad(loss)(params, at, rollout, advantage, knobs.entropy)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return update


def make_optimizer() -> optax.GradientTransformation:
    """Adam with the learning rate in its state, so that it may differ between runs of one program."""
    return optax.inject_hyperparams(optax.adam)(learning_rate=0.01, b2=0.99)


def fresh(net: Scores, house: Houses, key: jax.Array):
    """Initial parameters."""
    commands = len(vh.COMMANDS) + house.receptacle.shape[0] + 3 * house.object.shape[0]
    none = jnp.zeros(commands)
    seen = show(house, vh.reset(house), house.start, net.pieces, none, none)
    return net.init(key, house, seen)["params"]


def make_run(train: Houses, held_out: Houses, texts: Texts, spec: Spec, kinds: Sequence[Settings]):
    """Make a run from initial parameters, to be mapped with `vmap` and compiled with `jit`.

    Training and evaluation alternate in one loop over rollouts of one shape: two loops would compile household and
    policy twice.

    Args:
        train: houses for training.
        held_out: houses for evaluation.
        texts: of both.
        spec: static sizes.
        kinds: settings of the estimator, one for each combination of static settings that runs may have.

    Returns:
        A function (Knobs, key, kind) -> curves. kind int32 [] is an index into `kinds`; it must be the same for all
        runs under a `vmap`, so that no other estimator is computed. The curves are `eval` float32
        [iterations / eval_every + 1], success in all held-out houses, with commands sampled as in training; `success`,
        `mixed` (share of groups with wins and losses), `turns`, `log_prob` (of the commands drawn) float32
        [iterations / eval_every], means of the training rollouts since the previous evaluation; and `by_kind` float32
        [6], the last evaluation by task type.
    """
    net = Scores(len(texts.pieces), spec.hidden)
    paraphrases = jnp.asarray(texts.paraphrases)
    optimizer = make_optimizer()
    update = make_update(net, texts, spec, optimizer, kinds)
    houses = jax.tree.map(lambda *x: jnp.concatenate(x), train, held_out)
    known, unseen, episodes = len(train.kind), len(held_out.kind), spec.groups * spec.members
    passes, parts = -(-unseen // episodes), spec.iterations // spec.eval_every
    # Alternate an evaluation and `eval_every` iterations, end with an evaluation; its last pass is padded.
    learns = np.array(([False] * passes + [True] * spec.eval_every) * parts + [False] * passes)
    examined = known + np.arange(passes * episodes).reshape(passes, episodes) % unseen
    number = np.where(learns, passes + np.cumsum(learns) - 1, np.arange(len(learns)) % (passes + spec.eval_every))

    def one(carry, step, knobs: Knobs, kind: jax.Array):
        params, opt_state = carry
        key, learning, examined = step
        draw, playing = jax.random.split(key)
        drawn = jax.random.choice(draw, known, (spec.groups,), replace=False)
        at = vh.pick(houses, jnp.where(learning, jnp.repeat(drawn, spec.members), examined))
        episode = partial(play, params, net, spec=spec, paraphrases=paraphrases, chance=knobs.paraphrase)
        played = jax.vmap(lambda house, key: episode(house, key=key))(at, jax.random.split(playing, episodes))
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
        won = won[~learns].reshape(parts + 1, -1)[:, :unseen].astype(jnp.float32)
        curves = {name: x[learns].reshape(parts, spec.eval_every).mean(1) for name, x in rows.items()}
        kinds_of_task = jnp.asarray(held_out.kind)
        by_kind = jax.vmap(
            lambda k: (won[-1] * (kinds_of_task == k)).sum() / jnp.maximum((kinds_of_task == k).sum(), 1)
        )(jnp.arange(6))
        return {**curves, "eval": won.mean(1), "by_kind": by_kind}

    return run
