"""What the hosts of a run do in an iteration, small: `python host_program.py INDEX COUNT PORT FOLDER`.

`iteration` is called by the processes of a test and, for the same batch on one host, by the test itself.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from proxmo_jax.agent import hosts
from proxmo_jax.agent.dynamic_sampling import Draws
from proxmo_jax.agent.join import SharedWords, join_buffers, join_episodes, join_texts
from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.agent.settings import Config, HostSettings
from proxmo_jax.agent.stop import Stopped
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.presets import proxmo
from proxmo_jax.estimator.words import Vocabulary, bucket
from proxmo_jax.policy.decoder import PolicyConfig, init_params
from proxmo_jax.policy.decoding import decoding_params, sample
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.sharding import (
    by_host,
    local_mesh,
    make_mesh,
    parameter_shardings,
    place_optimizer,
    replicate,
    split,
    split_by_host,
)
from proxmo_jax.training.buffers import Buffer, grow, write
from proxmo_jax.training.checkpoint import Checkpoints
from proxmo_jax.training.losses import LossSettings
from proxmo_jax.training.rows import gather_rows, pack_turns
from proxmo_jax.training.update import TrainState, estimate, make_optimizer, policy_step

GROUPS, MEMBERS, TURNS, PROMPT, RESPONSE = 4, 4, 2, 16, 4
CONFIG = PolicyConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip


def observation(group: int, member: int, turn: int) -> str:
    """What an environment says: most words are those of one group alone, so that hosts number them differently."""
    return f"a desk in room{group} with cup{member % 3} and lamp{turn} " + "shelf " * group + f"key{group}x{turn}"


def play(params, mesh, words: Vocabulary, buffer: Buffer) -> Rollout:
    """Sampled responses to random prompts, and made-up rewards, of this host's groups."""
    own = hosts.share(GROUPS)
    episodes = np.arange(own.start * MEMBERS, own.stop * MEMBERS)
    count, local = len(episodes), local_mesh(mesh)
    params = decoding_params(params, config=CONFIG, mesh=mesh)
    rng = np.random.default_rng(0)
    responses = np.zeros((count, TURNS), np.int32)
    seen: list[dict[str, int]] = [{} for _ in range(GROUPS)]
    for turn in range(TURNS):
        prompts = rng.integers(1, 60, (GROUPS * MEMBERS, PROMPT)).astype(np.int32)[episodes]
        reward = rng.random(GROUPS * MEMBERS).astype(np.float32)[episodes]
        samples = sample(
            params, *split(local, (prompts, np.full(count, PROMPT, np.int32))),
            jax.random.fold_in(jax.random.key(1), turn), jnp.float32(1.0), numbers=episodes.astype(np.int32),
            config=CONFIG, decoding=Decoding(RESPONSE, (0, 1, 2, 3)), mesh=local,
        )  # fmt: skip
        responses[:, turn] = np.asarray(samples.lengths)
        texts = [observation(e // MEMBERS, e % MEMBERS, turn) for e in episodes]
        anchor = [
            seen[e // MEMBERS].setdefault(text, len(seen[e // MEMBERS]))
            for e, text in zip(episodes, texts, strict=True)
        ]
        counts = words.counts(texts)
        buffer = grow(buffer, MEMBERS * TURNS, counts.ids.shape[1])
        fields = {
            "prompts": prompts, "responses": samples.tokens, "log_probs": samples.log_probs, "reward": reward,
            "action_valid": np.ones(count, bool), "mask": np.ones(count, bool), "anchor": np.array(anchor, np.int32),
            "word_ids": counts.ids, "word_counts": counts.counts,
        }  # fmt: skip
        buffer = write(buffer, np.arange(count, dtype=np.int32), jnp.int32(turn), fields)
    return Rollout(
        buffer, np.full((count, TURNS), PROMPT, np.int32), responses, episodes % 3 == 0,
        np.ones(count, np.float32), [[(f"seen {e}", "said")] for e in episodes], [f"task {e}" for e in episodes],
        texts=max(map(len, seen)), finished=np.ones(count, bool), lost=hosts.index(), valid=0.5,
        sampled=[(np.full(count, PROMPT), responses[:, 0])], endings=["end"] * count,
        ending_anchor=np.zeros(count, np.int32),
    )  # fmt: skip


def iteration(mesh, checkpoints: Path | None = None) -> dict[str, np.ndarray]:
    """Two iterations of a small policy on a mesh over all hosts; what they have computed."""
    shardings = parameter_shardings(mesh, CONFIG)
    params = jax.jit(partial(init_params, CONFIG), out_shardings=shardings)(jax.random.key(0))
    optimizer = make_optimizer(1e-2, 0.01, 1.0, 5)
    state = TrainState(params, place_optimizer(optimizer, params, shardings))
    own, vocabulary = hosts.share(GROUPS), Vocabulary()
    words = SharedWords(vocabulary)
    found: dict[str, np.ndarray] = {}
    for _ in range(2):
        empty = Buffer.empty(own.stop - own.start, MEMBERS, TURNS, prompt=PROMPT, response=RESPONSE, words=8)
        rollout = play(state.params, mesh, vocabulary, replicate(local_mesh(mesh), empty))
        join_buffers(rollout, words, mesh)
        rollout = join_texts(join_episodes(rollout))
        assert rollout.buffer is not None
        result = estimate(
            rollout.buffer, rollout.won, rollout.ending_anchor, words.every.alphabetical(), proxmo(),
            texts=min(bucket(rollout.texts), rollout.buffer.word_ids.shape[1]),
        )  # fmt: skip
        advantage = result.joint.reshape(GROUPS * MEMBERS, TURNS)
        lengths, answers = rollout.prompt_lengths + rollout.response_lengths, rollout.response_lengths
        order = np.random.default_rng(3).permutation(lengths.size)
        turns, offsets = pack_turns(lengths.reshape(-1), answers.reshape(-1), order, row_length=40, row_answers=8)
        short = ((0, -len(turns) % 8), (0, 0))
        part = np.pad(turns, short, constant_values=-1), np.pad(offsets, short)
        over_hosts = split_by_host(rollout.buffer.mask)
        rows = gather_rows(
            rollout.buffer, rollout.prompt_lengths, answers, advantage,
            *(part if over_hosts else split(mesh, part)), row_answers=8,
        )  # fmt: skip
        with jax.set_mesh(mesh):
            state, terms = policy_step(
                state, split(mesh, rows) if over_hosts else rows, jnp.float32(1), jnp.float32(1), {}, config=CONFIG,
                optimizer=optimizer, settings=LossSettings(), micro_batches=1,
            )  # fmt: skip
        found |= {
            "loss": np.asarray(terms.loss),
            "tokens": np.asarray(rows.tokens.sum()),
            "advantage": whole(mesh, advantage),
        }
    numbers = [
        rollout.lost,
        rollout.valid,
        rollout.texts,
        sum(int(x.sum()) for _, x in rollout.sampled),
        len(rollout.tasks),
    ]
    found |= {"numbers": np.array(numbers), "task": np.array([int(task.split()[1]) for task in rollout.tasks])}
    if checkpoints:
        saved = Checkpoints(checkpoints)
        saved.save(1, state, {"iteration": 1})
        state, _ = saved.restore(state, 1)
        saved.close()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        found[f"param{jax.tree_util.keystr(path)}"] = whole(mesh, leaf)
    return found


def whole(mesh, x: jax.Array) -> np.ndarray:
    """An array of all hosts on this one."""
    return np.asarray(replicate(mesh, x).addressable_data(0))


def agree() -> list[str]:
    """The agreement between hosts; the sentences of what is refused."""
    said, first = [], hosts.index() == 0
    big = np.arange(700_000) + hosts.index()
    values = hosts.exchange("a large value", {"big": big, "text": f"\udcff {hosts.index()}"})
    assert [int(value["big"][0]) for value in values] == list(range(hosts.count()))
    assert values[-1]["text"].endswith(f" {hosts.count() - 1}")
    assert hosts.any_host(first)
    assert not hosts.any_host(False)
    assert hosts.of_first("a value", hosts.index()) == 0
    hosts.check_same({"seed": 0})
    for stopping in (True, False):  # a host that stops answers those whose episodes have ended
        draws = Draws(Config(), [], np.zeros(0, int), lambda *_: np.zeros(0, int), lambda *_: None)
        if hosts.index() == 0 and stopping:
            draws.give_up()
            continue
        nobody = np.zeros(0, bool)
        rollout = Rollout(None, nobody, nobody, nobody, nobody, [], [], finished=nobody)
        try:
            assert draws(rollout) is None
            assert not stopping
        except Stopped:
            assert stopping
    for refused in (lambda: hosts.check_same({"seed": hosts.index()}), lambda: lose_disk(first)):
        try:
            refused()
        except UserError as error:
            said.append(str(error))
    return said


def lose_disk(first: bool) -> None:
    """A mistake of the last host alone."""
    with hosts.together("a part"):
        if not first:
            raise UserError("no disk")


def main() -> None:
    index, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    hosts.start(HostSettings(f"127.0.0.1:{port}", count, index, timeout=250))
    said = agree()
    mesh = make_mesh(0, 1, 1)
    assert by_host(mesh).shape["host"] == count
    found = iteration(mesh, folder / "checkpoints")
    np.savez(folder / f"host{index}.npz", said=np.array(said), **found)
    hosts.finish()


if __name__ == "__main__":
    main()
