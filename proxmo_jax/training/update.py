"""One update of the policy: log-probs of packed rows, PPO and behaviour-cloning steps with gradient accumulation."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from proxmo_jax.errors import UserError
from proxmo_jax.estimator.batch import batch_advantages
from proxmo_jax.estimator.states import at_next
from proxmo_jax.estimator.types import Advantages, Batch, Settings
from proxmo_jax.estimator.words import WordCounts
from proxmo_jax.policy import adapters
from proxmo_jax.policy.attention import splash
from proxmo_jax.policy.decoder import Policy, PolicyConfig, causal_attention
from proxmo_jax.training.buffers import Buffer
from proxmo_jax.training.losses import LossSettings, PolicyLoss, policy_loss, token_log_probs, token_weights
from proxmo_jax.training.rows import Rows


class TrainState(NamedTuple):
    """Trainable parameters and optimiser state; donated to every update.

    Attributes:
        params: pytree, `adapters.split` of the policy's parameters.
        opt_state: optax state.
    """

    params: Any
    opt_state: Any


def row_logits(params, rows: Rows, config: PolicyConfig) -> jax.Array:
    """Logits of the response tokens; a token attends to the earlier tokens of its segment.

    Args:
        params: all parameters of the policy.
        rows: token rows [B, L].
        config: shape of the policy.

    Returns:
        float32 [B, A, V].
    """
    if config.attention == "splash":
        policy, mask = Policy(config, splash), rows.segments
    else:
        length = rows.tokens.shape[1]
        same = rows.segments[:, :, None] == rows.segments[:, None, :]
        policy, mask = Policy(config, causal_attention), same & jnp.tril(jnp.ones((length, length), bool))
    return policy.apply({"params": params}, rows.tokens, rows.positions, mask, places=rows.places)[0]


@partial(jax.jit, static_argnames=("config", "micro_batches"))
def row_log_probs(
    policies: tuple, rows: Rows, temperature: jax.Array, *, config: PolicyConfig, micro_batches: int = 1
) -> tuple[jax.Array, ...]:
    """Log-probs of the response tokens under several policies, in one pass over the rows.

    Args:
        policies: parameters of each policy (the trained one, the reference).
        rows: token rows [B, L].
        temperature: float32 [], of the rollout.
        config: shape of the policies.
        micro_batches: number of micro-batches, computed in sequence.

    Returns:
        float32 [B, A] for each policy.
    """

    def of_micro_batch(micro_batch: Rows) -> tuple[jax.Array, ...]:
        return tuple(
            token_log_probs(row_logits(params, micro_batch, config) / temperature, micro_batch.targets)[0]
            for params in policies
        )

    log_probs = jax.lax.map(of_micro_batch, _micro_batches(rows, micro_batches))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), log_probs)


def make_optimizer(
    learning_rate: float,
    weight_decay: float,
    max_norm: float,
    warmup: int,
    decay_steps: int | None = None,
    moments_dtype: str = "float32",
) -> optax.GradientTransformation:
    """AdamW with gradient clipping, linear warm-up, and a constant rate or a cosine decay to a tenth.

    Step i < `warmup` has the rate (i + 1) / (warmup + 1) * learning_rate.

    Args:
        learning_rate: after the warm-up.
        weight_decay: decoupled.
        max_norm: the gradient's global norm is clipped to this.
        warmup: steps.
        decay_steps: steps of the cosine decay; None: constant.
        moments_dtype: storage dtype of both moments; they are computed in float32. The second moment decays by 0.98 a
            step, which bfloat16 resolves; 0.999 would be lost in its rounding.

    Returns:
        The optimiser.
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
    """The optimiser with its moments stored in `dtype` between steps."""

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
    """One optimiser step of PPO on a mini-batch, with gradient accumulation over micro-batches.

    Args:
        state: donated.
        rows: token rows [B, L].
        temperature: float32 [], of the rollout.
        rate: factor on the learning rate. A schedule over iterations cannot be the optimiser's own, since iterations
            differ in their number of steps.
        frozen: parameters beside the adapters; None if all are trained.
        config: shape of the policy.
        optimizer: from `make_optimizer`.
        settings: constants of the loss.
        micro_batches: number of micro-batches; divides B.

    Returns:
        The new state, the loss and its diagnostics. If the loss or the gradient is not finite, the state is as it was,
        and the loss is NaN.
    """

    def loss(params, micro_batch: Rows, weight, total):
        logits = row_logits(adapters.join(frozen or {}, params), micro_batch, config) / temperature
        r = micro_batch
        terms = policy_loss(
            logits, r.targets, r.mask, r.advantage, r.old_log_probs, r.reference, settings, weight=weight, total=total,
            turn=jnp.take_along_axis(r.segments, r.places, axis=1),
        )  # fmt: skip
        return terms.loss, terms

    weight = token_weights(rows.mask, rows.turn_tokens, settings.aggregation, settings.longest_response)
    gradient, terms = _gradient(loss, state.params, rows, weight, micro_batches)
    finite = _finite(terms.loss, gradient)
    return _apply(state, gradient, optimizer, rate, finite), terms._replace(loss=jnp.where(finite, terms.loss, jnp.nan))


@partial(jax.jit, static_argnames=("config", "optimizer", "micro_batches"), donate_argnums=0)
def cloning_step(
    state: TrainState,
    rows: Rows,
    frozen: Any = None,
    *,
    config: PolicyConfig,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
) -> tuple[TrainState, jax.Array]:
    """One optimiser step of behaviour cloning: mean negative log-likelihood of the response tokens.

    Args:
        state: donated.
        rows: token rows [B, L].
        frozen: parameters beside the adapters; None if all are trained.
        config: shape of the policy.
        optimizer: from `make_optimizer`.
        micro_batches: number of micro-batches; divides B.

    Returns:
        The new state, and the loss float32 []. If the loss or the gradient is not finite, the state is as it was, and
        the loss is NaN.
    """

    def loss(params, micro_batch: Rows, weight, _):
        logits = row_logits(adapters.join(frozen or {}, params), micro_batch, config)
        log_probs, _ = token_log_probs(logits, micro_batch.targets)
        value = -(weight * log_probs).sum()
        return value, value

    weight = token_weights(rows.mask, rows.turn_tokens, "token_mean", 1)
    gradient, value = _gradient(loss, state.params, rows, weight, micro_batches)
    finite = _finite(value, gradient)
    return _apply(state, gradient, optimizer, 1.0, finite), jnp.where(finite, value, jnp.nan)


def _gradient(loss, params, rows: Rows, weight: jax.Array, micro_batches: int):
    """Gradient and auxiliary output of `loss(params, rows, weight, total tokens)`, accumulated over micro-batches.

    Small micro-batches keep temporaries in cache: on two CPU cores 2 x 16 rows are 1.5 times as fast as 1 x 32.
    """
    total = rows.mask.sum()
    gradient = jax.grad(loss, has_aux=True)
    if micro_batches == 1:
        return gradient(params, rows, weight, total)

    def add(so_far, micro_batch):
        return jax.tree.map(jnp.add, so_far, gradient(params, *micro_batch, total)), None

    whole = jax.eval_shape(gradient, params, rows, weight, total)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), whole)  # bfloat16 would lose small terms
    return jax.lax.scan(add, start, _micro_batches((rows, weight), micro_batches))[0]


def _micro_batches(tree, count: int):
    """Arrays [B, ...] as [count, B / count, ...], interleaved: a sharded axis stays sharded in every micro-batch."""
    rows = len(jax.tree.leaves(tree)[0])
    if rows % count:
        raise UserError(f"micro_batches: {rows} rows of a mini-batch cannot be cut into {count} equal parts")
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), tree)


def _finite(loss: jax.Array, gradient) -> jax.Array:
    """Whether the loss and every entry of the gradient are finite numbers (so is the norm, then): bool []."""
    return jnp.isfinite(loss) & jnp.isfinite(optax.global_norm(optax.tree.cast(gradient, "float32")))


def _apply(
    state: TrainState, gradient, optimizer: optax.GradientTransformation, rate, finite: jax.Array
) -> TrainState:  # fmt: skip
    """The state after one optimiser step; unchanged if the step is not `finite`."""
    gradient = optax.tree.cast(gradient, "float32")
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    updates = jax.tree.map(lambda x: rate * x, updates)
    stepped = TrainState(optax.apply_updates(state.params, updates), opt_state)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)


@partial(jax.jit, static_argnames="texts")
def estimate(
    buffer: Buffer, success: jax.Array, ending: jax.Array, alphabetical: jax.Array, settings: Settings, *, texts: int
) -> Advantages:
    """Advantages of a rollout.

    Args:
        buffer: the rollout [E, T].
        success: bool [E].
        ending: int32 [E], number of the observation after the last action, as `buffer.anchor`.
        alphabetical: int32 [V], as in `WordCounts`.
        settings: of the estimator.
        texts: at least the most distinct observations of a group.

    Returns:
        `Advantages` [G, M, T].
    """
    groups, episodes = buffer.word_ids.shape[0], buffer.mask.shape[0]

    def grouped(x):
        return x.reshape(groups, episodes // groups, *x.shape[1:])

    following = jax.vmap(at_next, (0, 0, 0))(grouped(buffer.anchor), grouped(buffer.mask), grouped(ending))
    return batch_advantages(
        Batch(
            reward=grouped(buffer.reward),
            mask=grouped(buffer.mask),
            success=grouped(success),
            action_valid=grouped(buffer.action_valid),
            anchor=grouped(buffer.anchor),
            edge=jnp.stack([grouped(buffer.anchor), following], -1),
            words=WordCounts(buffer.word_ids[:, :texts], buffer.word_counts[:, :texts], alphabetical),
        ),
        settings,
    )
