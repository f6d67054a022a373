"""The policy as the loop uses it: prompts cut to their limit and padded, responses sampled, observations numbered."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from envs_bridge.actions import ALFWORLD_TAIL
from envs_bridge.prompts import Cut, Memory, Notes, piece_ends, readable
from envs_bridge.turn import Observation
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.words import Vocabulary, bucket
from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.policy.decoding import Samples, sample
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.sharding import local_mesh, split

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
class Player:
    """The policy as the loop uses it: prompts in, sampled tokens out.

    Attributes:
        tokenizer, config: of the policy.
        limits: sizes of prompts, responses and episodes.
        mesh: the devices on which the policy is trained.
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

    @property
    def local_mesh(self) -> Mesh:
        """The devices that sample this host's responses."""
        return local_mesh(self.mesh)

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
        numbers: np.ndarray,
        temperature: float,
    ) -> Samples:
        """Responses to padded prompts, by parameters of this shape; fastest in `reading_order`."""
        mesh = self.local_mesh
        return sample(
            params,
            *split(mesh, (prompts, lengths)),
            key,
            jnp.float32(temperature),
            self.stop_table,
            numbers,
            config=policy,
            decoding=self.decoding,
            slots=self.slots,
            mesh=mesh,
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


def reading_order(rows: Sequence[list[int]], batch: int, mesh: Mesh) -> np.ndarray:
    """The order in which `decoding.sample` reads least: on each device by length, equal prompts side by side.

    Args:
        rows: token ids of each prompt.
        batch: rows with batch padding, which comes last.
        mesh: the mesh.

    Returns:
        int [len(rows)], the prompt of each row; a prompt stays on the device that it would be on.
    """
    own = batch // (mesh.shape["data"] * mesh.shape["fsdp"])
    order = sorted(range(len(rows)), key=lambda i: (i // own, len(rows[i]), rows[i]))
    return np.array(order, int)
