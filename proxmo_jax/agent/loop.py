"""One iteration of training: collect, estimate, update, report. What is large stays on the device."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from envs_bridge.pool import Pool
from envs_bridge.turn import Game
from proxmo_jax.agent import hosts
from proxmo_jax.agent.batches import batches, summed, trained_turns
from proxmo_jax.agent.dynamic_sampling import Draws
from proxmo_jax.agent.join import SharedWords, join_buffers, join_episodes
from proxmo_jax.agent.nonfinite import check_losses, check_rollout
from proxmo_jax.agent.overlong import length_penalty
from proxmo_jax.agent.player import Player
from proxmo_jax.agent.rollout import Rollout, collect
from proxmo_jax.agent.settings import Config, loss_settings, micro_batches
from proxmo_jax.agent.stop import StopOnSignal, Stopped
from proxmo_jax.agent.tasks import environment
from proxmo_jax.agent.throughput import Work, throughput_row
from proxmo_jax.estimator.packing import similar_anchors
from proxmo_jax.estimator.words import bucket
from proxmo_jax.policy import adapters
from proxmo_jax.policy.sharding import replicate
from proxmo_jax.training.buffers import Buffer, grow
from proxmo_jax.training.importance import weighted
from proxmo_jax.training.losses import PolicyLoss, token_mean
from proxmo_jax.training.rows import Rows
from proxmo_jax.training.update import TrainState, estimate, policy_step, row_log_probs


class Loop:
    """What the iterations share: the policy, the workers, the buffer, and the success rate of each kind of task."""

    def __init__(
        self,
        config: Config,
        player: Player,
        pool: Pool,
        games: list[Game],
        mesh,
        optimizer,
        reference,
        last: dict,
        watch: Callable[[str], None] = lambda part: None,
        stop: StopOnSignal | None = None,
        numbered: Mapping[str, Any] | None = None,
    ):
        """Make what the iterations share.

        Args:
            config, player, pool, games, mesh, optimizer, reference: of the run.
            last: the metrics row of the iteration before the next one.
            watch: is told what begins.
            stop: ends a rollout between two turns, and the iteration after it (default: nothing does).
            numbered: of a resumed run, what `Loop.numbered` returned.
        """
        self.watch, self.stop = watch, StopOnSignal() if stop is None else stop
        self.config, self.player, self.pool, self.games = config, player, pool, games
        kind = environment(config).kind
        self.kind_names, self.kinds = np.unique([kind(game) for game in games], return_inverse=True)
        self.solved = np.array([last.get(f"train/success_rate/{kind}", 0.5) for kind in self.kind_names])
        self.mesh, self.optimizer, self.reference = mesh, optimizer, reference
        self.frozen, _ = adapters.split(reference)
        self.micro_batches = micro_batches(config)
        self.settings, self.loss = config.estimator, loss_settings(config)
        limits = player.limits
        self.own = hosts.share(config.rollout.num_groups)  # the groups that this host plays
        numbered = numbered or {"words": [], "room": (0, 0)}
        self.words = SharedWords(player.vocabulary, numbered["words"])
        empty = Buffer.empty(
            self.own.stop - self.own.start, config.rollout.group_size, limits.turns,
            prompt=limits.prompt, response=limits.response, words=limits.words,
        )  # fmt: skip
        self.buffer = grow(replicate(player.local_mesh, empty), *numbered["room"])  # this host's
        self.played: Rollout | None = None  # the last one
        self.work = Work.of(player.config)

    def numbered(self) -> dict[str, Any]:
        """What the rounding of advantages depends on beside the rollout, as plain JSON: the words in the order of their
        numbers, and the buffer's room for texts of a group and words of a text."""
        return {"words": self.words.every.words(), "room": self.buffer.word_ids.shape[1:]}

    def draw(self, rng: np.random.Generator, count: int, played: np.ndarray) -> np.ndarray:
        """Games, other than those played if there are so many, by `--rollout.task-sampling`."""
        weight = np.ones(len(self.games))
        if self.config.rollout.task_sampling == "by_success":
            of_kind = np.sqrt(self.solved * (1 - self.solved)) + 0.1
            weight = of_kind[self.kinds] / np.bincount(self.kinds, minlength=len(of_kind))[self.kinds]
        if len(self.games) - len(np.unique(played)) >= count:
            weight[played] = 0.0
        return rng.choice(len(self.games), count, replace=len(self.games) < count, p=weight / weight.sum())

    def iteration(self, state: TrainState, iteration: int, key: jax.Array) -> tuple[TrainState, dict]:
        """Play, estimate and update once.

        Args:
            state: what is trained, donated.
            iteration: its number, from 1.
            key: random key of the rollout.

        Returns:
            The new state, and the iteration's row of metrics.

        Raises:
            Stopped: the iteration was dropped before its update; `state` is as it was.
            UserError: for numbers that are not finite.
        """
        self.played = None  # its buffer is written anew
        rng = np.random.default_rng([self.config.seed, iteration])
        chosen, times = self.draw(rng, self.config.rollout.num_groups, np.zeros(0, int)), [time.time()]
        params = adapters.join(self.frozen, state.params)
        draw_others = partial(self.draw, np.random.default_rng([self.config.seed, iteration, 1]))
        draws = Draws(self.config, self.games, chosen, draw_others, self.note_success)
        with jax.profiler.TraceAnnotation("rollout"), hosts.together(f"rollout of iteration {iteration}"):
            rollout = self.collect(params, chosen, draws, key, iteration)
        times.append(time.time())
        self.watch(f"iteration {iteration}, estimator")
        with jax.profiler.TraceAnnotation("estimator"):
            advantage = self.estimate(rollout)
        check_rollout(self.config.output.dir, iteration, rollout, advantage)
        times.append(time.time())
        with jax.profiler.TraceAnnotation("update"):
            learned_from = summed(rollout, advantage) if self.config.optimizer.sum_equal_turns else advantage
            trained = trained_turns(self.config, rollout, learned_from)
            state, losses = self.update(state, params, rollout, trained, learned_from, iteration, rng)
        times.append(time.time())
        self.played = rollout
        return state, self.report(rollout, draws, trained, advantage, losses, times)

    def collect(self, params: Any, chosen: np.ndarray, draws: Draws, key: jax.Array, iteration: int) -> Rollout:
        """Play the chosen tasks, and those drawn in their place, `group_size` times each, into the buffer.

        Each host plays its share of the groups; the rollout is that of all hosts, with this host's texts.

        Raises:
            Stopped: between two turns, or after them where another host was stopped.
        """
        rollout: Rollout | None = None
        with contextlib.suppress(Stopped):
            rollout = self.play(params, chosen, draws, key, iteration)
        if self.stop or rollout is None:  # all hosts ask here
            raise Stopped
        jax.block_until_ready(rollout.buffer)
        if self.settings.aggregation == "similar":
            self.number_similar_texts(rollout)
        assert rollout.buffer is not None
        self.buffer = rollout.buffer
        join_buffers(rollout, self.words, self.mesh)
        return join_episodes(rollout)

    def play(self, params: Any, chosen: np.ndarray, draws: Draws, key: jax.Array, iteration: int) -> Rollout:
        """This host's episodes of `collect`."""
        config = self.config

        def on_turn(turn: int, _: int) -> None:
            self.watch(f"iteration {iteration}, rollout, turn {turn + 1}")
            try:
                self.stop.check()
            except Stopped:
                draws.give_up()
                raise

        penalty = partial(
            length_penalty, limit=config.rollout.max_response_length, buffer=config.rollout.overlong_buffer,
            factor=config.rollout.overlong_penalty,
        )  # fmt: skip
        return collect(
            self.player,
            params,
            self.pool,
            [self.games[i] for i in chosen[self.own] for _ in range(config.rollout.group_size)],
            key,
            temperature=config.rollout.temperature,
            buffer=self.buffer,
            reward_scale=config.env.reward_scale,
            reward_score=config.env.reward == "score",
            penalise_inadmissible=config.rollout.penalise_inadmissible,
            length_penalty=penalty if config.rollout.overlong == "penalise" else None,
            redraw=draws,
            on_turn=on_turn,
            first=self.own.start * config.rollout.group_size,
        )

    def estimate(self, rollout: Rollout) -> jax.Array:
        """Joint advantages of a rollout: float32 [E, T]."""
        assert rollout.buffer is not None
        texts = min(bucket(rollout.texts), rollout.buffer.word_ids.shape[1])
        alphabetical = self.words.every.alphabetical()
        result = estimate(rollout.buffer, rollout.won, rollout.ending_anchor, alphabetical, self.settings, texts=texts)
        return jax.block_until_ready(result.joint).reshape(rollout.prompt_lengths.shape)

    def update(
        self,
        state: TrainState,
        params: Any,
        rollout: Rollout,
        trained: np.ndarray,
        advantage: jax.Array | np.ndarray,
        iteration: int,
        rng: np.random.Generator,
    ) -> tuple[TrainState, dict[str, float]]:
        """Policy updates on the rollout's packed rows; the new state, and the mean of what the loss reports."""
        config = self.config
        with_log_probs = [
            self.with_log_probs(rows, params) for rows in batches(config, self.mesh, rollout, trained, advantage, rng)
        ]
        rate = jnp.float32(learning_rate_share(config, iteration))
        parts: list[PolicyLoss] = []
        taken: list[Rows] = []
        for _ in range(config.optimizer.num_iterations):
            for rows, _ in with_log_probs:
                self.watch(f"iteration {iteration}, update, mini-batch {len(parts) + 1}")
                with jax.set_mesh(self.mesh):
                    state, part = policy_step(
                        state,
                        rows,
                        jnp.float32(config.rollout.temperature),
                        rate,
                        self.frozen,
                        config=self.player.config,
                        optimizer=self.optimizer,
                        settings=self.loss,
                        micro_batches=self.micro_batches,
                    )
                parts.append(part)
                taken.append(rows)
        jax.block_until_ready(state)
        if not parts:
            return state, {"loss/steps": 0}
        parts = jax.device_get(parts)
        check_losses(config.output.dir, f"iteration {iteration}", [part.loss for part in parts], taken)
        mean = jax.tree.map(lambda *x: float(np.mean(x)), *parts)
        losses = {f"loss/{name}": value for name, value in mean._asdict().items()}
        losses |= {"loss/steps": len(parts), "loss/sampler_mismatch": float(parts[0].sampler_mismatch)}
        if config.loss.old_log_probs == "trainer":
            found = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get([found for _, found in with_log_probs]))
            losses |= {f"loss/{name}": value for name, value in found.items()}
        return state, losses

    def note_success(self, games: np.ndarray, won: np.ndarray, finished: np.ndarray) -> None:
        """Follow the success rate of each kind of task, by which tasks are drawn, from the episodes of groups."""
        for game, wins, attempts in zip(games, won, finished, strict=True):
            if attempts:
                self.solved[self.kinds[game]] += 0.1 * (wins / attempts - self.solved[self.kinds[game]])

    def report(
        self,
        rollout: Rollout,
        draws: Draws,
        trained: np.ndarray,
        advantage: jax.Array,
        losses: dict,
        times: list[float],
    ) -> dict[str, float]:
        """The iteration's row of metrics; `times` are the seconds at which its parts began and ended."""
        seconds = dict(zip(("rollout", "estimator", "update"), np.diff(times).tolist(), strict=True))
        batch = rollout_row(self.config, rollout)
        return {
            **batch,
            **draws.row(batch),
            "train/advantage_size": float(jnp.abs(advantage).sum() / (rollout.prompt_lengths > 0).sum()),
            "train/trained_turns": float(trained.sum() / (rollout.prompt_lengths > 0).sum()),
            **{f"train/success_rate/{kind}": float(p) for kind, p in zip(self.kind_names, self.solved, strict=True)},
            **losses,
            **{f"time/{name}": value for name, value in seconds.items()},
            "time/iteration": times[-1] - times[0],
            **throughput_row(self.config, self.work, rollout, trained, seconds),
        }

    def with_log_probs(self, rows: Rows, params: Any) -> tuple[Rows, dict[str, jax.Array]]:
        """Compute the log-probs that the loss needs beside the sampler's, in one pass over the rows.

        Args:
            rows: packed rows; their `old_log_probs` are the sampler's.
            params: the rollout's parameters.

        Returns:
            The rows with log-probs of the reference (of the sampler if the KL has no weight) and, with
            `old_log_probs="trainer"`, of the trainer, and with `importance_cap` weighted by them; and token means: the
            sampler mismatch |trainer - sampler|, and what `importance.weighted` reports.
        """
        config, sampled = self.config, rows.old_log_probs
        wanted = {"reference": self.reference} if config.loss.kl_coef else {}
        wanted |= {"old": params} if config.loss.old_log_probs == "trainer" else {}
        found: dict[str, jax.Array] = {}
        if wanted:
            with jax.set_mesh(self.mesh):
                log_probs = row_log_probs(
                    tuple(wanted.values()),
                    rows,
                    jnp.float32(config.rollout.temperature),
                    config=self.player.config,
                    micro_batches=self.micro_batches,
                )
            found = dict(zip(wanted, log_probs, strict=True))
        old, reference = found.get("old", sampled), found.get("reference", sampled)
        rows = dataclasses.replace(rows, old_log_probs=old, reference=reference)
        means = {"sampler_mismatch": token_mean(jnp.abs(old - sampled), rows.mask)}
        if config.loss.importance_cap:
            rows, more = weighted(rows, sampled, config.loss.importance_cap)
            means |= more
        return rows, means

    def number_similar_texts(self, rollout: Rollout) -> None:
        """Number the buffer's anchors by similarity of their texts (GiGPO's variant; slow, on the host)."""
        assert rollout.buffer is not None
        at = [(e, t) for e, turns in enumerate(rollout.transcripts) for t in range(len(turns))]
        texts = [rollout.transcripts[e][t][0] for e, t in at]
        group = np.array([e // self.config.rollout.group_size for e, _ in at])
        anchor = np.zeros(rollout.prompt_lengths.shape, np.int32)
        anchor[tuple(np.array(at, int).reshape(-1, 2).T)] = similar_anchors(texts, group)
        rollout.buffer = dataclasses.replace(rollout.buffer, anchor=replicate(self.player.local_mesh, anchor))


def rollout_row(config: Config, rollout: Rollout) -> dict[str, float]:
    """What the metrics say of a rollout; episodes that stayed lost, and groups of nothing else, count nowhere."""
    played = rollout.finished
    turns = (rollout.prompt_lengths > 0).sum(1)
    rewarded = rollout.score if config.env.reward == "score" else rollout.won
    solved, tried = (x.reshape(-1, config.rollout.group_size).sum(1) for x in (rollout.won & played, played))
    mean_penalty = float(rollout.penalty.sum() / max(turns.sum(), 1))
    return {
        "train/success_rate": float(rollout.won[played].mean()),
        "train/reward": float(config.env.reward_scale * rewarded[played].mean()),
        **({"train/score": float(rollout.score[played].mean())} if environment(config).scored else {}),
        "train/lost_episodes": rollout.lost,
        "train/valid_action_rate": rollout.valid,
        "train/admissible_rate": rollout.admissible,
        "train/turns": float(turns[played].mean()),
        "train/overlong_rate": float(rollout.overlong.sum() / max(turns.sum(), 1)),
        "train/mixed_groups": float(((solved > 0) & (solved < tried))[tried > 0].mean()),
        **({"train/overlong_penalty": mean_penalty} if config.rollout.overlong == "penalise" else {}),
    }


def steps_of(rollout: Rollout, members: int) -> dict[str, Any]:
    """A rollout's steps as `proxmo advantages` and `proxmo ablate estimator` read them; all hosts call it.

    Args:
        rollout: with its buffer and the texts of all hosts (`join_texts`).
        members: episodes of a group.

    Returns:
        The fields of a steps file (`estimator.steps_file`).
    """
    assert rollout.buffer is not None
    reward, valid = process_allgather((rollout.buffer.reward, rollout.buffer.action_valid), tiled=True)
    at = [(e, t) for e, turns in enumerate(rollout.transcripts) for t in range(len(turns))]
    episode, turn = np.array(at, int).reshape(-1, 2).T

    def following(e: int, t: int) -> str:
        turns = rollout.transcripts[e]
        return turns[t + 1][0] if t + 1 < len(turns) else rollout.endings[e]

    return {
        "group": episode // members,
        "trajectory": episode,
        "step": turn,
        "reward": reward[episode, turn],
        "success": rollout.won[episode],
        "action_valid": valid[episode, turn],
        "texts": [rollout.transcripts[e][t][0] for e, t in at],
        "next_texts": [following(e, t) for e, t in at],
    }


def learning_rate_share(config: Config, iteration: int) -> float:
    """Cosine from 1 at the first iteration to `final_rate` at the last one planned, and that from then on."""
    end, last = config.optimizer.final_rate, config.optimizer.decay_iterations or config.iterations
    progress = min((iteration - 1) / max(last - 1, 1), 1.0)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


def note(row: dict) -> str:
    """The progress line's measurements."""
    total = row["time/iteration"]
    shares = " ".join(f"{name} {row[f'time/{name}'] / total:.1%}" for name in ("rollout", "estimator", "update"))
    return (
        f"success {row['train/success_rate']:.0%} reward {row['train/reward']:.1f}"
        f" valid {row['train/valid_action_rate']:.0%}\n{shares}"
    )
