"""Counted operations against loops over tokens, and against those of the compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nested import config_with
from test_dynamic_sampling import make

from proxmo_jax.agent.batches import trained_turns
from proxmo_jax.agent.throughput import Work, throughput_row
from proxmo_jax.policy import adapters
from proxmo_jax.policy.decoder import Policy, PolicyConfig, init_params

SHAPE = {
    "vocab_size": 640, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def slow_forward(config: PolicyConfig, prompts, responses) -> int:
    """Token by token, product by product."""
    h, m, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads, shared, r = config.num_attention_heads, config.num_key_value_heads, config.lora_rank
    products = [(h, heads * d), (h, shared * d), (h, shared * d), (heads * d, h), (h, m), (h, m), (m, h)]
    total = 0
    for prompt, response in zip(prompts, responses, strict=True):
        for token in range(prompt + response):
            for _ in range(config.num_hidden_layers):
                total += sum(2 * a * b + 2 * r * (a + b) for a, b in products)
                for _ in range(token + 1):  # the tokens it attends to
                    total += heads * (2 * d + 2 * d)
        total += response * 2 * h * config.vocab_size
    return total


@pytest.mark.parametrize("rank", [0, 4])
def test_a_forward_pass_is_counted_as_by_loops(rank):
    config = PolicyConfig(**SHAPE, lora_rank=rank)
    prompts, responses = np.array([5, 0, 11], np.int32), np.array([2, 3, 1], np.int32)
    assert Work.of(config).forward(prompts, responses) == slow_forward(config, prompts, responses)
    untied = Work.of(PolicyConfig(**SHAPE, lora_rank=rank, tie_word_embeddings=False))
    assert untied == Work.of(config)  # the embedding is a look-up in both


@pytest.mark.parametrize("rank", [0, 4])
def test_operations_are_those_of_the_compiled_programs(rank):
    """Within a few percent: these add norms and the softmax, and attend to all tokens."""
    config = PolicyConfig(**SHAPE, lora_rank=rank)
    work, length = Work.of(config), 32
    frozen, learned = adapters.split(init_params(config, jax.random.key(0)))
    tokens = jnp.arange(length)[None]

    def loss(learned):
        params = adapters.join(frozen, learned) if rank else learned
        mask = jnp.tril(jnp.ones((1, length, length), bool))
        return jax.nn.logsumexp(Policy(config).apply({"params": params}, tokens, tokens, mask)[0], axis=-1).sum()

    def operations(function):
        return jax.jit(function).lower(learned).compile().cost_analysis()["flops"]

    turn = np.array([0]), np.array([length])
    assert operations(loss) == pytest.approx(work.forward(*turn), rel=0.1)
    if rank:  # the first layer's inputs need no gradient, which is counted
        assert operations(jax.grad(loss)) == pytest.approx(work.training(*turn), rel=0.15)
        assert work.training(*turn) < 2.2 * work.forward(*turn)
    else:
        assert operations(jax.grad(loss)) == pytest.approx(work.training(*turn), rel=0.1)
        assert work.training(*turn) == 3 * work.forward(*turn)


def test_large_batches_do_not_overflow():
    work = Work.of(PolicyConfig(**SHAPE))
    prompts, responses = np.full(20_000, 30_000, np.int32), np.full(20_000, 2_000, np.int32)
    one = work.forward(prompts[:1], responses[:1])
    assert work.forward(prompts, responses) == pytest.approx(20_000 * one)
    assert one > 2 * work.matrices * 32_000


def test_an_iteration_reports_its_tokens_and_rates(tmp_path):
    options = {"loss__old_log_probs": "trainer", "loss__importance_cap": 2.0, "optimizer__num_iterations": 2}
    loop, state = make(tmp_path, 2, **options)
    _, row = loop.iteration(state, 1, jax.random.key(1))
    rollout = loop.played
    kept = int((rollout.prompt_lengths + rollout.response_lengths).sum())
    assert row["perf/total_num_tokens"] == kept
    assert row["perf/prompt_tokens"] + row["perf/response_tokens"] >= kept
    assert row["train/redrawn_groups"] == 0 or row["perf/prompt_tokens"] > rollout.prompt_lengths.sum()
    assert 0 < row["loss/importance_weight"] <= 2.0
    assert row["loss/importance_weight"] == pytest.approx(1.0, abs=0.01)  # one device, one dtype
    assert row["loss/importance_truncated"] == 0
    assert row["loss/sampler_mismatch"] < 0.01

    seconds = {"rollout": 2.0, "estimator": 1.0, "update": 4.0}
    happened = rollout.prompt_lengths > 0
    row = throughput_row(loop.config, loop.work, rollout, happened, seconds)
    lengths = rollout.prompt_lengths[happened], rollout.response_lengths[happened]
    forward = slow_forward(loop.player.config, *lengths)
    assert row["perf/update_flops_per_second"] == pytest.approx((2 * forward + 2 * 3 * forward) / 4.0)
    assert row["perf/throughput"] == pytest.approx(kept / 7.0 / jax.device_count())
    assert row["perf/update_tokens_per_second"] == pytest.approx(kept / 4.0)
    assert row["perf/rollout_response_tokens_per_second"] == pytest.approx(row["perf/response_tokens"] / 2.0)
    cut = rollout.overlong
    trained = trained_turns(config_with(rollout__overlong="mask"), rollout, jnp.zeros(cut.shape))
    masked = throughput_row(loop.config, loop.work, rollout, trained, seconds)
    left_out = int((rollout.prompt_lengths + rollout.response_lengths)[cut].sum())
    assert masked["perf/total_num_tokens"] == kept - left_out
