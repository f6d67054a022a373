"""Meshes that a model and a slice allow, and which of them to compile first."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from proxmo_jax.agent.settings import Config
from proxmo_jax.errors import UserError
from proxmo_jax.plan.chips import Topology, devices_of_a_host
from proxmo_jax.plan.iteration import Lengths, calls_of
from proxmo_jax.plan.programs import Case, bytes_on_a_chip
from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.policy.sharding import make_mesh


def with_mesh(config: Config, mesh: str, where: Topology) -> Config:
    """The settings with a mesh.

    Args:
        config: the settings.
        mesh: sizes of data, fsdp and tensor with commas, such as 1,16,1.
        where: the slice.

    Returns:
        The settings.

    Raises:
        UserError: for anything else, and sizes that do not multiply to the number of chips.
    """
    words = mesh.split(",")
    if len(words) != 3 or not all(word.strip().isdigit() and int(word) for word in words):
        raise UserError(f"--mesh must be the sizes of data, fsdp and tensor, such as 1,16,1; got {mesh!r}")
    data, fsdp, tensor = map(int, words)
    if data * fsdp * tensor != where.count:
        raise UserError(
            f"--mesh {mesh}: data {data} x fsdp {fsdp} x tensor {tensor} is {data * fsdp * tensor} devices, need the"
            f" {where.count} of {where.name}"
        )
    return _on(config, fsdp, tensor)


def _on(config: Config, fsdp: int, tensor: int) -> Config:
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=fsdp, tensor=tensor))


def divided(config: Config, where: Topology) -> Config:
    """The settings with mini-batches, and rows decoded at once, rounded up to what the mesh divides."""
    devices = where.count // config.mesh.tensor

    def up(number: int) -> int:
        return math.ceil(number / devices) * devices

    optimizer = dataclasses.replace(config.optimizer, rows_per_batch=up(config.optimizer.rows_per_batch))
    rollout = dataclasses.replace(config.rollout, max_num_seqs=up(config.rollout.max_num_seqs))
    return dataclasses.replace(config, optimizer=optimizer, rollout=rollout)


def candidates(
    config: Config, policy: PolicyConfig, where: Topology, devices: Sequence[Any], lengths: Lengths
) -> list[Config]:
    """The settings on each mesh that divides the model and leaves room for what is kept, the most promising first.

    Args:
        config: the run's settings; mini-batches are rounded up to what a mesh divides.
        policy: shape of its policy.
        where: the slice.
        devices: its devices.
        lengths: assumed of the episodes.

    Returns:
        The settings.

    Raises:
        UserError: if there is no such mesh.
    """
    found, least = [], math.inf
    own = tuple(devices_of_a_host(list(devices), where))
    for tensor in _divisors(math.gcd(where.count, policy.num_key_value_heads)):
        for fsdp in _divisors(where.count // tensor):
            wanted = divided(_on(config, fsdp, tensor), where)
            case = Case(wanted, policy, make_mesh(0, fsdp, tensor, devices=devices), own)
            try:
                kept = sum(map(bytes_on_a_chip, case.held.values()))
            except UserError:  # a size of the model that the mesh does not divide
                continue
            least = min(least, kept)
            if kept <= where.chip.hbm:
                found.append((rough_seconds(case, where, lengths), fsdp, tensor, wanted))
    if not found:
        raise UserError(
            f"--search: no mesh of {where.name} has room for what is kept, at least {least / 2**30:.1f} GiB a chip of"
            f" {where.chip.hbm / 2**30:.1f}; need more chips, --model.lora-rank or --optimizer.moments-dtype bfloat16"
        )
    return [wanted for *_, wanted in sorted(found, key=lambda entry: entry[:3])]


def rough_seconds(case: Case, where: Topology, lengths: Lengths) -> float:
    """Seconds of an iteration that depend on the mesh, counted by hand: weights and cache that decoding reads, weights
    that the update gathers, activations that tensor parallelism exchanges, and padding that is computed.
    """
    chip, policy, calls = where.chip, case.policy, calls_of(case, lengths)
    fsdp, tensor = case.mesh.shape["fsdp"], case.mesh.shape["tensor"]
    weights = bytes_on_a_chip(case.decoding_shapes)
    waves = math.ceil(case.rows / case.slots)
    steps = lengths.turns * lengths.longest * waves
    read = steps * (weights + case.cache_bytes) / chip.bandwidth
    if not case.config.rollout.gather_weights:
        read += steps * weights * (fsdp - 1) / chip.axis_bandwidth
    rows = case.config.optimizer.rows_per_batch * tensor / case.devices  # of a device and mini-batch
    parts = max(math.ceil(rows * case.config.optimizer.row_length / case.config.optimizer.micro_batch_tokens), 1)
    passes = 4 if policy.remat == "full" else 3
    whole = sum(math.prod(x.shape) for x in jax.tree.leaves(case.held["reference"])) * 2 / tensor
    gathered = calls["update"] * parts * passes * whole * (1 - 1 / fsdp)
    tokens = rows * case.config.optimizer.row_length
    exchanged = calls["update"] * passes * 2 * policy.num_hidden_layers * tokens * policy.hidden_size * 2
    exchanged *= 2 * (1 - 1 / tensor)
    padded = case.rows * case.hosts / case.episodes
    return padded * read + (gathered + exchanged) / chip.axis_bandwidth


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
