"""Settings that cannot work are refused in one sentence; how a mini-batch is cut up."""

import json

import pytest

from experiments.setup import Config, check, micro_batches, stored_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 4}, "--lora-rank needs a --model"),
        ({"lora_rank": -1}, "--lora-rank must be at least 0, got -1"),
        ({"lora_alpha": 0.0}, "--lora-alpha must be > 0"),
        ({"decode_rows": 12}, "--decode-rows must be a multiple of the 8 devices"),
        ({"attention": "splash"}, "--row-length must be a multiple of 128 for --attention splash, got 160"),
        ({"old_log_probs": "both"}, "--old-log-probs must be one of sampler, trainer"),
        ({"micro_batch_tokens": 0}, "--micro-batch-tokens must be at least 1"),
        ({"rows_per_batch": 12}, "--rows-per-batch must be a multiple of the 8 devices"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check(Config(**options))
    assert message in str(error.value)


def test_a_mini_batch_is_cut_into_the_fewest_equal_parts_that_keep_to_the_budget():
    """On the tests' eight devices: 64 rows are eight each."""
    for rows, row_length, budget, parts in (
        (64, 160, 640, 2),
        (64, 160, 639, 4),
        (64, 160, 10_000, 1),
        (64, 160, 1, 8),  # a row at least
        (48, 100, 450, 2),
        (56, 100, 450, 7),  # seven rows have no other parts
    ):
        config = Config(rows_per_batch=rows, row_length=row_length, micro_batch_tokens=budget)
        assert micro_batches(config) == parts
        assert micro_batches(Config(**{**vars(config), "rows_per_batch": rows // 2, "tensor": 2})) == parts


def test_a_run_of_another_version_is_not_resumed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"micro_batches": 8}))
    with pytest.raises(ValueError, match="has micro_batches, which is no setting of this version"):
        stored_config(Config(out=tmp_path))
