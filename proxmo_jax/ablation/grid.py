"""Estimate one recorded batch under thousands of settings of the estimator.

    proxmo ablate estimator ROLLOUT.npz --grid "temperature=0.05:0.8:12 alpha=1,2,4,8 step_weight=0,0.5,1
        modulation=on,off aggregation=none,hard,soft"

ROLLOUT: steps as for `proxmo advantages`; `proxmo train` writes those of its last iteration to rollout.npz. Settings
that differ only in floats share a compiled function under `vmap`, `chunk` of them at a time; the similarity of the
texts does not depend on them and is computed once per chunk. Groups are sharded over the devices. Every setting is
compared with published ProxMO.
"""

import csv
import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from proxmo_jax.agent.report import progress_bar, terminal
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.batch import batch_advantages, pad_groups, text_repeats
from proxmo_jax.estimator.embeddings import documents, unit_vectors
from proxmo_jax.estimator.partial_sums import similarity
from proxmo_jax.estimator.presets import proxmo
from proxmo_jax.estimator.steps_file import needed, read_steps
from proxmo_jax.estimator.types import LARGEST, Group, Settings

# Axes that are fields of `Settings`, and the range of their values.
AXES = {
    "temperature": (1e-6, LARGEST),
    "alpha": (1e-6, LARGEST),
    "step_weight": (0.0, LARGEST),
    "modulation_range": (0.0, 1.0),
    "discount": (0.0, 1.0),
    "invalid_penalty": (0.0, LARGEST),
}
CHOICES = {"modulation": ("on", "off"), "aggregation": ("none", "hard", "soft")}
# Axes without effect under a choice; they are not varied there.
IDLE = {"aggregation=none": ("temperature", "step_weight"), "aggregation=hard": ("temperature",),
        "modulation=off": ("alpha", "modulation_range")}  # fmt: skip
MEASURES = (
    "rank_correlation", "sign_flips", "baseline_variance", "neighbours", "step_share", "size", "mass_on_wins",
    "mass_in_hard_groups", "mass_in_mixed_groups", "mass_in_easy_groups", "mass_late",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Estimate a batch under every combination of a grid."""

    rollout: tyro.conf.Positional[Path]
    """.npz or .jsonl with group, trajectory, step, reward, success, action_valid and texts."""
    grid: str = "temperature=0.05:0.8:12 alpha=1,2,4,8 step_weight=0,0.5,1 modulation=on,off aggregation=none,hard,soft"
    """Axes: temperature, alpha, step_weight, modulation_range, discount, invalid_penalty (numbers `a,b,c`, or
    `from:to:count`), modulation (on, off), aggregation (none, hard, soft)."""
    out: Path = Path("runs/ablate_estimator")
    """Folder for table.csv, table.npz and figures.png."""
    chunk: int = 64
    """Settings computed at once; fewer if the memory limit requires it."""
    memory: float = 4.0
    """Memory limit for them in GiB."""


def main(config: Config, console: Console | None = None) -> Path:
    """Compute the table, draw the figures and return the folder.

    Raises:
        UserError: invalid options or steps; nothing is written then.
    """
    console = console or terminal()
    grid = settings_of(parse(config.grid))
    if config.chunk < 1:
        raise UserError(f"--chunk must be at least 1, got {config.chunk}")
    steps = read_steps(config.rollout)
    try:
        group, _ = Group.from_steps(**needed(steps, texts=True), max_features=proxmo().max_features)
    except UserError as error:
        raise UserError(f"{config.rollout}: {error}") from error
    chunk = fitting(group, config.chunk, config.memory)
    began = time.time()
    with progress_bar(console) as bar:
        task = bar.add_task("settings", total=sum(len(points) for _, points in grid), note="")
        table = estimate(group, grid, chunk, lambda done: bar.update(task, advance=done))
    took, count = time.time() - began, len(table["aggregation"])
    config.out.mkdir(parents=True, exist_ok=True)
    write(config.out, table)
    figures(config.out / "figures.png", table, group)
    console.print(
        f"{count} settings on {int(group.mask.sum())} steps in {took:.1f} s ({count / took:,.0f} per second,"
        f" compilation included): {config.out}/ holds table.csv, table.npz and figures.png.",
        soft_wrap=True,
    )
    return config.out


def parse(text: str) -> dict[str, list]:
    """Axis -> its values. Raises UserError for an empty grid, an unknown axis and invalid values."""
    axes: dict[str, list] = {}
    for part in text.split():
        name, equals, values = part.partition("=")
        if name not in AXES and name not in CHOICES:
            raise UserError(f"--grid: unknown axis {name!r}; need some of {', '.join((*AXES, *CHOICES))}")
        if name in axes:
            raise UserError(f"--grid: {name} is given twice")
        if not equals or not values:
            raise UserError(f"--grid: {name} has no values; write {name}=a,b or {name}=from:to:count")
        axes[name] = choices(name, values) if name in CHOICES else numbers(name, values)
    if not axes:
        raise UserError("--grid: is empty; write for example 'temperature=0.05:0.8:12 aggregation=soft'")
    return axes


def choices(name: str, values: str) -> list[str]:
    """The values of an axis of names."""
    found = values.split(",")
    odd = [value for value in found if value not in CHOICES[name]]
    if odd:
        raise UserError(f"--grid: {name} may be {', '.join(CHOICES[name])}; got {odd[0]!r}")
    return list(dict.fromkeys(found))


def numbers(name: str, values: str) -> list[float]:
    """The values of an axis of numbers."""
    try:
        if ":" in values:
            first, last, count = values.split(":")
            if int(count) < 1:
                raise ValueError
            found = np.linspace(float(first), float(last), int(count)).tolist()
        else:
            found = [float(value) for value in values.split(",")]
    except ValueError:
        raise UserError(f"--grid: {name}={values} is neither a,b,c nor from:to:count with numbers") from None
    least, most = AXES[name]
    for value in found:
        if not least <= value <= most:
            limits = f"at least {least:g}" if most == LARGEST else f"between {least:g} and {most:g}"
            raise UserError(f"--grid: {name} must be {limits}, got {value:g}")
    return list(dict.fromkeys(found))


def settings_of(axes: dict[str, list]) -> list[tuple[Settings, list[dict]]]:
    """The settings of each aggregation, and the N points of the grid that they represent.

    Floats that vary are [N]; the others are scalars, so that what depends only on them is computed once.
    """
    found = []
    for aggregation in axes.get("aggregation", ["soft"]):
        points: dict[tuple, dict] = {}
        names = [name for name in axes if name != "aggregation"]
        for values in itertools.product(*(axes[name] for name in names)):
            point = {"aggregation": aggregation, "modulation": "on", **dict(zip(names, values, strict=True))}
            idle = {name for key, names in IDLE.items() if point[key.partition("=")[0]] == key.partition("=")[2]
                    for name in names}  # fmt: skip
            point = {name: value for name, value in point.items() if name not in idle}
            points.setdefault(tuple(sorted(point.items(), key=str)), point)
        fields: list[dict[str, float]] = []
        for point in points.values():
            known = {name: value for name, value in point.items() if name in AXES}
            fields.append(known | ({"modulation_range": 0.0} if point["modulation"] == "off" else {}))
        floats = [f.name for f in dataclasses.fields(Settings) if not f.metadata.get("static")]
        base = proxmo(aggregation=aggregation)
        stacked: dict[str, Any] = {}
        for name in floats:
            column = np.array([field.get(name, getattr(base, name)) for field in fields], np.float32)
            stacked[name] = column if (column != column[0]).any() else column[0]
        found.append((dataclasses.replace(base, **stacked), list(points.values())))
    return found


def fitting(group: Group, chunk: int, memory: float) -> int:
    """The number of settings that fit in memory, at most `chunk`. Raises UserError if not even one fits."""
    groups, members, turns = group.reward.shape
    texts = group.words.ids.shape[1] if group.words is not None else 1
    one = 4 * groups * (2 * texts * texts + 16 * members * turns)
    most = int(memory * 2**30 / one)
    if most < 1:
        raise UserError(
            f"--memory: one setting needs about {one / 2**30:.2g} GiB for {groups} groups of {members} x {turns} steps"
            f" with {texts} texts, got {memory:g}"
        )
    return min(chunk, most)


def estimate(
    group: Group, grid: Sequence[tuple[Settings, list[dict]]], chunk: int, on_chunk=lambda done: None
) -> dict[str, np.ndarray]:  # fmt: skip
    """Estimate a batch under all settings of a grid.

    Args:
        group: a batch, [G, M, T].
        grid: of `settings_of`.
        chunk: settings computed at once.
        on_chunk: called with the number of settings of each finished chunk.

    Returns:
        The table: a column for each axis and metric, with an entry per setting.

    Raises:
        UserError: the advantages are not finite.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",))
    padded = pad_groups(group, jax.device_count())
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    words = padded.words
    assert words is not None
    padded = jax.device_put(dataclasses.replace(padded, words=None), split)
    words = words._replace(
        ids=jax.device_put(words.ids, split), counts=jax.device_put(words.counts, split),
        alphabetical=jax.device_put(words.alphabetical, whole),
    )  # fmt: skip
    padded = dataclasses.replace(padded, words=words)
    joint = _joint(padded, proxmo())
    if not jnp.isfinite(joint).all():
        raise UserError("reward: the advantages are not finite; need rewards that can be added up in float32")
    reference = rank(joint.reshape(-1), padded.mask.reshape(-1))
    rows: list[dict] = []
    for settings, points in grid:
        count = len(points)
        size = min(chunk, count)
        for start in range(0, count, size):
            take = np.minimum(np.arange(start, start + size), count - 1)  # the last one pads the chunk
            part = jax.tree.map(lambda x, take=take: x[take] if np.ndim(x) else x, settings)
            measured = jax.device_get(measure(padded, part, reference))
            for i, point in enumerate(points[start : start + size]):
                rows.append({**point, **{name: float(measured[name][i]) for name in MEASURES}})
            on_chunk(min(size, count - start))
    names = [*CHOICES, *AXES, *MEASURES]
    return {
        name: np.array([row.get(name, "" if name in CHOICES else np.nan) for row in rows])
        for name in names
        if any(name in row for row in rows)
    }


@jax.jit
def _joint(group: Group, settings: Settings) -> jax.Array:
    return batch_advantages(group, settings).joint


@jax.jit
def measure(group: Group, settings: Settings, reference: jax.Array) -> dict[str, jax.Array]:
    """The metrics of N settings.

    Args:
        group: a batch, [G, M, T].
        settings: some of its floats are [N].
        reference: `rank` of the published advantages.

    Returns:
        Each metric of `MEASURES`, float32 [N].
    """
    unit = jnp.zeros((*group.reward.shape[:1], 1, 1))
    if settings.aggregation == "soft":
        assert group.words is not None
        corpus = documents(group.words, text_repeats(group, group.words.ids.shape[1]))
        unit = unit_vectors(group.words, corpus)
    alike = jax.vmap(similarity)(unit, unit)
    varying = {f.name: x for f in dataclasses.fields(Settings) if jnp.ndim(x := getattr(settings, f.name))}

    def one(values: dict[str, Any]) -> dict[str, jax.Array]:
        return _measure(group, alike, reference, dataclasses.replace(settings, **values))

    if not varying:
        return jax.tree.map(lambda x: x[None], one({}))
    return jax.vmap(one)(varying)


def _measure(group: Group, alike: jax.Array, reference: jax.Array, settings: Settings) -> dict[str, jax.Array]:
    """The metrics of one setting, means over the steps that happened.

    rank_correlation: Spearman's, of the joint advantages with the reference; sign_flips: share of steps with the
    opposite sign; baseline_variance: variance of the step baselines within groups; neighbours: 1 / sum of squared
    weights; step_share: share of the step advantages in the sum of absolute values; size: mean |advantage|; mass_...:
    share of the sum of |advantage| on winning trajectories, in groups that mostly fail (p <= 1/4), are mixed, or mostly
    win (p >= 3/4), and in the later half of trajectories.
    """
    mask = jnp.asarray(group.mask)
    steps = mask.sum()
    found = batch_advantages(group, settings)
    joint, flat = found.joint, mask.reshape(-1)

    def mean(x):
        return jnp.where(mask, x, 0.0).sum() / steps

    penalty = settings.invalid_penalty * (1.0 - group.action_valid.astype(jnp.float32))
    score = jnp.where(mask, found.returns - penalty, 0.0)
    baseline = score - found.step if settings.aggregation != "none" else jnp.zeros_like(score)
    inside = jnp.where(mask, baseline, 0.0).sum((1, 2), keepdims=True) / jnp.maximum(mask.sum((1, 2), keepdims=True), 1)
    size = jnp.where(mask, jnp.abs(joint), 0.0)
    total = jnp.maximum(size.sum(), 1e-12)
    step = settings.step_weight * jnp.abs(found.step)
    rate = found.success_rate[:, None, None]
    length = mask.sum(2, keepdims=True)
    late = jnp.arange(mask.shape[2]) * 2 >= length
    ranks = rank(joint.reshape(-1), flat)
    signs = jnp.sign(joint.reshape(-1)) * reference["sign"]
    return {
        "rank_correlation": correlation(ranks["rank"], reference["rank"], flat),
        "sign_flips": jnp.where(flat, signs < 0, False).sum() / steps,
        "baseline_variance": mean(jnp.square(baseline - inside)),
        "neighbours": mean(neighbours(group, alike, settings)),
        "step_share": mean(step) / jnp.maximum(mean(step) + mean(jnp.abs(found.episode)), 1e-12),
        "size": mean(size),
        "mass_on_wins": (size * group.success[:, :, None]).sum() / total,
        "mass_in_hard_groups": (size * (rate <= 0.25)).sum() / total,
        "mass_in_mixed_groups": (size * ((rate > 0.25) & (rate < 0.75))).sum() / total,
        "mass_in_easy_groups": (size * (rate >= 0.75)).sum() / total,
        "mass_late": (size * late).sum() / total,
    }


def neighbours(group: Group, alike: jax.Array, settings: Settings) -> jax.Array:
    """1 / sum_j w_ij^2 of each step's baseline, float32 [G, M, T]: its effective number of steps."""
    assert group.anchor is not None
    shape = group.mask.shape
    flat, row = group.mask.reshape(shape[0], -1), group.anchor.reshape(shape[0], -1)
    if settings.aggregation == "none":
        return jnp.zeros(shape)
    if settings.aggregation == "hard":
        return jax.vmap(lambda row, mask: jnp.zeros(row.shape[0]).at[row].add(mask)[row])(row, flat).reshape(shape)

    def one(alike, row, mask):
        count = jnp.zeros(alike.shape[0]).at[row].add(mask)
        weight = jnp.exp((alike - 1.0) / settings.temperature) * count
        weight = weight / jnp.maximum(weight.sum(1, keepdims=True), 1e-30)
        return (1.0 / jnp.maximum((jnp.square(weight) / jnp.maximum(count, 1)).sum(1), 1e-30))[row]

    return jax.vmap(one)(alike, row, flat.astype(jnp.float32)).reshape(shape)


def rank(values: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Ranks of the values under the mask (ties get their mean rank) and their signs; float32 [N] each."""
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf))
    left, right = jnp.searchsorted(ordered, values, side="left"), jnp.searchsorted(ordered, values, side="right")
    return {"rank": (left + right - 1).astype(jnp.float32) / 2, "sign": jnp.where(mask, jnp.sign(values), 0.0)}


def correlation(a: jax.Array, b: jax.Array, mask: jax.Array) -> jax.Array:
    """Pearson's correlation under the mask; 0 if one side is constant."""
    count = mask.sum()

    def centred(x):
        return jnp.where(mask, x - jnp.where(mask, x, 0.0).sum() / count, 0.0)

    a, b = centred(a), centred(b)
    scale = jnp.sqrt((a * a).sum() * (b * b).sum())
    return jnp.where(scale > 0, (a * b).sum() / jnp.where(scale > 0, scale, 1.0), 0.0)


def write(folder: Path, table: dict[str, np.ndarray]) -> None:
    """Write table.npz and table.csv."""
    np.savez(folder / "table.npz", **table)  # type: ignore[arg-type]
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        for row in zip(*table.values(), strict=True):
            writer.writerow(["" if isinstance(x, float) and np.isnan(x) else x for x in map(_plain, row)])


def _plain(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, np.floating) else str(value)


def figures(path: Path, table: dict[str, np.ndarray], group: Group) -> None:
    """Draw six panels: rank correlation, sign flips, baseline variance and neighbours by temperature; singletons of
    exact matching; distribution of the mass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(2, 3, figsize=(15, 8))
    kinds = [k for k in CHOICES["aggregation"] if (table["aggregation"] == k).any()]
    temperature = table.get("temperature", np.full(len(table["aggregation"]), np.nan))

    def against_temperature(axis, name: str, title: str) -> None:
        for i, kind in enumerate(kinds):
            own = table["aggregation"] == kind
            values, colour = table[name][own], f"C{i}"
            if kind == "soft" and np.isfinite(temperature[own]).any():
                at = np.unique(temperature[own])
                parts = [values[temperature[own] == t] for t in at]
                axis.plot(at, [part.mean() for part in parts], "o-", color=colour, label=kind, ms=4)
                axis.fill_between(at, [p.min() for p in parts], [p.max() for p in parts], color=colour, alpha=0.2, lw=0)
            else:
                axis.axhline(values.mean(), color=colour, label=kind)
                axis.axhspan(values.min(), values.max(), color=colour, alpha=0.12, lw=0)
        axis.set_title(title)
        axis.set_xlabel("temperature")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    against_temperature(axes[0, 0], "rank_correlation", "rank correlation with published ProxMO")
    against_temperature(axes[0, 1], "sign_flips", "share of steps with the opposite sign")
    against_temperature(axes[0, 2], "baseline_variance", "variance of step baselines within groups")
    against_temperature(axes[1, 0], "neighbours", "effective number of steps of a baseline")
    axes[1, 1].hist(singletons(group), bins=np.linspace(0, 1, 21), color="C1")
    axes[1, 1].set_title("share of steps with a unique text, by group")
    axes[1, 1].set_xlabel("share")
    axes[1, 1].set_ylabel("groups")
    names = [n for n in MEASURES if n.startswith("mass_in") or n in ("mass_on_wins", "mass_late")]
    for i, kind in enumerate(kinds):
        own = table["aggregation"] == kind
        means = [table[name][own].mean() for name in names]
        axes[1, 2].bar(np.arange(len(names)) + 0.27 * (i - 1), means, 0.25, label=kind, color=f"C{i}")
    axes[1, 2].set_xticks(range(len(names)), [n.removeprefix("mass_").replace("_", "\n") for n in names], fontsize=8)
    axes[1, 2].set_title("share of the sum of |advantage|")
    axes[1, 2].legend(fontsize=8)
    drawn.suptitle("shaded: range over the other axes of the grid", fontsize=9)
    drawn.tight_layout()
    drawn.savefig(path, dpi=100)
    plt.close(drawn)


def singletons(group: Group) -> np.ndarray:
    """Share of each group's steps whose text is unique in the group, float [G]."""
    shares = []
    for row, mask in zip(np.asarray(group.anchor), np.asarray(group.mask), strict=True):
        _, counts = np.unique(row[mask], return_counts=True)
        shares.append((counts == 1).sum() / max(mask.sum(), 1))
    return np.array(shares)
