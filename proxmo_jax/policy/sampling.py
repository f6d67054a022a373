"""Sampling answers: prefill of left-padded prompts and decoding with a KV cache; rows that stop are given out again."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import Cache, Policy, PolicyConfig
from proxmo_jax.policy.sharding import cache_sharding


class Samples(NamedTuple):
    """tokens int32 [B, R] (pad after the end), log_probs float32 [B, R] (0 after it), lengths int32 [B].

    `lengths` counts the sampled tokens, the stop token included.
    """

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn and where they end. A program is compiled for each.

    max_tokens   the longest answer
    stop_ids     tokens that end one, themselves included
    pad_id       what stands after the end
    top_k        only the so many likeliest tokens may be drawn; 0: all
    top_p        only the likeliest tokens that together have this probability may be drawn; 1: all
    greedy       no random numbers are made; for temperature 0
    """

    max_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int = 0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False


def stop_table(texts: Sequence[str], strings: Sequence[str]) -> np.ndarray:
    """The automaton that finds any of `strings` in a text said token by token: int16 [states, V].

    texts: what each token id says. State 0 is the start, the last state is reached when a string has been said, and is
    never left; `table[state, token]` is the next state. (Aho and Corasick's automaton, run over each token's
    characters.) Raises UserError for no string, or an empty one.
    """
    if not strings or not all(strings):
        raise UserError("stop strings: need at least one, none of them empty")
    alphabet = {c: i + 1 for i, c in enumerate(sorted(set("".join(strings))))}  # 0: any other character
    prefixes = sorted({s[:n] for s in strings for n in range(len(s))}, key=lambda p: (len(p), p))
    state = {prefix: i for i, prefix in enumerate(prefixes)}
    end = len(prefixes)
    step = np.zeros((end + 1, len(alphabet) + 1), np.int16)
    step[end] = end
    for prefix, i in state.items():
        for c, j in alphabet.items():
            said = prefix + c
            if any(said.endswith(s) for s in strings):
                step[i, j] = end
            else:
                step[i, j] = next(state[said[n:]] for n in range(len(said) + 1) if said[n:] in state)
    longest = max(map(len, texts), default=0)
    codes = np.full((len(texts), longest), -1, np.int16)
    for row, text in zip(codes, texts, strict=True):
        row[: len(text)] = [alphabet.get(c, 0) for c in text]
    table = np.repeat(np.arange(end + 1, dtype=np.int16)[:, None], len(texts), 1)
    for column in codes.T:
        table = np.where(column >= 0, step[table, np.maximum(column, 0)], table)
    return table


def draw(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, decoding: Decoding
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(token, log-prob) [B] from logits [B, V] with a key for each row; the likeliest token at temperature 0.

    Log-probs are of the policy at this temperature (untempered when greedy) before `top_k` and `top_p` cut it, which is
    what the learner computes.
    """
    log_probs = jax.nn.log_softmax(logits / jnp.where(temperature > 0, temperature, 1.0))
    allowed = log_probs
    if decoding.top_k or decoding.top_p < 1.0:
        ordered = jnp.sort(log_probs, axis=-1, descending=True)
        least = ordered[:, -1:]
        if decoding.top_k:
            least = jnp.maximum(least, ordered[:, min(decoding.top_k, logits.shape[-1]) - 1, None])
        if decoding.top_p < 1.0:
            before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
            count = jnp.maximum((before < decoding.top_p).sum(-1, keepdims=True), 1)
            least = jnp.maximum(least, jnp.take_along_axis(ordered, count - 1, -1))
        allowed = jnp.where(log_probs >= least, log_probs, -jnp.inf)
    token = jnp.argmax(logits, -1)
    if not decoding.greedy:  # a `cond` on the temperature would cost sampling a third of its speed on a CPU
        token = jnp.where(temperature > 0, jax.vmap(jax.random.categorical)(keys, allowed), token)
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs, token[:, None], 1)[:, 0]


def stops(token: jax.Array, decoding: Decoding) -> jax.Array:
    """Which tokens [B] end an answer."""
    return (
        jnp.isin(token, jnp.array(decoding.stop_ids, jnp.int32)) if decoding.stop_ids else jnp.zeros_like(token, bool)
    )


class _Slots(NamedTuple):
    """Rows of the cache at work: which prompt each answers, how far it is, and the token it says next."""

    prompt: jax.Array  # int32 [B]; N: none
    start: jax.Array  # int32 [B], the prompt's first place in the row
    step: jax.Array  # int32 [B], tokens said
    running: jax.Array  # bool [B]
    said: jax.Array  # int16 [B], the stop strings' automaton
    token: jax.Array  # int32 [B]
    log_prob: jax.Array  # float32 [B]
    cache: Cache
    waiting: jax.Array  # int32, the first prompt that no row has been given
    samples: Samples


@partial(jax.jit, static_argnames=("config", "decoding", "slots", "mesh"))
def sample(
    params,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    table: jax.Array | None = None,
    *,
    config: PolicyConfig,
    decoding: Decoding,
    slots: int = 0,
    mesh: Mesh | None = None,
) -> Samples:
    """Sample an answer per prompt at `temperature` (0: greedy). prompts int32 [N, P], left-padded.

    Log-probs as in `draw`, so they serve as the old log-probs of a policy update at the same temperature. `table`: a
    `stop_table` whose strings end an answer, too. Prompts of length 0 (batch padding) have no answer.

    slots: how many are answered side by side (0: all). When an eighth of these rows have stopped they are given to the
    prompts that wait, so that a long answer holds up none but itself and the cache is as large as `slots` asks. Random
    numbers belong to prompts and tokens: an answer does not depend on `slots`, nor on what is sampled beside it.
    mesh: where the rows are split over devices; a multiple of them. Compiled once per (N, P).
    """
    model = Policy(config)
    count, width = prompts.shape
    batch = count if not 0 < slots < count else slots
    room_for_all = batch == count  # every prompt has a row of its own
    at_once = count if room_for_all else max(batch // 8, 1)  # rows given out together
    total = width + decoding.max_tokens
    places = jnp.arange(total)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    end = jnp.max(jnp.where(prompt_lengths > 0, jnp.arange(1, count + 1), 0))  # past it, batch padding alone

    def place(cache: Cache) -> Cache:
        return cache if mesh is None else jax.lax.with_sharding_constraint(cache, cache_sharding(mesh))

    def said_next(logits: jax.Array, prompt: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = jax.vmap(jax.random.fold_in)(keys[jnp.minimum(prompt, count - 1)], step)
        return draw(logits, own, temperature, decoding)

    def refill(s: _Slots) -> _Slots:
        """The next prompts read, each into a row that has stopped."""
        prompt = s.waiting + jnp.arange(at_once)
        row = jnp.argsort(s.running, stable=True)[:at_once]
        row, read = jnp.where(prompt < count, row, batch), jnp.minimum(prompt, count - 1)
        lengths = jnp.where(prompt < count, prompt_lengths[read], 0)
        start = width - lengths
        length = total if room_for_all else width  # into the rows themselves, or into others that are copied
        own: Any
        own = place(s.cache) if room_for_all else Cache.empty(config, at_once, width)
        real = places[None, :length] >= start[:, None]
        mask = real[:, None, :] & (places[None, None, :length] <= places[None, :width, None])
        positions = jnp.maximum(places[None, :width] - start[:, None], 0)
        last = jnp.full((at_once, 1), width - 1)
        logits, own = model.apply({"params": params}, prompts[read], positions, mask, own, 0, last)
        if not room_for_all:
            own = Cache(
                s.cache.keys.at[:, row, :, :, :width].set(own.keys, mode="drop"),
                s.cache.values.at[:, row, :, :width].set(own.values, mode="drop"),
            )
        zero = jnp.zeros(at_once, jnp.int32)
        token, log_prob = said_next(logits[:, -1], prompt, zero)
        new = {"prompt": prompt, "start": start, "step": zero, "running": lengths > 0, "said": zero}
        new |= {"token": token, "log_prob": log_prob}
        fields = {k: getattr(s, k).at[row].set(v.astype(getattr(s, k).dtype), mode="drop") for k, v in new.items()}
        return s._replace(**fields, cache=place(own), waiting=s.waiting + at_once)

    def going(s: _Slots) -> jax.Array:
        """Whether to decode on before rows are given out again."""
        waiting = end - s.waiting
        enough = (waiting > 0) & ((~s.running).sum() >= jnp.minimum(at_once, waiting))
        return s.running.any() & ~enough

    def decode(s: _Slots) -> _Slots:
        """One more token of every row: noted, read, and the one after it drawn."""
        to = jnp.where(s.running, s.prompt, count), s.step
        samples = Samples(
            s.samples.tokens.at[to].set(s.token, mode="drop"),
            s.samples.log_probs.at[to].set(s.log_prob, mode="drop"),
            s.samples.lengths.at[to[0]].add(1, mode="drop"),
        )
        running = s.running & ~stops(s.token, decoding) & (s.step + 1 < decoding.max_tokens)
        said = s.said
        if table is not None:
            said = table[said, s.token]
            running = running & (said < table.shape[0] - 1)
        at = width + s.step
        mask = (places >= s.start[:, None]) & (places <= at[:, None])
        positions = (at - s.start)[:, None]
        write_at = at[0] if room_for_all else at  # rows that began together are at the same place
        cache: Any
        logits, cache = model.apply(
            {"params": params}, s.token[:, None], positions, mask[:, None, :], place(s.cache), write_at
        )
        token, log_prob = said_next(logits[:, 0], s.prompt, s.step + 1)
        return s._replace(
            step=s.step + 1, running=running, said=said, token=token, log_prob=log_prob, cache=cache, samples=samples
        )

    none = jnp.zeros(batch, jnp.int32)
    shape = (count, decoding.max_tokens)
    s = _Slots(
        prompt=none + count, start=none, step=none, running=none > 0, said=none.astype(jnp.int16), token=none,
        log_prob=jnp.zeros(batch, jnp.float32), cache=place(Cache.empty(config, batch, total)), waiting=jnp.int32(0),
        samples=Samples(jnp.full(shape, decoding.pad_id, jnp.int32), jnp.zeros(shape, jnp.float32), prompt_lengths * 0),
    )  # fmt: skip
    if room_for_all:
        return jax.lax.while_loop(going, decode, refill(s)).samples
    finished = jax.lax.while_loop(
        lambda s: s.running.any() | (s.waiting < end),
        lambda s: jax.lax.while_loop(going, decode, refill(s)),
        s,
    )
    return finished.samples
