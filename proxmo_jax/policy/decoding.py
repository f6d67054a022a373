"""Decoding with a KV cache: prefill of left-padded prompts, a token at a time, continuous batching.

`sample` is the one program: `prefill` reads prompts into rows of the cache, `decode` appends a token to every row, and
`refill` gives rows that have stopped to prompts that wait.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from proxmo_jax.policy.decoder import Cache, Policy, PolicyConfig
from proxmo_jax.policy.sampling import Decoding, draw, stops
from proxmo_jax.policy.sharding import cache_sharding


class Samples(NamedTuple):
    """Responses to `N` prompts, at most `R` tokens each.

    Attributes:
        tokens: int32 [N, R], pad after the end.
        log_probs: float32 [N, R], 0 after the end.
        lengths: int32 [N], sampled tokens, the stop token included.
    """

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array


@dataclass(frozen=True)
class _Job:
    """Constants while responses to `N` prompts are sampled on `B` rows of the KV cache."""

    params: Any
    prompts: jax.Array  # int32 [N, P], left-padded
    prompt_lengths: jax.Array  # int32 [N]
    keys: jax.Array  # [N]
    temperature: jax.Array
    stop_table: jax.Array | None
    config: PolicyConfig
    decoding: Decoding
    rows: int  # B
    mesh: Mesh | None

    @property
    def count(self) -> int:
        return self.prompts.shape[0]

    @property
    def width(self) -> int:
        return self.prompts.shape[1]

    @property
    def row_length(self) -> int:
        return self.width + self.decoding.max_tokens

    @property
    def row_for_each(self) -> bool:
        """Every prompt has a row of its own, so that none waits."""
        return self.rows == self.count

    @property
    def refilled_together(self) -> int:
        """Rows that are given to waiting prompts at once."""
        return self.count if self.row_for_each else max(self.rows // 8, 1)

    @property
    def end(self) -> jax.Array:
        """The number of prompts; past it there is batch padding alone."""
        return jnp.max(jnp.where(self.prompt_lengths > 0, jnp.arange(1, self.count + 1), 0))

    def place(self, cache: Cache) -> Cache:
        """The cache with its sharding."""
        if self.mesh is None:
            return cache
        return jax.lax.with_sharding_constraint(cache, cache_sharding(self.mesh))

    def draw(self, logits: jax.Array, prompt: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(token, log-prob) [B]; the random number belongs to the prompt and the token's place in its response."""
        key = jax.vmap(jax.random.fold_in)(self.keys[jnp.minimum(prompt, self.count - 1)], step)
        return draw(logits, key, self.temperature, self.decoding)


class _State(NamedTuple):
    """State of the rows: the prompt of each, its position, and its next token."""

    prompt: jax.Array  # int32 [B]; N: none
    start: jax.Array  # int32 [B], the prompt's first place in the row
    step: jax.Array  # int32 [B], tokens of the response so far
    running: jax.Array  # bool [B]
    matched: jax.Array  # int16 [B], state of the stop strings' automaton
    token: jax.Array  # int32 [B]
    log_prob: jax.Array  # float32 [B]
    cache: Cache
    waiting: jax.Array  # int32, the first prompt without a row
    samples: Samples


@partial(jax.jit, static_argnames=("config", "decoding", "slots", "mesh"))
def sample(
    params: Any,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    stop_table: jax.Array | None = None,
    *,
    config: PolicyConfig,
    decoding: Decoding,
    slots: int = 0,
    mesh: Mesh | None = None,
) -> Samples:
    """Sample a response to each prompt. Compiled once per (N, P).

    With fewer rows than prompts (continuous batching), rows are refilled when an eighth of them have stopped, so that
    a long response delays no other. Random numbers belong to prompts and tokens: a response depends neither on `slots`
    nor on the other prompts of the batch.

    Args:
        params: the policy's parameters.
        prompts: int32 [N, P], left-padded.
        prompt_lengths: int32 [N]; 0 for batch padding, which gets no response.
        key: random key.
        temperature: float32 []; 0 takes the likeliest token.
        stop_table: int16 [states, V], `sampling.stop_table` of the stop strings, or None.
        config: the policy's shape.
        decoding: limits of the response and how tokens are drawn.
        slots: rows decoded at the same time, which bounds the cache; 0: one per prompt.
        mesh: devices over which rows are split; `N` and `slots` are multiples of them.

    Returns:
        The responses; their log-probs are those of `draw`, so that they can be the old log-probs of a policy update
        at the same temperature.
    """
    count = prompts.shape[0]
    rows = count if not 0 < slots < count else slots
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    job = _Job(params, prompts, prompt_lengths, keys, temperature, stop_table, config, decoding, rows, mesh)
    until_refill = partial(jax.lax.while_loop, partial(_goes_on, job), partial(_decode, job))
    state = _empty(job)
    if job.row_for_each:
        return until_refill(_refill(job, state)).samples
    return jax.lax.while_loop(
        lambda s: s.running.any() | (s.waiting < job.end), lambda s: until_refill(_refill(job, s)), state
    ).samples


def _empty(job: _Job) -> _State:
    """No row has a prompt."""
    none, shape = jnp.zeros(job.rows, jnp.int32), (job.count, job.decoding.max_tokens)
    return _State(
        prompt=none + job.count,
        start=none,
        step=none,
        running=none > 0,
        matched=none.astype(jnp.int16),
        token=none,
        log_prob=jnp.zeros(job.rows, jnp.float32),
        cache=job.place(Cache.empty(job.config, job.rows, job.row_length)),
        waiting=jnp.int32(0),
        samples=Samples(
            jnp.full(shape, job.decoding.pad_id, jnp.int32),
            jnp.zeros(shape, jnp.float32),
            job.prompt_lengths * 0,
        ),
    )


def _prefill(job: _Job, prompt: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array, Cache]:
    """Read prompts [K] into the first places of a cache of `K` rows.

    Returns:
        Logits float32 [K, V] of the first response token; start int32 [K], where each prompt begins; the cache.
    """
    read = jnp.minimum(prompt, job.count - 1)
    start = job.width - jnp.where(prompt < job.count, job.prompt_lengths[read], 0)
    places = jnp.arange(job.row_length)
    length = job.row_length if job.row_for_each else job.width
    real = places[None, :length] >= start[:, None]
    mask = real[:, None, :] & (places[None, None, :length] <= places[None, : job.width, None])
    positions = jnp.maximum(places[None, : job.width] - start[:, None], 0)
    last = jnp.full((len(prompt), 1), job.width - 1)
    model = Policy(job.config)
    read_in: Any
    logits, read_in = model.apply({"params": job.params}, job.prompts[read], positions, mask, cache, 0, last)
    return logits[:, -1], start, read_in


def _refill(job: _Job, s: _State) -> _State:
    """The next prompts, each read into a row that has stopped."""
    together = job.refilled_together
    prompt = s.waiting + jnp.arange(together)
    row = jnp.where(prompt < job.count, jnp.argsort(s.running, stable=True)[:together], job.rows)
    # With a row for each prompt they are read in place, otherwise into a small cache that is copied.
    own = job.place(s.cache) if job.row_for_each else Cache.empty(job.config, together, job.width)
    logits, start, own = _prefill(job, prompt, own)
    if not job.row_for_each:
        own = Cache(
            s.cache.keys.at[:, row, :, :, : job.width].set(own.keys, mode="drop"),
            s.cache.values.at[:, row, :, : job.width].set(own.values, mode="drop"),
        )
    zero = jnp.zeros(together, jnp.int32)
    token, log_prob = job.draw(logits, prompt, zero)
    new = {"prompt": prompt, "start": start, "step": zero, "running": start < job.width, "matched": zero}
    new |= {"token": token, "log_prob": log_prob}
    fields = {k: getattr(s, k).at[row].set(v.astype(getattr(s, k).dtype), mode="drop") for k, v in new.items()}
    return s._replace(**fields, cache=job.place(own), waiting=s.waiting + together)


def _goes_on(job: _Job, s: _State) -> jax.Array:
    """Whether to decode on before rows are refilled."""
    waiting = job.end - s.waiting
    enough = (waiting > 0) & ((~s.running).sum() >= jnp.minimum(job.refilled_together, waiting))
    return s.running.any() & ~enough


def _decode(job: _Job, s: _State) -> _State:
    """One more token of every row: written down, read, and the next one drawn."""
    to = jnp.where(s.running, s.prompt, job.count), s.step
    samples = Samples(
        s.samples.tokens.at[to].set(s.token, mode="drop"),
        s.samples.log_probs.at[to].set(s.log_prob, mode="drop"),
        s.samples.lengths.at[to[0]].add(1, mode="drop"),
    )
    running = s.running & ~stops(s.token, job.decoding) & (s.step + 1 < job.decoding.max_tokens)
    matched = s.matched
    if job.stop_table is not None:
        matched = job.stop_table[matched, s.token]
        running = running & (matched < job.stop_table.shape[0] - 1)
    at, places = job.width + s.step, jnp.arange(job.row_length)
    mask = (places >= s.start[:, None]) & (places <= at[:, None])
    positions = (at - s.start)[:, None]
    write_at = at[0] if job.row_for_each else at  # rows that began together are at the same place
    cache: Any
    logits, cache = Policy(job.config).apply(
        {"params": job.params}, s.token[:, None], positions, mask[:, None, :], job.place(s.cache), write_at
    )
    token, log_prob = job.draw(logits[:, 0], s.prompt, s.step + 1)
    return s._replace(
        step=s.step + 1, running=running, matched=matched, token=token, log_prob=log_prob, cache=cache, samples=samples
    )
