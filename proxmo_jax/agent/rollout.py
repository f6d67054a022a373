"""The multi-turn loop: environments and their texts on one side, the policy and its rollout buffer on the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from envs_bridge.actions import ALFWORLD_TAIL, project
from envs_bridge.pool import Pool, WorkerError
from envs_bridge.prompts import Cut, Memory, Notes, piece_ends, readable
from envs_bridge.turn import Game, Observation
from proxmo_jax.agent.overlong import unended
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.words import Vocabulary, bucket
from proxmo_jax.policy import adapters
from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.policy.decoding import Samples, decoding_params, sample
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.sharding import split
from proxmo_jax.training.buffers import Buffer, clear, forget, grow, write

TRIES = 3
MOST_WORDS = 2048  # different words of an observation that are compared, at most


@dataclass(frozen=True)
class Limits:
    """Sizes that make shapes static.

    Attributes:
        turns: turns of an episode.
        prompt: tokens of a prompt.
        response: tokens of a response.
        words: distinct words per observation that a buffer has room for at first; it grows when more are observed.
    """

    turns: int = 16
    prompt: int = 128
    response: int = 8
    words: int = 128


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


@dataclass
class Player:
    """The policy as the loop uses it: prompts in, sampled tokens out.

    Attributes:
        tokenizer, config: of the policy.
        limits: sizes of prompts, responses and episodes.
        mesh: the devices.
        decoding, stop_table, slots: how responses are sampled and end, and how many at a time (`decoding.sample`).
        gather_weights: of `decoding.decoding_params`.
        vocabulary: words of all observations so far.
        start: begins the memory of an episode from its task and first observation; the memory writes the prompts.
        render: puts a prompt into the chat template.
        answer_start: text that the rendered prompt ends with and that counts as part of the response.
        answer_end: tokens after the text of a demonstrated response, which end it.
        skip_special_tokens: decode responses without special tokens.
        spell: corrects the spelling of a command by the admissible ones.
        tail: characters of a response without action tags that are taken for its command.
        say: receives a sentence about what had to be cut; the same one may come often.
    """

    tokenizer: PreTrainedTokenizerFast
    config: PolicyConfig
    limits: Limits
    mesh: Mesh
    decoding: Decoding
    stop_table: jax.Array | None = None
    slots: int = 0
    gather_weights: bool = True
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    start: Callable[[str, Observation], Memory] = Notes.start
    render: Callable[[str], str] = str
    answer_start: str = ""
    answer_end: tuple[int, ...] = ()
    skip_special_tokens: bool = False
    spell: Callable[[str, Sequence[str]], str] = lambda command, admissible: command
    tail: int = ALFWORLD_TAIL
    say: Callable[[str], None] = lambda sentence: None

    def encode(self, memories: Sequence[Memory]) -> list[list[int]]:
        """Token ids of each prompt, cut to the limit. Raises UserError if not even an empty prompt fits."""
        rows = self._read([memory.prompt() for memory in memories])
        for i, ids in enumerate(rows):
            if len(ids) > self.limits.prompt:
                rows[i] = self._shortened(memories[i])
        return rows

    def check_room(self) -> None:
        """Raise UserError if a prompt without task and observation is too long."""
        length = len(self._read([self.start("", Observation("", ())).prompt()])[0])
        if length > self.limits.prompt:
            raise UserError(
                f"prompt: without task and observation it has {length} tokens, need at most {self.limits.prompt}"
                " (--rollout.max-prompt-length)"
            )

    def _read(self, prompts: Sequence[str]) -> list[list[int]]:
        texts = [readable(self.render(prompt)) for prompt in prompts]
        return [e.ids for e in self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]

    def _shortened(self, memory: Memory) -> list[int]:
        """The longest prompt of the first cut that can make it fit."""
        for cut in _cuts(memory):
            if ids := self._longest(cut):
                if cut.what == "task":
                    self.say(f"A task is too long for prompts of {self.limits.prompt} tokens: its end is left out.")
                return ids
        raise UserError(f"prompt: an empty one has more than {self.limits.prompt} tokens (--rollout.max-prompt-length)")

    def _longest(self, cut: Cut) -> list[int]:
        """The longest prompt of a cut that fits, by bisection; [] if none does."""
        (ids,) = self._read([cut.write(0)])
        if len(ids) > self.limits.prompt:
            return []
        low, high = 0, cut.size  # all of it is known to be too long
        while high - low > 1:
            middle = (low + high) // 2
            (longer,) = self._read([cut.write(middle)])
            if len(longer) <= self.limits.prompt:
                low, ids = middle, longer
            else:
                high = middle
        return ids

    def pad(self, rows: Sequence[list[int]], batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Left-padded [batch, width] and lengths; the width is a bucket, so that few shapes are compiled."""
        width = min(self.limits.prompt, width_bucket(max(map(len, rows))))
        prompts = np.full((batch, width), self.decoding.pad_id, np.int32)
        lengths = np.zeros(batch, np.int32)
        for i, ids in enumerate(rows):
            prompts[i, width - len(ids) :] = ids
            lengths[i] = len(ids)
        return prompts, lengths

    def sample(
        self,
        params,
        policy: PolicyConfig,
        prompts: np.ndarray,
        lengths: np.ndarray,
        key: jax.Array,
        temperature: float,
        *,
        shared: bool,
    ) -> Samples:
        """Responses to padded prompts, by parameters of this shape; equal prompts are read once if `shared`."""
        prompt_of = None
        if shared:
            prompts, lengths, prompt_of = share(prompts, lengths, self.mesh)
        return sample(
            params,
            *split(self.mesh, (prompts, lengths)),
            key,
            jnp.float32(temperature),
            self.stop_table,
            prompt_of if prompt_of is None else split(self.mesh, prompt_of),
            config=policy,
            decoding=self.decoding,
            slots=self.slots,
            mesh=self.mesh,
        )

    def observe(
        self, worlds: Sequence[Observation], seen: Sequence[dict[str, int]], batch: int, words: int
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Word counts of a turn's observations and their numbers in their groups, padded to `batch` rows.

        seen: for each observation the numbers given so far in its group; new texts get the next ones. The workers have
        counted the words; here they only become arrays, `words` wide or wider where an observation has more.
        """
        texts = [world.text for world in worlds]
        rows = self.vocabulary.rows(texts, [world.words for world in worlds])
        most = self.vocabulary.longest(rows)
        if most > MOST_WORDS:
            self.say(f"An observation has more than {MOST_WORDS} different words: its commonest are compared.")
        counts = self.vocabulary.gather(rows, max(words, min(bucket(most), MOST_WORDS)))
        padding = ((0, batch - len(texts)), (0, 0))
        anchor = np.zeros(batch, np.int32)
        anchor[: len(texts)] = [
            numbers.setdefault(text, len(numbers)) for text, numbers in zip(texts, seen, strict=True)
        ]
        return {
            "word_ids": np.pad(counts.ids, padding),
            "word_counts": np.pad(counts.counts, padding),
            "anchor": anchor,
        }


def _cuts(memory: Memory) -> Iterator[Cut]:
    """A memory's cuts, and a last one of all the text it then writes: names and commands can be long, too."""
    cut = Cut("task", 0, lambda _: memory.prompt())
    for cut in memory.shortened():
        yield cut
    text = cut.write(0)
    ends = piece_ends(text)
    yield Cut("task", len(ends) - 1, lambda n: text[: ends[n]])


def collect(
    player: Player,
    params,
    pool: Pool,
    games: Sequence[Game],
    key: jax.Array,
    *,
    temperature: float,
    buffer: Buffer | None = None,
    reward_scale: float = 10.0,
    reward_score: bool = False,
    penalise_inadmissible: bool = False,
    length_penalty: Callable[[np.ndarray], np.ndarray] | None = None,
    redraw: Callable[[Rollout], dict[int, Game]] | None = None,
    on_turn: Callable[[int, int], None] | None = None,
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
        buffer: where every turn is written, donated; None: nowhere.
        reward_scale: factor of the rewards.
        reward_score: write the environment's own rewards; False: success.
        penalise_inadmissible: commands that the environment does not admit count as invalid.
        length_penalty: what is subtracted from a turn's reward, from the tokens of its response; None: nothing.
        redraw: called when all have ended; names groups to play anew in the same places, with their new games, until it
            names none. What they were before is forgotten. None: no group is.
        on_turn: called with the turn and the number of active episodes.

    Returns:
        The episodes, with the buffer.

    Raises:
        WorkerError: if no episode could be played.
    """
    limits, count = player.limits, len(games)
    shape = (count, limits.turns)
    rollout = Rollout(
        None, np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(count, bool),
        np.zeros(count, np.float32), [[] for _ in games], [""] * count, finished=np.zeros(count, bool),
    )  # fmt: skip
    params, policy = adapters.without(params, player.config)
    params = decoding_params(params, config=policy, mesh=player.mesh, gather=player.gather_weights)
    play = _Play(
        player, params, policy, pool, list(games), rollout, temperature, reward_scale, reward_score,
        penalise_inadmissible, length_penalty,
    )  # fmt: skip
    if buffer is not None:
        play.buffer = clear(buffer)
        play.seen_in_group = [{} for _ in range(buffer.word_ids.shape[0])]
    play.to_the_end(key, 0, on_turn)
    drawn = 1
    while redraw and (new := redraw(rollout)):
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
        rollout, turns = self.rollout, self.player.limits.turns
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
            raise WorkerError(f"no episode could be played: {self.pool.fault}")

    def replace(self, games: dict[int, Game]) -> None:
        """Put new games in the places of these groups' episodes."""
        members = len(self.games) // len(self.seen_in_group)
        episodes = np.concatenate([np.arange(g * members, (g + 1) * members) for g in games])
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
        player, rollout, active = self.player, self.rollout, self.active
        batch = batch_bucket(len(active), player.mesh)
        prompts, lengths = player.pad(player.encode([self.memories[e] for e in active]), batch)
        # The members of a group begin with the same prompt.
        samples = player.sample(self.params, self.policy, prompts, lengths, key, self.temperature, shared=turn == 0)
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
        self.active = active[[now is not None and not now.done for now in seen]]

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


def batch_bucket(size: int, mesh: Mesh) -> int:
    """Round a batch size up such that few programs are compiled and `split` applies.

    Args:
        size: rows.
        mesh: the mesh.

    Returns:
        A power of two for each device that batches are sharded over, at least 16 in all.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return devices * bucket(-(-size // devices), bucket(-(-16 // devices), 1))


def width_bucket(length: int) -> int:
    """Round the width of prompts up such that few programs are compiled: 32, 64, 96, 128, 192, 256, 384, 512, ..."""
    power = bucket(length, 32)
    return power * 3 // 4 if power >= 128 and length <= power * 3 // 4 else power


def share(prompts: np.ndarray, lengths: np.ndarray, mesh: Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Keep one of equal prompts, if a half of them or fewer are left.

    Args:
        prompts: int32 [N, P], padded.
        lengths: int32 [N], 0 for batch padding.
        mesh: the mesh.

    Returns:
        Prompts [U, P] and lengths [U]; `U` is a power of two for each device that batches are sharded over. And int32
        [N], the prompt of each row, `U` for batch padding; or None, and the prompts as they were.
    """
    number: dict[tuple[int, bytes], int] = {}
    rows = np.flatnonzero(lengths)
    prompt_of = [number.setdefault((int(lengths[i]), prompts[i].tobytes()), len(number)) for i in rows]
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    size = devices * bucket(-(-len(number) // devices), 1)
    if 2 * size > len(prompts):
        return prompts, lengths, None
    texts, text_lengths = np.zeros((size, prompts.shape[1]), np.int32), np.zeros(size, np.int32)
    of = np.full(len(prompts), size, np.int32)
    of[rows] = prompt_of
    texts[prompt_of], text_lengths[prompt_of] = prompts[rows], lengths[rows]
    return texts, text_lengths, of
