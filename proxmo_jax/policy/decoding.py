"""Decoding with a KV cache: prefill of left-padded prompts, a token at a time, continuous batching.

`sample` is the one program: `_read` reads prompts into rows of the cache, `_decode` appends a token to every row, and
`_refill` gives rows that have stopped to prompts that wait.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from proxmo_jax.policy.attention import prompt_attention
from proxmo_jax.policy.decoder import FEW_LAYERS, Cache, Policy, PolicyConfig, apart, tpu_layouts
from proxmo_jax.policy.sampling import Decoding, draw, stops
from proxmo_jax.policy.sharding import RULES, cache_sharding, parameter_shardings, to_host

# Tokens of prompts that a device reads at once, at most, and at least unless there are fewer. Between them an eighth of
# all, so that little is read of what is padding or a prompt that was read already.
PREFILL_TOKENS, FEWEST_TOKENS = 8192, 1024
PREFILL_PARTS = 8
PROMPT_PART = "prompt_part"  # scope of reading a part, by which `plan.costs` finds it


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


def decoding_config(config: PolicyConfig, mesh: Mesh) -> PolicyConfig:
    """The shape of the policy that samples: in float32 on CPUs, whose bfloat16 products are slow for few rows.

    Args:
        config: the policy's shape.
        mesh: the devices.

    Returns:
        The shape with the dtype of computation that is fastest.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return dataclasses.replace(config, dtype="float32") if on_cpu else config


def decoding_params(params: Any, *, config: PolicyConfig, mesh: Mesh | None = None, gather: bool = True) -> Any:
    """Parameters as decoding reads them, made once for many calls of `sample`: in the dtype of computation.

    Args:
        params: the policy's parameters.
        config: the policy's shape.
        mesh: the devices; where they are several hosts', each host gets all parameters onto its `local_mesh`.
        gather: replicate over `fsdp`, so that nothing is gathered for each token.

    Returns:
        The parameters; they are not copied if they are so already.
    """
    if mesh is not None and mesh.is_multi_process:
        return to_host(mesh, converted(params, config, mesh, False), config, gathered=gather)
    gather = gather and mesh is not None and mesh.shape["fsdp"] > 1
    if not gather and all(x.dtype == jnp.dtype(config.dtype) for x in jax.tree.leaves(params)):
        return params
    return converted(params, config, mesh, gather)


@partial(jax.jit, static_argnames=("config", "mesh", "gather"))
def converted(params: Any, config: PolicyConfig, mesh: Mesh | None, gather: bool) -> Any:
    """`decoding_params` of one host; first cast, then gathered."""
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    if mesh is None:
        return params
    for gathered in (False, gather):
        params = jax.lax.with_sharding_constraint(params, parameter_shardings(mesh, config, gathered=gathered))
    return params


@dataclass(frozen=True)
class _Job:
    """Constants while responses to `N` prompts are sampled on `B` rows of the KV cache."""

    params: Any
    layers_apart: Any  # the parameters as `_decode` reads them where there are few layers; None: as they are
    prompts: jax.Array  # int32 [N, P], left-padded
    prompt_lengths: jax.Array  # int32 [N]; 0: batch padding
    keys: jax.Array  # [N]
    temperature: jax.Array
    stop_table: jax.Array | None
    config: PolicyConfig
    decoding: Decoding
    rows: int  # B
    mesh: Mesh | None

    @property
    def count(self) -> int:
        return self.prompt_lengths.shape[0]

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

    @property
    def devices(self) -> int:
        """Over which rows are split."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def split(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """An axis of rows as two: devices, and the rows of each; one device where they cannot be split."""
        devices = self.devices if x.shape[axis] % self.devices == 0 else 1
        return x.reshape(*x.shape[:axis], devices, -1, *x.shape[axis + 1 :])

    def place(self, cache: Any) -> Any:
        """The cache with its sharding."""
        if self.mesh is None or jax.tree.leaves(cache)[0].shape[1] % self.devices:
            return cache
        return jax.lax.with_sharding_constraint(cache, cache_sharding(self.mesh))

    def for_decoding(self, cache: Cache) -> Cache | list[Cache]:
        """The cache as `_decode` reads it."""
        return self.place(cache if self.layers_apart is None else cache.apart())

    def draw(self, logits: jax.Array, prompt: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(token, log-prob) [B]; the random number belongs to the prompt and the token's place in its response."""
        key = jax.vmap(jax.random.fold_in)(self.keys[jnp.minimum(prompt, self.count - 1)], step)
        return draw(logits, key, self.temperature, self.decoding)


def pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[index], 0 past the end."""
    return jnp.take(values, index, axis=0, mode="fill", fill_value=0)


class _State(NamedTuple):
    """State of the rows: the prompt of each, its position, and its last token."""

    prompt: jax.Array  # int32 [B]; N: none
    start: jax.Array  # int32 [B], the prompt's first place in the row
    step: jax.Array  # int32 [B], the last token's place in the response
    running: jax.Array  # bool [B]
    matched: jax.Array  # int16 [B], state of the stop strings' automaton
    token: jax.Array  # int32 [B], the last one, which is not in the cache yet
    cache: Any  # `_Job.for_decoding`
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
    numbers: jax.Array | None = None,
    *,
    config: PolicyConfig,
    decoding: Decoding,
    slots: int = 0,
    mesh: Mesh | None = None,
) -> Samples:
    """Sample a response to each prompt. Compiled once per (N, P).

    A prompt that equals the one before it is not read again if each has a row of its own, and prompts are read in
    parts, without most of the padding that those of a part have in common. So order a device's prompts by length,
    equal ones side by side.
    With fewer rows than prompts (continuous batching), rows are refilled when an eighth of them have stopped, so that
    a long response delays no other. Random numbers belong to `numbers` and tokens: a response depends neither on
    `slots` nor on the other prompts of the batch.

    Args:
        params: the policy's parameters; fastest from `decoding_params`.
        prompts: int32 [N, P], left-padded.
        prompt_lengths: int32 [N]; 0 for batch padding, which gets no response.
        key: random key.
        temperature: float32 []; 0 takes the likeliest token.
        stop_table: int16 [states, V], `sampling.stop_table` of the stop strings, or None.
        numbers: int32 [N], what the random numbers of each response are drawn for, such as its episode (default: its
            place in the batch).
        config: the policy's shape.
        decoding: limits of the response and how tokens are drawn.
        slots: rows decoded at the same time, which bounds the cache; 0: one per prompt.
        mesh: devices over which rows are split; `N` and `slots` are multiples of them.

    Returns:
        The responses; their log-probs are those of `draw`, so that they can be the old log-probs of a policy update
        at the same temperature.
    """
    count = len(prompts)
    rows = count if not 0 < slots < count else slots
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count) if numbers is None else numbers)
    few = apart(params) if config.num_hidden_layers <= FEW_LAYERS else None
    job = _Job(params, few, prompts, prompt_lengths, keys, temperature, stop_table, config, decoding, rows, mesh)
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
        cache=job.for_decoding(Cache.empty(job.config, job.rows, job.row_length)),
        waiting=jnp.int32(0),
        samples=Samples(
            jnp.full(shape, job.decoding.pad_id, jnp.int32),
            jnp.zeros(shape, jnp.float32),
            job.prompt_lengths * 0,
        ),
    )


def _read(job: _Job, prompts: jax.Array, lengths: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Read prompts [K, P] into the first places of a cache of `K` rows, in parts, so that temporaries stay small.

    A part without prompts (length 0) is left out; the others are read to one of a few static widths.

    Returns:
        Logits float32 [K, V] of the first response token, and the cache.
    """
    prompts, lengths = job.split(prompts), job.split(lengths)
    devices, own, width = prompts.shape
    rows = part_rows(own, width)  # of a device
    widths = part_widths(width)

    def at_width(w: int, prompts: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Cache]:
        logits, new = _read_part(job, prompts[:, width - w :], lengths)
        before = width - w
        return logits, Cache(
            jnp.pad(new.keys, ((0, 0), (0, 0), (0, 0), (0, 0), (before, 0))),
            jnp.pad(new.values, ((0, 0), (0, 0), (0, 0), (before, 0), (0, 0))),
        )

    def nothing(prompts: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Cache]:
        shapes = jax.eval_shape(partial(at_width, width), prompts, lengths)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    branches: list[Callable] = [nothing, *(partial(at_width, w) for w in widths)]

    def read(cache: Cache, part: tuple) -> tuple[Cache, jax.Array]:
        i, prompts, lengths = part
        prompts, lengths = prompts.reshape(-1, width), lengths.reshape(-1)
        longest = lengths.max()
        if rows == own:
            logits, new = at_width(width, prompts, lengths)
        else:
            branch = jnp.where(longest > 0, 1 + jnp.searchsorted(jnp.array(widths), longest), 0)
            with jax.named_scope(PROMPT_PART):
                logits, new = jax.lax.switch(branch, branches, prompts, lengths)
        new = jax.tree.map(lambda x: x.reshape(x.shape[0], devices, -1, *x.shape[2:]), new)
        cache = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y, (0, 0, i * rows, 0, 0, 0)), cache, new)
        return _laid_out(cache), logits.reshape(devices, rows, -1)

    def parts(x: jax.Array) -> jax.Array:
        """[devices, own, ...] -> [own / rows, devices, rows, ...]."""
        return x.reshape(devices, -1, rows, *x.shape[2:]).swapaxes(0, 1)

    cache = jax.tree.map(partial(job.split, axis=1), cache)
    cache, logits = jax.lax.scan(read, cache, (jnp.arange(own // rows), parts(prompts), parts(lengths)))
    cache = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), cache)
    return logits.swapaxes(0, 1).reshape(devices * own, -1), job.place(cache)


def _laid_out(cache: Cache) -> Cache:
    """The cache as a loop carries it, in the layouts in which decoding reads it."""
    return Cache(*jax.lax.platform_dependent(cache.keys, cache.values, tpu=tpu_layouts, default=lambda *x: x))


def part_rows(own: int, width: int) -> int:
    """How many prompts a device reads at once.

    Args:
        own: the device's prompts.
        width: their places.

    Returns:
        A divisor of `own`.
    """
    most = max(min(own * width // PREFILL_PARTS, PREFILL_TOKENS), FEWEST_TOKENS)
    return max(n for n in range(1, own + 1) if own % n == 0 and (n * width <= most or n == 1))


def part_widths(width: int) -> list[int]:
    """The widths to which a part of prompts may be read.

    Args:
        width: places of the prompts.

    Returns:
        About a half and three quarters of it, where those are narrower, and `width`.
    """
    narrower = {-(-width * quarters // 64) * 16 for quarters in (2, 3)}
    return [*sorted(w for w in narrower if w < width), width]


def _read_part(job: _Job, prompts: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Cache]:
    """`_read` all prompts at once into a cache of their own."""
    (rows, width), mesh = prompts.shape, job.mesh
    start = width - lengths
    positions = jnp.maximum(jnp.arange(width) - start[:, None], 0)
    last = jnp.full((rows, 1), width - 1)
    if mesh is not None and rows % job.devices == 0:
        prompts = jax.lax.with_sharding_constraint(prompts, NamedSharding(mesh, PartitionSpec(RULES["batch"])))
    cache: Any = job.place(Cache.empty(job.config, rows, width))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh if mesh else jax.sharding.get_abstract_mesh()):
        model = Policy(job.config, prompt_attention)
        logits, cache = model.apply({"params": job.params}, prompts, positions, start, cache, 0, last)
    return logits[:, -1], job.place(cache)


def _read_each_once(job: _Job) -> tuple[jax.Array, Cache]:
    """`_read` all prompts into rows of their own. Those equal to the one before get a copy of what was read for it.

    Returns:
        Logits float32 [N, V] of the first response token, and the cache.
    """
    prompts, lengths = job.split(job.prompts), job.split(job.prompt_lengths)
    own = prompts.shape[1]
    again = (prompts[:, 1:] == prompts[:, :-1]).all(-1) & (lengths[:, 1:] == lengths[:, :-1])
    # The place of each row's prompt among the device's different ones, which is its own or one before it.
    of = jnp.cumsum(jnp.pad(~again, ((0, 0), (1, 0)), constant_values=True), axis=1) - 1
    row = jax.vmap(lambda x: jnp.searchsorted(x, jnp.arange(own)))(of)  # of each different prompt
    prompts, lengths = (jax.vmap(pick)(x, row).reshape(job.count, *x.shape[2:]) for x in (prompts, lengths))
    logits, cache = _read(job, prompts, lengths, job.place(Cache.empty(job.config, job.rows, job.row_length)))

    def copied(i: jax.Array, cache: Cache) -> Cache:
        to = own - 1 - i  # from the last row, so that none is overwritten before it is copied
        find = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=1, axis=1), in_axes=(1, 0), out_axes=1)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=to, axis=2)
        return _laid_out(jax.tree.map(lambda x: put(x, find(x, of[:, to])), cache))

    cache = jax.lax.fori_loop(0, own, copied, jax.tree.map(partial(job.split, axis=1), cache))
    cache = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), cache)
    return jax.vmap(pick)(job.split(logits), of).reshape(job.count, -1), job.place(cache)


def _refill(job: _Job, s: _State) -> _State:
    """The next prompts, each read into a row that has stopped, and the first token of each response."""
    together = job.refilled_together
    prompt = s.waiting + jnp.arange(together)
    # Padding takes no row: there may be fewer prompts left than rows are given out, and the others are at work.
    there = prompt < (job.count if job.row_for_each else job.end)
    length, cache = jnp.where(there, pick(job.prompt_lengths, prompt), 0), s.cache
    if job.row_for_each:
        row = prompt
        logits, own = _read_each_once(job)
        cache = job.for_decoding(own)
    else:
        row = jnp.where(there, jnp.argsort(s.running, stable=True)[:together], job.rows)
        logits, own = _read(job, pick(job.prompts, prompt), length, Cache.empty(job.config, together, job.width))
        into = partial(_put, rows=row, width=job.width)
        cache = jax.tree.map(into, cache, job.for_decoding(own), is_leaf=lambda x: isinstance(x, Cache))
    step = jnp.zeros(together, jnp.int32)
    token, log_prob = job.draw(logits, prompt, step)
    samples, running, matched = _said(job, s.samples, length > 0, prompt, step, step, token, log_prob)
    new = {"prompt": prompt, "start": job.width - length, "step": step, "token": token}
    new |= {"running": running, "matched": matched}
    fields = {k: v.astype(getattr(s, k).dtype) for k, v in new.items()}
    if not job.row_for_each:  # otherwise all rows are new; libtpu 0.0.52 aborts on their scatter where none is sharded
        fields = {k: getattr(s, k).at[row].set(v, mode="drop") for k, v in fields.items()}
    return s._replace(**fields, cache=job.place(cache), waiting=s.waiting + together, samples=samples)


def _put(cache: Cache, own: Cache, rows: jax.Array, width: int) -> Cache:
    """The cache of `K` prompts written into the first places of some rows."""
    return Cache(
        cache.keys.at[:, rows, :, :, :width].set(own.keys, mode="drop"),
        cache.values.at[:, rows, :, :width].set(own.values, mode="drop"),
    )


def _said(job: _Job, samples: Samples, running, prompt, step, matched, token, log_prob) -> tuple:
    """Write a token of each running response down.

    Returns:
        Samples, and for each response whether it goes on, and the state of the stop strings' automaton.
    """
    to = jnp.where(running, prompt, job.count), step
    samples = Samples(
        samples.tokens.at[to].set(token, mode="drop"),
        samples.log_probs.at[to].set(log_prob, mode="drop"),
        samples.lengths.at[to[0]].add(1, mode="drop"),
    )
    running = running & ~stops(token, job.decoding) & (step + 1 < job.decoding.max_tokens)
    if job.stop_table is not None:
        matched = job.stop_table[matched, token]
        running = running & (matched < job.stop_table.shape[0] - 1)
    return samples, running, matched


def _goes_on(job: _Job, s: _State) -> jax.Array:
    """Whether to decode on before rows are refilled."""
    waiting = job.end - s.waiting
    enough = (waiting > 0) & ((~s.running).sum() >= jnp.minimum(job.refilled_together, waiting))
    return s.running.any() & ~enough


def _decode(job: _Job, s: _State) -> _State:
    """One more token of every row: the last one is read, the next one drawn."""
    at = job.width + s.step
    write_at = at[0] if job.row_for_each else at  # rows that began together are at the same place
    cache: Any
    params = job.params if job.layers_apart is None else job.layers_apart
    logits, cache = Policy(job.config).apply(
        {"params": params}, s.token[:, None], (at - s.start)[:, None], s.start, job.place(s.cache), write_at
    )
    step = s.step + 1
    token, log_prob = job.draw(logits[:, 0], s.prompt, step)
    samples, running, matched = _said(job, s.samples, s.running, s.prompt, step, s.matched, token, log_prob)
    return s._replace(step=step, running=running, matched=matched, token=token, cache=cache, samples=samples)
