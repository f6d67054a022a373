"""The multi-turn loop: environments and their texts on one side, the policy and its rollout buffer on the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from envs_bridge.actions import project
from envs_bridge.pool import Pool
from envs_bridge.prompts import Memory
from envs_bridge.turn import Game, Observation
from proxmo_jax.agent.overlong import unended
from proxmo_jax.agent.player import Player, batch_bucket, reading_order
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.words import bucket
from proxmo_jax.policy import adapters
from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.policy.decoding import decoding_config, decoding_params
from proxmo_jax.training.buffers import Buffer, clear, forget, grow, write

TRIES = 3


class NothingPlayed(UserError):
    """No episode at all could be played."""


@dataclass
class Rollout:
    """`E` episodes of at most `T` turns: the buffer on the device, and on the host what packing and reports need.

    Attributes:
        buffer: the rollout buffer; None for an evaluation.
        prompt_lengths, response_lengths: int32 [E, T], tokens; 0 where no turn happened.
        won: bool [E].
        score: float32 [E], sum of the environment's own rewards.
        transcripts: (observation, command) pairs of each episode.
        endings: the observation after each episode's last action.
        ending_anchor: int32 [E], its number among the observations of its group.
        tasks: instructions.
        valid, admissible: shares of all turns.
        texts: the largest number of distinct observations of a group.
        finished: bool [E]; False for an episode that could not be played.
        lost: how often an episode was lost with its worker.
        overlong: bool [E, T], turns whose response reached the length limit without ending (default: none).
        penalty: float32 [E, T], what was subtracted from the turn's reward for its length (default: nothing).
        sampled: (prompt tokens, response tokens), int32 [N] each, of the responses sampled in each turn; also of
            episodes that were lost or replaced.
    """

    buffer: Buffer | None
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    won: np.ndarray
    score: np.ndarray
    transcripts: list[list[tuple[str, str]]]
    tasks: list[str]
    valid: float = 0.0
    admissible: float = 0.0
    texts: int = 0
    finished: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    lost: int = 0
    overlong: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    penalty: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    sampled: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    ending_anchor: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def __post_init__(self):
        for name in ("overlong", "penalty"):
            if not getattr(self, name).size:
                setattr(self, name, np.zeros(self.prompt_lengths.shape, getattr(self, name).dtype))


def collect(
    player: Player,
    params,
    pool: Pool,
    games: Sequence[Game],
    key: jax.Array,
    *,
    temperature: float,
    turns: int = 0,
    buffer: Buffer | None = None,
    reward_scale: float = 10.0,
    reward_score: bool = False,
    penalise_inadmissible: bool = False,
    length_penalty: Callable[[np.ndarray], np.ndarray] | None = None,
    redraw: Callable[[Rollout], dict[int, Game] | None] | None = None,
    on_turn: Callable[[int, int], None] | None = None,
    first: int = 0,
) -> Rollout:
    """Play one episode of every task to its end or the turn limit, all in parallel.

    Episodes lost with a worker are discarded and played again, up to `TRIES` times; those still lost then count in no
    statistic.

    Args:
        player: the policy.
        params: its parameters.
        pool: the workers.
        games: one task per episode; the members of a group have the same one, group after group.
        key: random key of the responses.
        temperature: of sampling; 0 is greedy.
        turns: the turn limit; 0: the player's, as it must be with a buffer.
        buffer: where every turn is written, donated; None: nowhere.
        reward_scale: factor of the rewards.
        reward_score: write the environment's own rewards; False: success.
        penalise_inadmissible: commands that the environment does not admit count as invalid.
        length_penalty: what is subtracted from a turn's reward, from the tokens of its response; None: nothing.
        redraw: called when all have ended; names groups to play anew in the same places, with their new games, until it
            answers None. What they were before is forgotten. None: no group is.
        on_turn: called with the turn and the number of active episodes.
        first: number of the first episode, by which random numbers are drawn.

    Returns:
        The episodes, with the buffer.

    Raises:
        NothingPlayed: if no episode could be played.
    """
    count = len(games)
    shape = (count, turns or player.limits.turns)
    rollout = Rollout(
        None, np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(count, bool),
        np.zeros(count, np.float32), [[] for _ in games], [""] * count, finished=np.zeros(count, bool),
    )  # fmt: skip
    params, policy = adapters.without(params, player.config)
    policy = decoding_config(policy, player.mesh)
    params = decoding_params(params, config=policy, mesh=player.mesh, gather=player.gather_weights)
    play = _Play(
        player, params, policy, pool, list(games), rollout, temperature, reward_scale, reward_score,
        penalise_inadmissible, length_penalty, first,
    )  # fmt: skip
    if buffer is not None:
        play.buffer = clear(buffer)
        play.seen_in_group = [{} for _ in range(buffer.word_ids.shape[0])]
    play.to_the_end(key, 0, on_turn)
    drawn = 1
    while redraw and (new := redraw(rollout)) is not None:
        if new:
            play.replace(new)
            play.to_the_end(key, drawn, on_turn)
        drawn += 1
    turns = max(int((rollout.prompt_lengths > 0).sum()), 1)
    rollout.valid, rollout.admissible = (float(x.sum()) / turns for x in (play.valid, play.admissible_turns))
    rollout.texts = max(map(len, play.seen_in_group), default=0)
    play.number_endings()
    rollout.buffer = play.buffer
    return rollout


@dataclass
class _Play:
    """Episodes under way: what the worlds said last, and where it is written down."""

    player: Player
    params: Any
    policy: PolicyConfig  # of the parameters
    pool: Pool
    games: list[Game]
    rollout: Rollout
    temperature: float
    reward_scale: float
    reward_score: bool
    penalise_inadmissible: bool
    length_penalty: Callable[[np.ndarray], np.ndarray] | None
    first: int  # number of the first episode
    buffer: Buffer | None = None
    seen_in_group: list[dict[str, int]] = field(default_factory=list)  # the number of each text a group saw

    def __post_init__(self):
        count = len(self.games)
        nothing = Observation("", ())
        self.memories: list[Memory] = [self.player.start("", nothing)] * count
        self.latest = [nothing] * count
        self.valid, self.admissible_turns = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.active = np.arange(count)
        self.unwritten: tuple | None = None  # a turn that is complete on the host: episodes, turn, fields

    def to_the_end(self, key: jax.Array, drawn: int, on_turn: Callable[[int, int], None] | None) -> None:
        """Play all episodes that are not finished, with random numbers of their own for each number `drawn`."""
        rollout, turns = self.rollout, self.rollout.prompt_lengths.shape[1]
        for attempt in range(drawn * TRIES, (drawn + 1) * TRIES):
            self.start(np.flatnonzero(~rollout.finished))
            for turn in range(turns):
                if len(self.active) == 0:
                    break
                if on_turn:
                    on_turn(turn, len(self.active))
                self.turn(turn, jax.random.fold_in(key, attempt * turns + turn))
            self.flush()
            rollout.finished[self.active] = True  # out of turns
            lost = np.flatnonzero(~rollout.finished)
            self.forget(lost)
            rollout.lost += len(lost)
            if len(lost) == 0:
                break
        if not rollout.finished.any():
            raise NothingPlayed(f"no episode could be played: {self.pool.fault}")

    def replace(self, games: dict[int, Game]) -> None:
        """Put new games in the places of these groups' episodes."""
        members = len(self.games) // len(self.seen_in_group)
        episodes = np.array([e for g in games for e in range(g * members, (g + 1) * members)], int)
        for e in episodes:
            self.games[e] = games[e // members]
        self.rollout.finished[episodes] = False
        self.forget(episodes)

    def start(self, episodes: np.ndarray) -> None:
        """Reset the worlds of these episodes; those that answer are active."""
        answers = self.pool.reset([(int(e), self.games[e]) for e in episodes])
        for e, started in zip(episodes, answers, strict=True):
            if started is not None:
                self.latest[e], self.rollout.tasks[e] = started
                self.memories[e] = self.player.start(self.rollout.tasks[e], self.latest[e])
        self.active = episodes[[started is not None for started in answers]]

    def turn(self, turn: int, key: jax.Array) -> None:
        """One turn of every active episode: prompts, answers, the worlds' answers, all written down."""
        player, rollout = self.player, self.rollout
        batch = batch_bucket(len(self.active), player.local_mesh)
        rows = player.encode([self.memories[e] for e in self.active])
        order = reading_order(rows, batch, player.local_mesh)
        active = self.active[order]
        prompts, lengths = player.pad([rows[i] for i in order], batch)
        episode = np.pad(self.first + active, (0, batch - len(active))).astype(np.int32)
        samples = player.sample(self.params, self.policy, prompts, lengths, key, episode, self.temperature)
        overlong = unended(samples.tokens, samples.lengths, player.stop_table, decoding=player.decoding)
        tokens, answer_lengths, overlong = jax.device_get((samples.tokens, samples.lengths, overlong))
        answers = player.tokenizer.backend_tokenizer.decode_batch(
            [row[:n].tolist() for row, n in zip(tokens, answer_lengths[: len(active)], strict=False)],
            skip_special_tokens=player.skip_special_tokens,
        )
        projected = [project(player.answer_start + answer, player.tail) for answer in answers]
        projected = [
            (player.spell(command, self.latest[e].admissible), valid)
            for e, (command, valid) in zip(active, projected, strict=True)
        ]
        self.pool.send_step([(int(e), command) for e, (command, _) in zip(active, projected, strict=True)])

        # While the worlds play this turn, the last one goes to the device.
        self.flush()
        observed: dict[str, np.ndarray] = {}
        if self.buffer is not None:
            members = len(self.games) // len(self.seen_in_group)
            numbers = [self.seen_in_group[e // members] for e in active]
            words = self.buffer.word_ids.shape[2]
            observed = player.observe([self.latest[e] for e in active], numbers, batch, words)
        reward, valid = np.zeros(batch, np.float32), np.zeros(batch, bool)
        penalty = np.zeros(batch, np.float32) if self.length_penalty is None else self.length_penalty(answer_lengths)

        seen = self.pool.receive()
        for i, (e, now) in enumerate(zip(active, seen, strict=True)):
            if now is None:
                continue
            command, well_formed = projected[i]
            possible = self.latest[e].admits(command)
            self.valid[e] += well_formed
            self.admissible_turns[e] += possible
            reward[i] = self.reward_scale * (now.reward if self.reward_score else now.won) - penalty[i]
            rollout.score[e] += now.reward
            valid[i] = well_formed and (possible or not self.penalise_inadmissible)
            rollout.transcripts[e].append((self.latest[e].text, command))
            rollout.won[e], rollout.finished[e] = now.won, now.done
            self.memories[e].remember(command, now)
            self.latest[e] = now
        rollout.sampled.append((lengths[: len(active)], answer_lengths[: len(active)]))
        rollout.prompt_lengths[active, turn] = lengths[: len(active)]
        rollout.response_lengths[active, turn] = answer_lengths[: len(active)]
        rollout.overlong[active, turn] = overlong[: len(active)]
        rollout.penalty[active, turn] = penalty[: len(active)]
        episodes = np.full(batch, len(self.games), np.int32)  # rows past the active ones fall off the end
        episodes[: len(active)] = active
        fields = {
            "prompts": prompts,
            "responses": samples.tokens,
            "log_probs": samples.log_probs,
            "reward": reward,
            "action_valid": valid,
            "mask": np.ones(batch, bool),
            **observed,
        }
        self.unwritten = episodes, jnp.int32(turn), fields
        self.active = np.sort(active[[now is not None and not now.done for now in seen]])

    def flush(self) -> None:
        """Send the turn that is complete to the buffer, which grows as it must; does not wait for the device."""
        if self.unwritten and self.buffer is not None:
            texts = max(map(len, self.seen_in_group))
            self.buffer = grow(self.buffer, texts, self.unwritten[2]["word_ids"].shape[1])
            self.buffer = write(self.buffer, *self.unwritten)
        self.unwritten = None

    def number_endings(self) -> None:
        """Note what each episode's last action led to. Texts that no turn began with get numbers past the others."""
        rollout = self.rollout
        rollout.endings = [seen.text for seen in self.latest]
        if self.buffer is None:
            return
        members = len(self.games) // len(self.seen_in_group)
        beyond: list[dict[str, int]] = [{} for _ in self.seen_in_group]
        anchor = []
        for e, text in enumerate(rollout.endings):
            known, new = self.seen_in_group[e // members], beyond[e // members]
            anchor.append(known[text] if text in known else len(known) + new.setdefault(text, len(new)))
        rollout.ending_anchor = np.array(anchor, np.int32)

    def forget(self, episodes: np.ndarray) -> None:
        """Leave nothing of these episodes, as if they had not begun."""
        rollout = self.rollout
        rollout.prompt_lengths[episodes] = rollout.response_lengths[episodes] = 0
        rollout.won[episodes], rollout.score[episodes] = False, 0.0
        rollout.overlong[episodes], rollout.penalty[episodes] = False, 0.0
        self.valid[episodes] = self.admissible_turns[episodes] = 0
        for e in episodes:
            rollout.transcripts[e] = []
        if self.buffer is not None and len(episodes):
            members = len(self.games) // len(self.seen_in_group)
            for g, numbers in enumerate(self.seen_in_group):
                if not rollout.finished[g * members : (g + 1) * members].any():
                    numbers.clear()  # what lost attempts saw takes no room
            padded = np.full(bucket(len(self.games)), len(self.games), np.int32)
            padded[: len(episodes)] = episodes
            self.buffer = forget(self.buffer, padded)
