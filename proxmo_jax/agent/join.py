"""The rollouts of all hosts as one: words with the same ids, arrays of the same shapes, statistics of all episodes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proxmo_jax.agent import hosts
from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.estimator.words import Vocabulary, bucket
from proxmo_jax.policy.sharding import join_hosts
from proxmo_jax.training.buffers import grow

EPISODES = "prompt_lengths response_lengths won score finished overlong penalty ending_anchor".split()


class SharedWords:
    """Word ids on which the hosts agree, as each host numbers the words that its own environments say.

    Attributes:
        every: the words of all hosts; with one host its own vocabulary.
    """

    def __init__(self, own: Vocabulary, known: Sequence[str] = ()):
        """Begin with words that all hosts know, numbered in their order.

        Args:
            own: this host's vocabulary.
            known: of a resumed run. Sums over words are in the order of their numbers: with other numbers its
                advantages would be rounded otherwise.
        """
        self.own, self.every = own, own if hosts.count() == 1 else Vocabulary()
        for vocabulary in (self.own, self.every):
            vocabulary.ids(known)
        self._sent = len(self.own)

    def agree(self, word_ids: jax.Array) -> jax.Array:
        """Renumber words by the ids that all hosts share; every host calls it at the same time.

        Args:
            word_ids: int32 [...], this host's ids.

        Returns:
            int32 [...].
        """
        if self.every is self.own:
            return word_ids
        new, self._sent = self.own.words(self._sent), len(self.own)
        for value in hosts.exchange("words of the observations", {"words": new}):
            self.every.ids(value["words"])
        table = np.zeros(bucket(len(self.own), 256), np.int32)
        table[: len(self.own)] = self.every.ids(self.own.words())
        return jnp.asarray(table)[word_ids]


def join_buffers(rollout: Rollout, words: SharedWords, mesh: Mesh) -> None:
    """Make the rollout's buffer that of all hosts, `join_hosts`, without copying it between them.

    Args:
        rollout: this host's; its buffer is replaced.
        words: renumbers the buffer's words.
        mesh: the training mesh.
    """
    assert rollout.buffer is not None
    sizes = [value["size"] for value in hosts.exchange("sizes", {"size": rollout.buffer.word_ids.shape[1:]})]
    texts, width = (max(size[i] for size in sizes) for i in (0, 1))
    buffer = grow(rollout.buffer, texts, width)
    buffer = dataclasses.replace(buffer, word_ids=words.agree(buffer.word_ids))
    rollout.buffer = join_hosts(mesh, buffer)


def join_episodes(rollout: Rollout) -> Rollout:
    """The arrays and statistics of all hosts' episodes, in the order of the hosts; texts stay where they are.

    Args:
        rollout: this host's.

    Returns:
        A rollout of all episodes, with this host's buffer and texts.
    """
    if hosts.count() == 1:
        return rollout
    turns = int((rollout.prompt_lengths > 0).sum())
    prompts, responses = (np.concatenate([turn[i] for turn in rollout.sampled]) for i in (0, 1))
    found = hosts.exchange(
        "episodes",
        {
            **{name: getattr(rollout, name) for name in EPISODES},
            "sampled_prompts": prompts,
            "sampled_responses": responses,
            "numbers": [rollout.texts, rollout.lost, turns, rollout.valid * turns, rollout.admissible * turns],
        },
    )
    texts, lost, every, valid, admissible = zip(*(value["numbers"] for value in found), strict=True)
    arrays: dict[str, Any] = {name: np.concatenate([value[name] for value in found]) for name in EPISODES}
    return dataclasses.replace(
        rollout,
        **arrays,
        texts=max(texts),
        lost=sum(lost),
        valid=sum(valid) / max(sum(every), 1),
        admissible=sum(admissible) / max(sum(every), 1),
        sampled=[(value["sampled_prompts"], value["sampled_responses"]) for value in found],
    )


def join_texts(rollout: Rollout) -> Rollout:
    """What was said in all hosts' episodes: the rollout with tasks, transcripts and endings of all of them."""
    names = ("tasks", "transcripts", "endings")
    found = hosts.exchange("transcripts", {name: getattr(rollout, name) for name in names})
    tasks, transcripts, endings = ([x for value in found for x in value[name]] for name in names)
    return dataclasses.replace(rollout, tasks=tasks, transcripts=transcripts, endings=endings)
