"""Train a language-model agent on household games or in a shop with ProxMO, from nothing to a learning curve.

    proxmo train                          # the defaults: a few minutes on two CPU cores
    proxmo train --method gigpo --out runs/gigpo --seed 1
    proxmo train --env shop               # invented products under WebShop's rules
    proxmo train --out runs/household --resume

Read `main` from top to bottom: games -> tokenizer -> warm start -> loop (rollout, estimate, update) -> report.
"""

import dataclasses
import functools
import math
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from envs_bridge.pool import Pool
from envs_bridge.turn import Game
from proxmo_jax.agent.player import fresh_params, make_player, new_state, pretrained_params, run_optimizer
from proxmo_jax.agent.report import (
    Metrics,
    learning_curve,
    progress_bar,
    read_metrics,
    terminal,
    watched,
    wilson,
    write_episodes,
)
from proxmo_jax.agent.rollout import Example, Player, Rollout, collect, demonstration_buffer, demonstrations
from proxmo_jax.agent.settings import SHOPS, Config, check, extended, micro_batches, open_folder, stored_config
from proxmo_jax.agent.tasks import demonstrated, kind_of, make_games, make_pool, memory_of, shop_folder
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.packing import similar_anchors
from proxmo_jax.estimator.presets import PRESETS
from proxmo_jax.estimator.steps_file import write_steps
from proxmo_jax.estimator.words import bucket
from proxmo_jax.policy import adapters
from proxmo_jax.policy.sharding import make_mesh, replicate, split
from proxmo_jax.training.buffers import Buffer
from proxmo_jax.training.checkpoint import Checkpoints, load_params, save_params
from proxmo_jax.training.losses import LossSettings, token_mean
from proxmo_jax.training.rows import Rows, gather_rows, pack_turns
from proxmo_jax.training.update import TrainState, cloning_step, estimate, make_optimizer, policy_step, row_log_probs


def main(config: Config, console: Console | None = None) -> Path:
    """Run, or resume, one training run; returns its folder."""
    console = console or terminal()
    began = time.time()
    if config.resume:
        config = extended(stored_config(config), config.iterations)
    check(config)
    if config.env == "webshop" and not config.model:
        raise UserError("--env webshop needs a --model: there are no demonstrations in WebShop itself")
    mesh = make_mesh(0, config.fsdp, config.tensor)
    # What cannot be read is refused before a folder is made.
    language_model = make_player(config, mesh) if config.model else None
    if config.env == "shop" and config.data is not None:
        shop_folder(config, console)
    open_folder(config)
    stop = StopOnSignal(console)

    # Games, tokenizer, policy.
    train_games, eval_games = make_games(config, console)
    named = {"household": f"{config.level} household", "alfworld": "ALFWorld", "shop": "shop", "webshop": "WebShop"}
    source = named[config.env]
    console.print(
        f"{config.method} on {len(train_games)} {source} games,"
        f" {len(eval_games)} held out; {jax.device_count()} x {jax.devices()[0].platform}, seed {config.seed}"
    )
    if 0 < config.decay_iterations < config.iterations:
        console.print(
            f"The learning rate falls to {config.final_rate:g} of {config.learning_rate:g} by iteration"
            f" {config.decay_iterations} and stays there to iteration {config.iterations}."
        )
    demos = [] if config.model else [cloned(config, train_games, rate, console) for rate in (0.0, config.mistake_rate)]
    player = language_model or make_player(config, mesh, [example for part in demos for example in part])
    player.say = functools.cache(partial(console.print, markup=False, highlight=False, soft_wrap=True))  # each once
    key = jax.random.key(config.seed)
    optimizer = run_optimizer(config)

    with make_pool(config) as pool, jax.set_mesh(mesh):
        # Where reinforcement starts, or the checkpoint of a run that was cut off.
        reference = starting_point(config, player, demos, jax.random.fold_in(key, 0), console, stop)
        if stop:
            console.print(
                f"Stopped before the first iteration; do it again with: proxmo train --out {config.out} --resume"
            )
            return config.out
        state = new_state(player, reference, optimizer)
        checkpoints = Checkpoints(config.out / "checkpoints")
        first = checkpoints.latest() or 0
        if first:
            state, _ = checkpoints.restore(state)
        metrics = Metrics(config.out / "metrics.jsonl", keep_until=first if first else None)

        evaluation = Evaluation(config, player, pool, eval_games)
        start = "before training" if config.model else "warm start"
        if not first:
            with progress_bar(console) as bar:
                metrics.write({"iteration": 0, **evaluation.run(reference, bar, start, "episodes_before.txt")})
        last_row = [{}, *read_metrics(config.out / "metrics.jsonl")][-1]
        loop = Loop(config, player, pool, train_games, mesh, optimizer, reference, last_row)
        with progress_bar(console) as bar:
            task = bar.add_task("training", total=config.iterations, completed=first, note="")
            for iteration in range(first + 1, config.iterations + 1):
                state, row = loop.iteration(state, iteration, jax.random.fold_in(key, iteration))
                last = iteration == config.iterations
                if iteration % config.eval_every == 0 or last:
                    params = adapters.join(loop.frozen, state.params)
                    episodes = "episodes_after.txt" if last else None
                    row |= evaluation.run(params, bar, f"iteration {iteration}", episodes)
                metrics.write({"iteration": iteration, **row})
                bar.update(task, advance=1, note=note(row))
                if iteration % config.save_every == 0 or last or stop:
                    checkpoints.save(iteration, state, {"iteration": iteration})
                if stop:
                    break
        checkpoints.close()
        if loop.played:
            write_steps(config.out / "rollout.npz", steps_of(loop.played, config.members))

    rows = read_metrics(config.out / "metrics.jsonl")
    learning_curve(config.out / "learning_curve.png", [(config.method, rows)], f"{config.method}, {source} games")
    went = f"{time.time() - began:.0f} s"
    if rows and rows[-1]["iteration"] >= config.iterations:
        console.print(
            f"Done in {went}: {config.out}/ holds metrics.jsonl, learning_curve.png, episodes_before.txt,"
            " episodes_after.txt, rollout.npz and checkpoints."
        )
        if config.final_rate:
            console.print(
                f"Longer, at the learning rate it has now: proxmo train --out {config.out} --resume"
                f" --iterations {2 * config.iterations}"
            )
    else:
        console.print(f"Stopped and saved after {went}. Go on with: proxmo train --out {config.out} --resume")
    return config.out


class StopOnSignal:
    """True once Ctrl-C or SIGTERM was seen: the iteration under way is finished and saved. A second one interrupts."""

    def __init__(self, console: Console):
        self._console, self._asked = console, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, *_) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._console.print("Stopping after this iteration; its state is saved. Again to stop at once.")

    def __bool__(self) -> bool:
        return self._asked


def batches(config: Config, mesh, rollout: Rollout, advantage, rng: np.random.Generator):
    """Shuffled mini-batches of packed rows from a rollout, as few as can be and equally full; one shape, which empty
    rows fill up: they change nothing."""
    lengths = (rollout.prompt_lengths + rollout.response_lengths).reshape(-1)
    answers = rollout.response_lengths.reshape(-1)
    room = answer_room(config)
    order = rng.permutation(np.flatnonzero(lengths))
    turns, offsets = pack_turns(lengths, answers, order, row_length=config.row_length, row_answers=room)
    size = config.rows_per_batch
    for chosen in np.array_split(np.arange(len(turns)), -(-len(turns) // size)):
        short = ((0, size - len(chosen)), (0, 0))
        part = split(mesh, (np.pad(turns[chosen], short, constant_values=-1), np.pad(offsets[chosen], short)))
        yield gather_rows(
            rollout.buffer, rollout.prompt_lengths, rollout.response_lengths, advantage, *part, row_answers=room
        )


def answer_room(config: Config) -> int:
    """Response tokens a row can hold: a share of its tokens, and a whole turn's in any case."""
    return max(round(config.row_length * config.answer_share), config.max_response_tokens)


def cloned(config: Config, games: list[Game], mistake_rate: float, console: Console) -> list[Example]:
    """Demonstrations of the games that our engine plays. Raises UserError if it plays none."""
    episodes = watched(demonstrated(config, games, mistake_rate), "demonstrations", console, len(games))
    examples = demonstrations(episodes, memory_of(config))
    if not examples:
        raise UserError("warm start: there is no demonstration; our engine plays none of the training games")
    return examples


def starting_point(config: Config, player: Player, demos: list[list[Example]], key: jax.Array, console, stop):
    """The policy that reinforcement starts from and is held to: a language model, or a warm start, made once."""
    if config.model:
        return pretrained_params(config, player)
    fresh, warm = fresh_params(player, key), config.out / "warm_start"
    if not (warm / "config.json").exists():
        if config.warm_start_from:
            params = load_params(config.warm_start_from / "warm_start", fresh)
        else:
            params = warm_start(config, player, demos, fresh, console, stop)
        if stop:
            return params
        save_params(warm, params, player.config.to_dict())
    return load_params(warm, fresh)


def warm_start(config: Config, player: Player, demos, params, console: Console, stop: StopOnSignal):
    """Behaviour cloning: skill from careful demonstrations first, then, at the end, a habit from careless ones."""
    rollouts = [demonstration_buffer(player, examples) for examples in demos]
    for rollout in rollouts:
        rollout.buffer = replicate(player.mesh, rollout.buffer)
    turning_point = config.warm_start_steps - round(config.careless_share * config.warm_start_steps)
    optimizer = make_optimizer(
        config.warm_start_rate,
        config.weight_decay,
        config.max_grad_norm,
        warmup=20,
        decay_steps=config.warm_start_steps,
    )
    state = new_state(player, params, optimizer)
    rng = np.random.default_rng(config.seed)
    step = 0
    with progress_bar(console) as bar:
        task = bar.add_task("warm start", total=config.warm_start_steps, note="")
        while step < config.warm_start_steps and not stop:
            rollout, until = rollouts[0], turning_point
            if step >= turning_point:
                rollout, until = rollouts[1], config.warm_start_steps
            zero = jnp.zeros(rollout.prompt_lengths.shape)
            for rows in batches(config, player.mesh, rollout, zero, rng):
                state, loss = cloning_step(
                    state, rows, config=player.config, optimizer=optimizer, micro_batches=micro_batches(config)
                )
                step += 1
                if step % 50 == 0 or step == config.warm_start_steps:
                    bar.update(task, completed=step, note=f"loss {float(loss):.3f}")
                if step == until or stop:
                    break
    return state.params


@dataclass
class Evaluation:
    """Success on the held-out games, at the evaluation temperature and with the same random numbers each time."""

    config: Config
    player: Player
    pool: Pool
    games: list[Game]

    def run(self, params, bar: Progress, label: str, episodes: str | None = None) -> dict:
        began = time.time()
        key = jax.random.key(self.config.seed + 1)
        task = bar.add_task("held-out games", total=len(self.games), note="")
        rollout = collect(
            self.player, params, self.pool, self.games, key, temperature=self.config.eval_temperature,
            on_turn=lambda turn, active: bar.update(task, completed=len(self.games) - active, note=f"turn {turn + 1}"),
        )  # fmt: skip
        bar.remove_task(task)
        wins, count = int(rollout.won.sum()), int(rollout.finished.sum())
        row = {
            "eval/success_rate": wins / count,
            **({"eval/score": float(rollout.score[rollout.finished].mean())} if self.config.env in SHOPS else {}),
            "eval/games": count,
            "eval/turns": float((rollout.prompt_lengths > 0).sum(1)[rollout.finished].mean()),
            "time/eval": time.time() - began,
        }
        kinds = np.array([kind_of(game) for game in self.games])
        for kind in np.unique(kinds):
            if ((kinds == kind) & rollout.finished).any():
                row[f"eval/success_rate/{kind}"] = float(rollout.won[(kinds == kind) & rollout.finished].mean())
        low, high = wilson(wins, count)
        score = f", mean score {row['eval/score']:.1%}" if "eval/score" in row else ""
        bar.console.print(
            f"{label}: {wins} of {count} held-out games solved ({wins / count:.0%}, 95% {low:.0%} to {high:.0%}){score}"
        )
        if episodes:
            played = np.flatnonzero(rollout.finished)
            shown = played[np.unique([0, count // 3, 2 * count // 3])]
            write_episodes(
                self.config.out / episodes,
                [rollout.tasks[i] for i in shown],
                [rollout.transcripts[i] for i in shown],
                [bool(rollout.won[i]) for i in shown],
            )
        return row


class Loop:
    """One iteration: rollout -> advantages -> reference log-probs -> policy updates; what is large stays on device."""

    def __init__(
        self, config: Config, player: Player, pool: Pool, games: list[Game], mesh, optimizer, reference, last: dict
    ):  # fmt: skip
        """`last` is the metrics row of the iteration before the next one."""
        self.config, self.player, self.pool, self.games = config, player, pool, games
        self.kind_names, self.kinds = np.unique([kind_of(game) for game in games], return_inverse=True)
        self.solved = np.array([last.get(f"train/success_rate/{kind}", 0.5) for kind in self.kind_names])
        self.mesh, self.optimizer, self.reference = mesh, optimizer, reference
        self.frozen, _ = adapters.split(reference)
        self.micro_batches = micro_batches(config)
        self.settings = PRESETS[config.method](invalid_penalty=config.invalid_penalty)
        self.loss = LossSettings(
            clip=config.clip,
            clip_high=config.clip_high or None,
            dual_clip=config.dual_clip,
            kl_weight=config.kl_weight,
            entropy_weight=config.entropy_weight,
            kl=config.kl,
            aggregation=config.aggregation,
            longest_response=config.max_response_tokens,
        )
        limits = player.limits
        empty = Buffer.empty(
            config.groups, config.members, limits.turns,
            prompt=limits.prompt, response=limits.response, words=limits.words,
        )  # fmt: skip
        self.buffer = replicate(mesh, empty)
        self.played: Rollout | None = None  # the last one

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """This iteration's games: task types of middling success more often, as their groups have more to say."""
        weight = np.sqrt(self.solved * (1 - self.solved)) + 0.1
        weight = weight[self.kinds] / np.bincount(self.kinds, minlength=len(weight))[self.kinds]
        count = self.config.groups
        return rng.choice(len(self.games), count, replace=len(self.games) < count, p=weight / weight.sum())

    def iteration(self, state: TrainState, iteration: int, key: jax.Array) -> tuple[TrainState, dict]:
        config = self.config
        rng = np.random.default_rng([config.seed, iteration])
        chosen = self.draw(rng)
        games = [self.games[i] for i in chosen for _ in range(config.members)]

        began = time.time()
        params = adapters.join(self.frozen, state.params)
        rollout = collect(
            self.player, params, self.pool, games, key, temperature=config.temperature, buffer=self.buffer,
            reward_scale=config.reward_scale, reward_score=config.reward == "score",
            penalise_inadmissible=config.penalise_inadmissible,
        )  # fmt: skip
        jax.block_until_ready(rollout.buffer)
        played = time.time()

        if self.settings.aggregation == "similar":
            self.let_similar_texts_share_anchors(rollout)
        assert rollout.buffer is not None
        texts = min(bucket(rollout.texts), rollout.buffer.word_ids.shape[1])
        answer = estimate(
            rollout.buffer, rollout.won, self.player.vocabulary.alphabetical(), self.settings, texts=texts
        )
        advantage = jax.block_until_ready(answer.joint).reshape(rollout.prompt_lengths.shape)
        estimated = time.time()

        parts = []
        temperature = jnp.float32(config.temperature)
        mini = [self.with_log_probs(rows, params) for rows in batches(config, self.mesh, rollout, advantage, rng)]
        gap = float(jnp.stack([gap for _, gap in mini]).mean()) if config.old_log_probs == "trainer" else None
        rate = jnp.float32(learning_rate_share(config, iteration))
        for _ in range(config.epochs):
            for rows, _ in mini:
                state, part = policy_step(
                    state,
                    rows,
                    temperature,
                    rate,
                    self.frozen,
                    config=self.player.config,
                    optimizer=self.optimizer,
                    settings=self.loss,
                    micro_batches=self.micro_batches,
                )
                parts.append(part)
        jax.block_until_ready(state)
        updated = time.time()
        self.buffer, self.played = rollout.buffer, rollout

        solved, tried = (x.reshape(config.groups, -1).sum(1) for x in (rollout.won, rollout.finished))
        for game, wins, attempts in zip(chosen, solved, tried, strict=True):
            if attempts:
                self.solved[self.kinds[game]] += 0.1 * (wins / attempts - self.solved[self.kinds[game]])
        total = updated - began
        mean = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(parts))
        return state, {
            **rollout_row(config, rollout),
            "train/advantage_size": float(jnp.abs(advantage).sum() / (rollout.prompt_lengths > 0).sum()),
            **{f"train/success_rate/{kind}": float(p) for kind, p in zip(self.kind_names, self.solved, strict=True)},
            **{f"loss/{name}": value for name, value in mean._asdict().items()},
            "loss/steps": len(parts),
            "loss/sampler_gap": float(parts[0].gap) if gap is None else gap,
            "time/rollout": played - began,
            "time/estimator": estimated - played,
            "time/update": updated - estimated,
            "time/iteration": total,
        }

    def with_log_probs(self, rows: Rows, params) -> tuple[Rows, jax.Array]:
        """The rows with log-probs of the reference and, where asked for, of the trainer, in one pass; and how far
        sampler and trainer are apart, if that is known. With no weight on the KL it is to the rollout's policy."""
        config, old, reference = self.config, rows.old, rows.old
        wanted = {"reference": self.reference} if config.kl_weight else {}
        wanted |= {"old": params} if config.old_log_probs == "trainer" else {}
        if wanted:
            found = row_log_probs(
                tuple(wanted.values()), rows, jnp.float32(config.temperature), config=self.player.config,
                micro_batches=self.micro_batches,
            )  # fmt: skip
            named = dict(zip(wanted, found, strict=True))
            reference, old = named.get("reference", old), named.get("old", old)
        gap = token_mean(jnp.abs(old - rows.old), rows.mask)
        return dataclasses.replace(rows, old=old, reference=reference), gap

    def let_similar_texts_share_anchors(self, rollout: Rollout) -> None:
        """Number the buffer's anchors by similarity of their texts (GiGPO's variant; slow, on the host)."""
        assert rollout.buffer is not None
        at = [(e, t) for e, turns in enumerate(rollout.transcripts) for t in range(len(turns))]
        texts = [rollout.transcripts[e][t][0] for e, t in at]
        group = np.array([e // self.config.members for e, _ in at])
        anchor = np.zeros(rollout.prompt_lengths.shape, np.int32)
        anchor[tuple(np.array(at, int).reshape(-1, 2).T)] = similar_anchors(texts, group)
        rollout.buffer = dataclasses.replace(rollout.buffer, anchor=replicate(self.mesh, anchor))


def rollout_row(config: Config, rollout: Rollout) -> dict[str, float]:
    """What the metrics say of a rollout; episodes that stayed lost, and groups of nothing else, count nowhere."""
    played = rollout.finished
    turns = (rollout.prompt_lengths > 0).sum(1)
    rewarded = rollout.score if config.reward == "score" else rollout.won
    solved, tried = (x.reshape(-1, config.members).sum(1) for x in (rollout.won & played, played))
    return {
        "train/success_rate": float(rollout.won[played].mean()),
        "train/reward": float(config.reward_scale * rewarded[played].mean()),
        **({"train/score": float(rollout.score[played].mean())} if config.env in SHOPS else {}),
        "train/lost_episodes": rollout.lost,
        "train/valid_action_rate": rollout.valid,
        "train/admissible_rate": rollout.admissible,
        "train/turns": float(turns[played].mean()),
        "train/mixed_groups": float(((solved > 0) & (solved < tried))[tried > 0].mean()),
    }


def steps_of(rollout: Rollout, members: int) -> dict[str, Any]:
    """A rollout's steps as `proxmo advantages` and `proxmo ablate estimator` read them."""
    assert rollout.buffer is not None
    reward, valid = jax.device_get((rollout.buffer.reward, rollout.buffer.action_valid))
    at = [(e, t) for e, turns in enumerate(rollout.transcripts) for t in range(len(turns))]
    episode, turn = np.array(at, int).reshape(-1, 2).T
    return {
        "group": episode // members,
        "trajectory": episode,
        "step": turn,
        "reward": reward[episode, turn],
        "success": rollout.won[episode],
        "action_valid": valid[episode, turn],
        "texts": [rollout.transcripts[e][t][0] for e, t in at],
    }


def learning_rate_share(config: Config, iteration: int) -> float:
    """Cosine from 1 at the first iteration to `final_rate` at the last one planned, and that from then on."""
    progress = (iteration - 1) / max((config.decay_iterations or config.iterations) - 1, 1)
    return config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def note(row: dict) -> str:
    """The progress line's measurements."""
    total = row["time/iteration"]
    shares = " ".join(f"{name} {row[f'time/{name}'] / total:.1%}" for name in ("rollout", "estimator", "update"))
    return (
        f"success {row['train/success_rate']:.0%} reward {row['train/reward']:.1f}"
        f" valid {row['train/valid_action_rate']:.0%}\n{shares}"
    )
