"""The benchmarks run, small; what they measure is in BENCHMARKS.md."""

import re

import jax
import numpy as np
import pytest
from fresh import fresh
from nested import plain

from experiments import bench_policy
from proxmo_jax.cli import main
from proxmo_jax.policy.decoder import PolicyConfig
from proxmo_jax.training.update import row_log_probs


@pytest.mark.slow
def test_bench_env_times_engine_and_pool(tmp_path):
    target = tmp_path / "b.md"
    options = ["--at-most", "3", "--steps", "6", "--environments", "16", "--turns", "4", "--append", str(target)]
    options += ["--shop-products", "300"]
    assert main(["bench", "env", *options]) == 0
    text = target.read_text(encoding="utf-8")
    assert "| proxmo-jax | " in text
    assert re.search(r"16 environments on 2 workers takes [\d.]+ ms", text)
    assert "NO" not in text
    assert re.search(r"64 episodes of \d+ steps: [\d,]+ steps per second", text)
    assert re.search(r"Search in 300 products, 50 queries of 3 to 20 words: median [\d.]+ ms", text)
    assert re.search(r"128 environments in one process share the index: \d+ MiB", text)


def test_benchmarks_refuse_nonsense(tmp_path, capsys):
    assert main(["bench", "env", "--games", str(tmp_path)]) == 2
    assert "holds no game.tw-pddl file" in capsys.readouterr().err
    assert main(["bench", "env", "--workers", "0"]) == 2
    assert "--workers must be at least 1, got 0" in capsys.readouterr().err
    assert main(["bench", "shop", "--queries", "0"]) == 2
    assert "--queries must be at least 1, got 0" in capsys.readouterr().err
    assert main(["bench", "policy", "--hidden-size", "100"]) == 2
    assert "--hidden-size must be a multiple of 64, got 100" in capsys.readouterr().err
    assert main(["bench", "weather"]) == 2
    assert "Available subcommands: estimator, env, shop, policy, hosts, ablation" in plain(capsys.readouterr().err)


@pytest.mark.slow
def test_packed_and_padded_rows_are_the_same_work():
    """What is timed is the same update: equal losses and parameters, packed or not."""
    config = bench_policy.Config(turns=5, hidden_size=64, layers=1, vocab_size=64, repeat=1)
    shape = PolicyConfig(vocab_size=64, num_hidden_layers=1)
    request = bench_policy.make_request(config, shape)
    prompt, response = (np.array([len(r) for r in request[name]]) for name in ("prompts", "responses"))
    whole, params = int(prompt.max() + response.max()), fresh(shape)
    losses = []
    for row_length, room, alone in ((whole, int(response.max()), True), (2 * whole, whole, False)):
        rows = bench_policy.make_rows(request, prompt, response, row_length, room, alone=alone)
        assert int(rows.mask.sum()) == response.sum()
        assert len(rows.tokens) == (6 if alone else 4)
        log_probs = row_log_probs((params,), rows, jax.numpy.float32(1.0), config=shape)[0]
        losses.append(float((log_probs * rows.advantage * rows.mask).sum()))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
