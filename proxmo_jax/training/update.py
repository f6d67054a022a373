"""One update of the policy: active turns packed into token rows, reference log-probs, PPO mini-batches.

Turns are short and differ in length, so several share one row, kept apart by segment ids: no compute on padding,
and one compiled shape for warm start and reinforcement alike.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from proxmo_jax.estimator.batch import batch_advantages
from proxmo_jax.estimator.types import Advantages, Group, Settings
from proxmo_jax.estimator.words import WordCounts
from proxmo_jax.policy import adapters
from proxmo_jax.policy.attention import splash
from proxmo_jax.policy.decoder import Policy, PolicyConfig, dense_attention
from proxmo_jax.training.buffers import Buffer
from proxmo_jax.training.losses import LossSettings, PolicyLoss, policy_loss, token_log_probs, token_weights
from proxmo_jax.training.rows import Rows


class TrainState(NamedTuple):
    """What is learned (`adapters.split`) and the optimiser's state; donated to every update."""

    params: Any
    opt_state: Any


def row_logits(params, rows: Rows, config: PolicyConfig) -> jax.Array:
    """Logits [B, A, V] of the response tokens; a token sees the earlier tokens of its own segment."""
    if config.attention == "splash":
        policy, mask = Policy(config, splash), rows.segments
    else:
        length = rows.tokens.shape[1]
        same = rows.segments[:, :, None] == rows.segments[:, None, :]
        policy, mask = Policy(config, dense_attention), same & jnp.tril(jnp.ones((length, length), bool))
    return policy.apply({"params": params}, rows.tokens, rows.positions, mask, places=rows.places)[0]


@partial(jax.jit, static_argnames=("config", "micro_batches"))
def row_log_probs(
    policies: tuple, rows: Rows, temperature: jax.Array, *, config: PolicyConfig, micro_batches: int = 1
) -> tuple[jax.Array, ...]:
    """Log-probs of the response tokens [B, A] under each of the policies' parameters, at the rollout's temperature.

    Several policies (the one that is learned, the reference) share one pass over the rows, part by part.
    """

    def of_part(part: Rows) -> tuple[jax.Array, ...]:
        return tuple(
            token_log_probs(row_logits(params, part, config) / temperature, part.targets)[0] for params in policies
        )

    answer = jax.lax.map(of_part, _parts(rows, micro_batches))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), answer)


def make_optimizer(
    learning_rate: float,
    weight_decay: float,
    max_norm: float,
    warmup: int,
    decay_steps: int | None = None,
    moments_dtype: str = "float32",
) -> optax.GradientTransformation:
    """AdamW with gradient clipping; a short linear warm-up, then a constant rate or a cosine down to a tenth of it.

    Step i < `warmup` is done at (i + 1) / (warmup + 1) of the rate.
    `moments_dtype`: what both moments are kept in between steps; they are computed in float32. The second moment's
    decay, 0.98, moves it by more than bfloat16's grain; one of 0.999 would not.
    """
    rate = optax.cosine_decay_schedule(learning_rate, decay_steps, 0.1) if decay_steps else lambda _: learning_rate
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    schedule = optax.join_schedules([rise, rate], [warmup])
    return optax.chain(
        optax.clip_by_global_norm(max_norm),
        _kept_in(optax.scale_by_adam(b2=0.98, mu_dtype="float32"), moments_dtype),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _kept_in(adam: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """The same, its moments kept in `dtype` between steps."""

    def cast(state, to: str):
        return state._replace(**{name: optax.tree.cast(getattr(state, name), to) for name in ("mu", "nu")})

    def init(params):
        return cast(adam.init(params), dtype)

    def update(gradient, state, params=None):
        updates, state = adam.update(gradient, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


@partial(jax.jit, static_argnames=("config", "optimizer", "settings", "micro_batches"), donate_argnums=0)
def policy_step(
    state: TrainState,
    rows: Rows,
    temperature: jax.Array,
    rate: jax.Array | float = 1.0,
    frozen: Any = None,
    *,
    config: PolicyConfig,
    optimizer: optax.GradientTransformation,
    settings: LossSettings,
    micro_batches: int = 1,
) -> tuple[TrainState, PolicyLoss]:
    """One optimiser step on one mini-batch of rows, its gradient summed over `micro_batches` parts.

    `rate` scales the optimiser's learning rate: iterations differ in their number of steps, so a schedule over
    iterations cannot be the optimiser's own. `frozen`: the parameters that are not learned, beside adapters.
    """

    def loss(params, part: Rows, weight, total):
        logits = row_logits(adapters.join(frozen or {}, params), part, config) / temperature
        columns = (part.targets, part.mask, part.advantage, part.old, part.reference)
        parts = policy_loss(logits, *columns, settings, weight=weight, total=total)
        return parts.loss, parts

    weight = token_weights(rows.mask, rows.turn_tokens, settings.aggregation, settings.longest_response)
    gradient, parts = _gradient(loss, state.params, rows, weight, micro_batches)
    return _apply(state, gradient, optimizer, rate), parts


@partial(jax.jit, static_argnames=("config", "optimizer", "micro_batches"), donate_argnums=0)
def cloning_step(
    state: TrainState,
    rows: Rows,
    *,
    config: PolicyConfig,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
) -> tuple[TrainState, jax.Array]:
    """One step of behaviour cloning: the mean negative log-likelihood of the answer tokens."""

    def loss(params, part: Rows, weight, _):
        log_probs, _ = token_log_probs(row_logits(params, part, config), part.targets)
        value = -(weight * log_probs).sum()
        return value, value

    weight = token_weights(rows.mask, rows.turn_tokens, "token_mean", 1)
    gradient, value = _gradient(loss, state.params, rows, weight, micro_batches)
    return _apply(state, gradient, optimizer, 1.0), value


def _gradient(loss, params, rows: Rows, weight: jax.Array, micro_batches: int):
    """Gradient and report of `loss(params, rows, weight, total tokens)`, added up over micro-batches one by one.

    Small parts keep the temporaries in cache: on two CPU cores 2 x 16 rows are half again as fast as 1 x 32.
    """
    total = rows.mask.sum()
    gradient = jax.grad(loss, has_aux=True)
    if micro_batches == 1:
        return gradient(params, rows, weight, total)
    parts = _parts((rows, weight), micro_batches)

    def add(so_far, part):
        return jax.tree.map(jnp.add, so_far, gradient(params, *part, total)), None

    whole = jax.eval_shape(gradient, params, rows, weight, total)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), whole)  # bfloat16 would lose small parts
    return jax.lax.scan(add, start, parts)[0]


def _parts(tree, count: int):
    """Arrays [B, ...] as [count, B / count, ...], interleaved: an axis split over devices stays split in every part."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), tree)


def _apply(state: TrainState, gradient, optimizer: optax.GradientTransformation, rate) -> TrainState:
    gradient = optax.tree.cast(gradient, "float32")
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    updates = jax.tree.map(lambda x: rate * x, updates)
    return TrainState(optax.apply_updates(state.params, updates), opt_state)


@partial(jax.jit, static_argnames="texts")
def estimate(
    buffer: Buffer, success: jax.Array, alphabetical: jax.Array, settings: Settings, *, texts: int
) -> Advantages:
    """The estimator on a rollout. success bool [E] -> Advantages [G, M, T].

    texts: no group saw more distinct observations; alphabetical int32 [V] as in `WordCounts`.
    """
    groups, episodes = buffer.word_ids.shape[0], buffer.mask.shape[0]

    def grouped(x):
        return x.reshape(groups, episodes // groups, *x.shape[1:])

    return batch_advantages(
        Group(
            reward=grouped(buffer.reward),
            mask=grouped(buffer.mask),
            success=grouped(success),
            action_valid=grouped(buffer.action_valid),
            anchor=grouped(buffer.anchor),
            words=WordCounts(buffer.word_ids[:, :texts], buffer.word_counts[:, :texts], alphabetical),
        ),
        settings,
    )
