"""Demonstrations as training data: what a policy would read in each turn, and what it should answer."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from envs_bridge.environments import Episode
from envs_bridge.prompts import Memory, Notes, readable
from envs_bridge.turn import Observation
from proxmo_jax.agent.player import Player
from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.errors import UserError
from proxmo_jax.training.buffers import Buffer


@dataclass(frozen=True)
class Example:
    """One turn to clone: what the policy would read, what to answer, and the thought before it."""

    memory: Memory
    command: str
    thought: str = ""


def demonstrations(
    episodes: Iterable[Episode], start: Callable[[str, Observation], Memory] = Notes.start
) -> list[Example]:
    """The turns of demonstrated episodes, as a policy with such a memory reads them."""
    examples = []
    for task, turns in episodes:
        if not turns:
            continue
        memory = start(task, turns[0].seen)
        for t, turn in enumerate(turns):
            examples.append(Example(memory.copy(), turn.command, turn.thought))
            if t + 1 < len(turns):
                memory.remember(turn.command, turns[t + 1].seen)
    return examples


def answer(begun: str, thought: str, command: str) -> str:
    """A response in the form that `envs_bridge.actions.project` reads.

    Args:
        begun: what the prompt already begins the response with (`Player.answer_start`); it is not repeated.
        thought: text inside the think tags.
        command: text inside the action tags.

    Returns:
        The rest of the response.
    """
    if "<action>" in begun:
        return f"{command}</action>"
    action = f"<action>{command}</action>"
    if "</think>" in begun:
        return action
    return f"{thought}</think>{action}" if "<think>" in begun else f"<think>{thought}</think>{action}"


def demonstration_buffer(player: Player, examples: Sequence[Example], *, thoughts: bool = False) -> Rollout:
    """Demonstrations in the rollout's own layout, so that the warm start packs and learns as the loop does.

    Args:
        player: the policy.
        examples: turns to clone.
        thoughts: whether responses contain the thoughts, where they fit into the response limit.

    Returns:
        One episode of one turn for each example whose response fits; how many do not is said.

    Raises:
        UserError: if none fits.
    """
    room = player.limits.response
    responses = _responses(player, examples, thoughts)
    if thoughts and (long := [i for i, ids in enumerate(responses) if len(ids) > room]):
        _say_left_out(player, "thoughts", responses)
        for i, ids in zip(long, _responses(player, [examples[i] for i in long], False), strict=True):
            responses[i] = ids
    kept = [i for i, ids in enumerate(responses) if len(ids) <= room]
    if not kept:
        raise UserError(
            f"response: every command has {min(map(len, responses))} tokens or more, need at most"
            f" {room} (--rollout.max-response-length)"
        )
    if len(kept) < len(responses):
        _say_left_out(player, "commands", responses)
    return _as_rollout(player, [examples[i].memory for i in kept], [responses[i] for i in kept])


def _responses(player: Player, examples: Sequence[Example], thoughts: bool) -> list[list[int]]:
    """Token ids of each response."""
    texts = [
        answer(player.answer_start, readable(e.thought) if thoughts else "", readable(e.command)) for e in examples
    ]
    encoded = player.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [[*e.ids, *player.answer_end] for e in encoded]


def _say_left_out(player: Player, what: str, responses: Sequence[Sequence[int]]) -> None:
    room = player.limits.response
    long = sum(len(ids) > room for ids in responses)
    player.say(
        f"{long} of {len(responses)} demonstrated {what} are left out: their responses have up to"
        f" {max(map(len, responses))} tokens, need at most {room} (--rollout.max-response-length)"
    )


def _as_rollout(player: Player, memories: Sequence[Memory], responses: Sequence[Sequence[int]]) -> Rollout:
    """Prompts and responses as episodes of one turn."""
    limits, count = player.limits, len(memories)
    prompts = player.encode(memories)
    prompt_array = np.zeros((count, 1, limits.prompt), np.int32)
    response_array = np.zeros((count, 1, limits.response), np.int32)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        prompt_array[i, 0, limits.prompt - len(prompt) :] = prompt
        response_array[i, 0, : len(response)] = response
    empty = Buffer.empty(count, 1, 1, prompt=1, response=limits.response, words=1)
    buffer = dataclasses.replace(empty, prompts=jnp.asarray(prompt_array), responses=jnp.asarray(response_array))
    prompt_lengths = np.array([[len(p)] for p in prompts], np.int32)
    response_lengths = np.array([[len(r)] for r in responses], np.int32)
    return Rollout(buffer, prompt_lengths, response_lengths, np.ones(count, bool), np.ones(count, np.float32), [], [])
