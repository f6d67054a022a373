"""The programs that a training run calls, with the shapes and shardings that it calls them with."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from proxmo_jax.agent.batches import response_room
from proxmo_jax.agent.make_player import run_optimizer
from proxmo_jax.agent.player import Limits, batch_bucket, width_bucket
from proxmo_jax.agent.settings import Config, loss_settings, micro_batches
from proxmo_jax.policy import adapters
from proxmo_jax.policy.decoder import PolicyConfig, parameter_shapes
from proxmo_jax.policy.decoding import converted, sample
from proxmo_jax.policy.sampling import Decoding, stop_table
from proxmo_jax.policy.sharding import AXES, RULES, by_host, make_mesh, optimizer_shardings, parameter_shardings
from proxmo_jax.training.buffers import Buffer
from proxmo_jax.training.rows import Rows, gather_rows
from proxmo_jax.training.update import TrainState, estimate, policy_step, row_log_probs

WORDS = 4096  # different words that a run observes, roughly
STOP_IDS = (0, 1)  # how many there are matters, not which


@dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
        name: what it does.
        function: jitted.
        arguments: shapes with shardings.
        options: static arguments by name.
        held: which of `Case.held` are among the arguments.
    """

    name: str
    function: Any
    arguments: tuple
    options: dict[str, Any]
    held: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A run on a slice.

    Attributes:
        config: the run's settings.
        policy: shape of the policy.
        mesh: the slice's devices, of one host or several.
        own: the devices of a host, on which it samples; (): all.
    """

    config: Config
    policy: PolicyConfig
    mesh: Mesh
    own: tuple[Any, ...] = ()

    @property
    def hosts(self) -> int:
        """The hosts of the slice."""
        return by_host(self.mesh).shape["host"]

    @property
    def local(self) -> Mesh:
        """The mesh of the devices on which a host samples."""
        if self.hosts == 1:
            return self.mesh
        data, fsdp, tensor = (by_host(self.mesh).shape[axis] for axis in AXES)
        return make_mesh(data, fsdp, tensor, devices=self.own)

    @property
    def groups(self) -> int:
        """Groups that a host plays."""
        return self.config.rollout.num_groups // self.hosts

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.mesh.size

    @property
    def episodes(self) -> int:
        """Episodes of an iteration."""
        return self.config.rollout.num_groups * self.config.rollout.group_size

    @property
    def rows(self) -> int:
        """Prompts of a turn of a host, batch padding included."""
        return batch_bucket(self.groups * self.config.rollout.group_size, self.local)

    @property
    def slots(self) -> int:
        """Responses that a host decodes at the same time."""
        slots = self.config.rollout.max_num_seqs
        return slots if 0 < slots < self.rows else self.rows

    @property
    def width(self) -> int:
        """Tokens of the widest prompts."""
        limit = self.config.rollout.max_prompt_length
        return min(limit, width_bucket(limit))

    @property
    def sampler(self) -> PolicyConfig:
        """The shape of the policy that samples: adapters are merged."""
        return dataclasses.replace(self.policy, lora_rank=0)

    @cached_property
    def held(self) -> dict[str, Any]:
        """What a run keeps on the devices: trees of shapes with shardings."""
        shardings = parameter_shardings(self.mesh, self.policy)
        params = _like(parameter_shapes(self.policy), shardings)
        _, learned = adapters.split(params)
        optimizer = run_optimizer(self.config)
        state = jax.eval_shape(optimizer.init, learned)
        placed = optimizer_shardings(optimizer, learned, adapters.split(shardings)[1])
        return {
            "trained parameters": learned,
            "optimiser": _like(state, placed),
            "reference": params,
            "rollout buffer": self.joined(self.buffer),
        }

    @property
    def buffer(self) -> Any:
        """Shapes of the rollout buffer."""
        rollout = self.config.rollout
        return jax.eval_shape(
            lambda: Buffer.empty(
                rollout.num_groups, rollout.group_size, rollout.max_turns,
                prompt=rollout.max_prompt_length, response=rollout.max_response_length, words=Limits.words,
            )
        )  # fmt: skip

    def joined(self, tree: Any) -> Any:
        """Shapes with their arrays split by the host that makes them, as `sharding.join_hosts` does."""
        if self.hosts == 1:
            return whole(self.mesh, tree)
        sharding = NamedSharding(by_host(self.mesh), PartitionSpec("host"))
        return jax.tree.map(lambda x: _placed(x.shape, x.dtype, sharding), tree)

    def with_buffer(self, tree: Any) -> Any:
        """Shapes with their arrays on every device, for programs that read the rollout buffer."""
        return whole(self.mesh if self.hosts == 1 else by_host(self.mesh), tree)

    def rows_of(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array of the update, split by rows."""
        return _placed(shape, dtype, NamedSharding(self.mesh, PartitionSpec(RULES["batch"])))

    def prompts_of(self, *shape: int) -> jax.ShapeDtypeStruct:
        """An int32 array of a host's rollout, split by rows."""
        return _placed(shape, jnp.int32, NamedSharding(self.local, PartitionSpec(RULES["batch"])))

    @property
    def cache_bytes(self) -> float:
        """Bytes of the KV cache on a device."""
        rows, heads = self.local.shape["data"] * self.local.shape["fsdp"], self.local.shape["tensor"]
        places = self.width + self.config.rollout.max_response_length
        c = self.sampler
        of_row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * places * jnp.dtype(c.dtype).itemsize
        return of_row * self.slots / rows / heads

    @property
    def decoding_shapes(self) -> Any:
        """Parameters as the sampler reads them."""
        gathered = self.config.rollout.gather_weights and self.local.shape["fsdp"] > 1
        shardings = parameter_shardings(self.local, self.sampler, gathered=gathered)
        shapes = parameter_shapes(dataclasses.replace(self.sampler, param_dtype=self.sampler.dtype))
        return _like(shapes, shardings)

    def loops(self, steps: float) -> tuple[float, ...]:
        """How often the loops of `sample` run, from the tokens of a response: until rows are refilled or all end."""
        if self.slots == self.rows:
            return (steps - 1,)
        refills = math.ceil(self.rows / max(self.slots // 8, 1))
        return (refills, math.ceil(self.rows / self.slots) * (steps - 1) / refills)


def programs(case: Case) -> dict[str, Callable[[], Program]]:
    """The programs of an iteration by name, in the order in which a run calls them.

    Args:
        case: the run on a slice.

    Returns:
        Functions that make each of them.
    """
    found = {
        "merge adapters": _merge,
        "gather weights": _gather,
        "turn": _turn,
        "estimator": _estimator,
        "packing": _packing,
        "log-probs": _log_probs,
        "update": _update,
    }
    if not case.policy.lora_rank:
        del found["merge adapters"]
    if not _policies(case):
        del found["log-probs"]
    return {name: partial(make, case) for name, make in found.items()}


def _merge(case: Case) -> Program:
    held = ("reference", "trained parameters")
    return Program("merge adapters", adapters.merge, (case.held["reference"], number(case.mesh)), {}, held)


def _gather(case: Case) -> Program:
    params = case.held["reference"]
    if case.policy.lora_rank:
        params, _ = adapters.split(params)
    # With several hosts the copy to each host's devices gathers over the same axes.
    gather = case.config.rollout.gather_weights and case.mesh.shape["fsdp"] > 1
    options = {"config": case.sampler, "mesh": case.mesh, "gather": gather}
    return Program("gather weights", converted, (params,), options, ("trained parameters",))


def _turn(case: Case) -> Program:
    rollout, table = case.config.rollout, None
    key = whole(case.local, jax.eval_shape(lambda: jax.random.key(0)))
    if rollout.stop:
        states = stop_table([""], rollout.stop).shape[0]
        table = whole(case.local, jax.ShapeDtypeStruct((states, case.policy.vocab_size), jnp.int16))
    decoding = Decoding(rollout.max_response_length, STOP_IDS, 0, rollout.top_k, rollout.top_p)
    arguments = (
        case.decoding_shapes, case.prompts_of(case.rows, case.width), case.prompts_of(case.rows), key,
        number(case.local), table, case.prompts_of(case.rows),
    )  # fmt: skip
    options = {"config": case.sampler, "decoding": decoding, "slots": rollout.max_num_seqs, "mesh": case.local}
    return Program("turn", sample, arguments, options, ())


def _estimator(case: Case) -> Program:
    texts = case.buffer.word_ids.shape[1]
    numbers = (((case.episodes,), bool), ((case.episodes,), jnp.int32), ((WORDS,), jnp.int32))
    arrays = case.with_buffer(tuple(jax.ShapeDtypeStruct(*x) for x in numbers))
    arguments = (case.held["rollout buffer"], *arrays, case.config.estimator)
    return Program("estimator", estimate, arguments, {"texts": texts}, ("rollout buffer",))


def _packing(case: Case) -> Program:
    shape = (case.episodes, case.config.rollout.max_turns)
    turns = case.with_buffer(tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)))
    rows = jax.ShapeDtypeStruct((case.config.optimizer.rows_per_batch, case.config.optimizer.row_length), jnp.int32)
    placed = case.rows_of(*rows.shape) if case.hosts == 1 else case.with_buffer(rows)
    arguments = (case.held["rollout buffer"], *turns, placed, placed)
    return Program("packing", gather_rows, arguments, {"row_answers": response_room(case.config)}, ("rollout buffer",))


def _rows(case: Case) -> Rows:
    """Shapes of a mini-batch."""
    count, length = case.config.optimizer.rows_per_batch, case.config.optimizer.row_length
    answers, kinds = response_room(case.config), {"mask": jnp.bool_}
    kinds |= dict.fromkeys(("advantage", "old_log_probs", "reference"), jnp.float32)
    wide = ("tokens", "positions", "segments")
    shapes: dict[str, Any] = {
        f.name: case.rows_of(count, length if f.name in wide else answers, dtype=kinds.get(f.name, jnp.int32))
        for f in dataclasses.fields(Rows)
    }
    return Rows(**shapes)


def _policies(case: Case) -> int:
    """Policies whose log-probs are computed before the update."""
    loss = case.config.loss
    return (loss.kl_coef > 0) + (loss.old_log_probs == "trainer")


def _log_probs(case: Case) -> Program:
    arguments = ((case.held["reference"],) * _policies(case), _rows(case), number(case.mesh))
    options = {"config": case.policy, "micro_batches": micro_batches(case.config, case.devices)}
    held = ("reference", "trained parameters")[: _policies(case)]
    return Program("log-probs", row_log_probs, arguments, options, held)


def _update(case: Case) -> Program:
    state = TrainState(case.held["trained parameters"], case.held["optimiser"])
    frozen, _ = adapters.split(case.held["reference"])
    arguments = (state, _rows(case), number(case.mesh), number(case.mesh), frozen)
    options = {
        "config": case.policy,
        "optimizer": run_optimizer(case.config),
        "settings": loss_settings(case.config),
        "micro_batches": micro_batches(case.config, case.devices),
    }
    held = ("trained parameters", "optimiser") + (("reference",) if case.policy.lora_rank else ())
    return Program("update", policy_step, arguments, options, held)


def whole(mesh: Mesh, tree: Any) -> Any:
    """Shapes with their arrays on every device of a mesh."""
    return jax.tree.map(lambda x: _placed(x.shape, x.dtype, NamedSharding(mesh, PartitionSpec())), tree)


def number(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A float32 on every device of a mesh."""
    return _placed((), jnp.float32, NamedSharding(mesh, PartitionSpec()))


def _placed(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _like(shapes: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(lambda x, sharding: _placed(x.shape, x.dtype, sharding), shapes, shardings)


def bytes_on_a_chip(tree: Any) -> float:
    """Bytes that a tree of shapes with shardings takes on each device."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "sharding")]
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))
