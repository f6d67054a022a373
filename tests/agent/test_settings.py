"""Settings that cannot work are refused in one sentence; how a mini-batch is cut up; what a resumed run takes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from proxmo_jax import cli
from proxmo_jax.agent import train
from proxmo_jax.agent.settings import (
    Config,
    check,
    check_devices,
    extended,
    micro_batches,
    not_taken,
    small_policy,
    stored_config,
)
from proxmo_jax.agent.train import learning_rate_share
from proxmo_jax.errors import UserError
from proxmo_jax.policy.decoder import init_params
from proxmo_jax.policy.sharding import batch_bucket, make_mesh, parameter_shardings

HERE = Path(__file__).parents[1]
FLOATS = [f.name for f in dataclasses.fields(Config) if isinstance(f.default, float)]


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
        *(({"hidden_size": n}, f"--hidden-size must be a multiple of 32, got {n}") for n in (1, 16, 30, 80)),
        ({"hidden_size": 0}, "--hidden-size must be at least 1"),
        ({"hidden_size": 32, "tensor": 2}, "--hidden-size must be a multiple of 32 x --tensor 2, got 32"),
        ({"hidden_size": 36, "fsdp": 8}, "--hidden-size must be a multiple of --fsdp 8, got 36"),
        ({"fsdp": 0}, "--fsdp must be at least 1"),
        ({"tensor": 3}, "--fsdp 1 x --tensor 3 must divide the 8 devices"),
        ({"layers": 0}, "--layers must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "--learning-rate must be > 0, got -1.0"),
        ({"learning_rate": 0.0}, "--learning-rate must be > 0, got 0.0"),
        ({"warm_start_rate": 0.0}, "--warm-start-rate must be > 0"),
        ({"weight_decay": -0.1}, "--weight-decay must be at least 0, got -0.1"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm must be > 0"),
        ({"kl_weight": -0.01}, "--kl-weight must be at least 0"),
        ({"entropy_weight": -0.01}, "--entropy-weight must be at least 0"),
        ({"invalid_penalty": -1.0}, "--invalid-penalty must be at least 0"),
        ({"reward_scale": 0.0}, "--reward-scale must be > 0"),
        ({"clip": 0.0}, "--clip must be > 0"),
        ({"clip": 1.5}, "--clip must lie between 0 and 1, got 1.5"),
        ({"clip_high": -0.1}, "--clip-high must be at least 0"),
        ({"dual_clip": 1.0}, "--dual-clip must be > 1"),
        ({"eval_temperature": -0.4}, "--eval-temperature must be at least 0"),
        ({"temperature": 0.0}, "--temperature must be > 0"),
        ({"top_k": -1}, "--top-k must be at least 0"),
        ({"top_p": 0.0}, "--top-p must be > 0 and at most 1, got 0.0"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"seed": 1 << 32}, "--seed must be below 4294967296"),
        ({"decay_iterations": -1}, "--decay-iterations must be at least 0"),
        ({"max_prompt_tokens": 0}, "--max-prompt-tokens must be at least 1"),
        ({"row_length": 135}, "--row-length must hold a whole turn, at least 136 tokens; got 135"),
        ({"answer_share": 1.5}, "--answer-share must lie between 0 and 1"),
        ({"stop": ("x",)}, "--stop needs a --model"),
        ({"dtype": "bfloat16"}, "--dtype needs a --model"),
        ({"remat": "full"}, "--remat needs a --model"),
        ({"model": "x", "warm_start_from": Path("y")}, "--warm-start-from is for small policies"),
        ({"warm_start_from": Path("/nowhere")}, "--warm-start-from: /nowhere holds no warm start"),
        *(({name: value}, "must be a finite number") for name in FLOATS for value in (float("nan"), float("inf"))),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check(Config(**options))
    assert message in str(error.value)


@pytest.mark.parametrize("size", [32, 40, 48, 64, 96, 128, 160])
def test_hidden_sizes_that_work_are_accepted(size):
    """Every size that is accepted can be made."""
    check(Config(hidden_size=size))
    params = jax.eval_shape(lambda: init_params(small_policy(Config(hidden_size=size), 40), jax.random.key(0)))
    assert params["embedding"].shape == (64, size)


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (2, 2), (8, 1), (1, 8), (4, 2)])
def test_what_is_accepted_can_be_laid_out(fsdp, tensor):
    for size in range(16, 272, 8):
        config = Config(hidden_size=size, fsdp=fsdp, tensor=tensor)
        try:
            check(config)
        except UserError:
            continue
        parameter_shardings(make_mesh(0, fsdp, tensor), small_policy(config, 77))
    check(Config(hidden_size=256, fsdp=fsdp, tensor=tensor))


def test_a_warm_start_of_another_shape_is_refused(tmp_path):
    (tmp_path / "warm_start").mkdir()
    stored = {"hidden_size": 64, "num_hidden_layers": 3}
    (tmp_path / "warm_start" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="--layers must be 3, as --warm-start-from has it, got 2"):
        check(Config(warm_start_from=tmp_path))
    check(Config(warm_start_from=tmp_path, layers=3))
    check(Config(out=tmp_path, warm_start_from=Path("/gone"), layers=3))  # it has been taken


def test_batches_have_buckets_that_every_number_of_devices_divides():
    for devices in (1, 2, 3, 5, 6, 7, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        sizes = [batch_bucket(n, mesh) for n in range(1, 300)]
        assert all(size >= n and size % devices == 0 for n, size in enumerate(sizes, 1))
        assert len(set(sizes)) <= 6  # few programs
        assert sizes == sorted(sizes)
    assert {batch_bucket(n, make_mesh(1, 2, 4)) for n in range(1, 17)} == {16}


def test_devices_that_rows_do_not_fit():
    for count, rows in ((6, 32), (32, 16), (64, 32)):
        with pytest.raises(UserError, match=f"--rows-per-batch must be a multiple of the {count} devices, got {rows}"):
            check_devices(Config(rows_per_batch=rows), count)
    check_devices(Config(rows_per_batch=36, groups=16), 6)
    check_devices(Config(rows_per_batch=32, groups=3), 32)


EPISODES = """
import sys, tempfile
import jax, jax.numpy as jnp, numpy as np
from scripted import ScriptedPool, say, small_player
from proxmo_jax.agent.rollout import collect
from proxmo_jax.agent.settings import Config, check
from proxmo_jax.agent.train import batches
from proxmo_jax.training.buffers import Buffer
from proxmo_jax.policy.decoder import init_params
from proxmo_jax.policy.sharding import make_mesh, replicate
count = int(sys.argv[1])
assert jax.device_count() == count
config = Config(rows_per_batch=count, groups=1, members=5, max_turns=3, max_prompt_tokens=64, max_response_tokens=2)
check(config)
mesh = make_mesh()
player = small_player(tempfile.mkdtemp(), mesh)
params = replicate(mesh, init_params(player.config, jax.random.key(0)))
buffer = replicate(mesh, Buffer.empty(1, 5, 3, prompt=64, response=2, words=16))
pool = ScriptedPool(lambda slot, attempt, turn: say(f"turn {turn}", done=slot < turn))
with jax.set_mesh(mesh):
    played = collect(player, params, pool, ["x"] * 5, jax.random.key(1), temperature=1.0, buffer=buffer)
    assert played.finished.all()
    shapes = {rows.tokens.shape for rows in batches(config, mesh, played, jnp.zeros((5, 3)), np.random.default_rng(0))}
assert shapes == {(count, config.row_length)}
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [6, 32])
def test_a_few_episodes_on_any_number_of_devices(count):
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(count),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    command = [sys.executable, "-c", EPISODES, str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


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


def test_a_longer_run_keeps_the_rate_it_has_come_to():
    planned = Config(iterations=50, final_rate=0.05)
    shares = [learning_rate_share(planned, i) for i in range(1, 51)]
    assert shares[0] == 1
    assert shares[-1] == pytest.approx(0.05)
    assert shares == sorted(shares, reverse=True)
    longer = extended(extended(planned, 100), 200)
    assert (longer.iterations, longer.decay_iterations) == (200, 50)
    assert [learning_rate_share(longer, i) for i in range(1, 51)] == shares
    assert {learning_rate_share(longer, i) for i in range(51, 201)} == {shares[-1]}
    assert extended(planned, 20) == planned  # no run is made shorter
    with pytest.raises(UserError, match="--iterations 100: with --final-rate 0 the run learns nothing any more"):
        extended(dataclasses.replace(planned, final_rate=0.0), 100)
    assert extended(dataclasses.replace(planned, final_rate=0.0), 50).iterations == 50


@pytest.fixture
def resumed(tmp_path, monkeypatch, capsys):
    """What `train.main` is given, and what is printed, for `proxmo train --resume` with some options."""
    run = tmp_path / "run"
    run.mkdir()
    stored = {**vars(Config()), "iterations": 7, "learning_rate": 1e-3, "stop": ["</action>"], "config": None}
    stored = {k: str(v) if isinstance(v, Path) else v for k, v in stored.items()}
    (run / "config.json").write_text(json.dumps(stored))

    def resume(*options):
        given = []
        monkeypatch.setattr(train, "main", given.append)
        assert cli.main(["train", "--resume", "--out", str(run), *options]) == 0
        return given[0], capsys.readouterr().out

    return resume


START = "--resume goes on with the run's own settings; not taken: "


def test_a_resumed_run_names_what_it_does_not_take(resumed, tmp_path):
    config, said = resumed()
    assert (config.iterations, config.learning_rate, config.stop, said) == (7, 1e-3, ("</action>",), "")
    config, said = resumed("--learning-rate", "123", "--method=grpo", "--no-list-actions")
    assert (config.method, config.learning_rate, config.list_actions) == ("proxmo", 1e-3, True)
    assert said == (
        f"{START}--method grpo (the run has proxmo), --list-actions False (the run has True),"
        " --learning-rate 123.0 (the run has 0.001)\n"
    )
    assert resumed("--learning_rate", "0.001", "--method", "proxmo")[1] == ""  # what it has anyway
    config, said = resumed("--iterations", "9")
    assert (config.iterations, said) == (9, "")
    config, said = resumed("--iterations", "5")
    assert (config.iterations, said) == (7, f"{START}--iterations 5 (the run has 7)\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("iterations = 40\nseed = 3\n")
    config, said = resumed("--config", str(recipe))
    assert (config.iterations, config.seed) == (7, 0)
    for part in (f"--config {recipe}", "--seed 3 (the run has 0)", "--iterations 40 (the run has 7)"):
        assert part in said
    assert resumed("--env", "household")[1] == ""
    assert resumed("--env", "shop")[1] == f"{START}--env shop (the run has household)\n"  # its recipe is not asked for


def test_settings_not_taken_are_those_that_differ():
    assert not_taken(Config(), Config(out=Path("x"), resume=True)) == []
    assert not_taken(Config(), Config(iterations=60)) == ["--iterations 60 (the run has 50)"]
    assert not_taken(Config(), Config(iterations=60), longer=True) == []


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ('stop = ["</action>", "x"]', "stop", ("</action>", "x")),
        ("stop = []", "stop", ()),
        ("learning_rate = 1", "learning_rate", 1.0),
        ("learning-rate = 1e-4", "learning_rate", 1e-4),
        ('data = "games"', "data", Path("games")),
        ('data = ""', "data", None),
        ('out = "runs/x"', "out", Path("runs/x")),
        ("list_actions = false", "list_actions", False),
        ("groups = 4", "groups", 4),
        ('model = ""', "model", ""),
    ],
)
def test_recipes_say_in_toml_what_settings_are(tmp_path, text, name, value):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    found = getattr(cli._defaults(["--config", str(path)], Config), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('stop = "x"', "stop must be a list of strings, got 'x'"),
        ("stop = [1]", "stop must be a list of strings, got [1]"),
        ("groups = 4.0", "groups must be int, got 4.0"),
        ("groups = true", "groups must be int, got True"),
        ("learning_rate = true", "learning_rate must be a finite float, got True"),
        ("learning_rate = nan", "learning_rate must be a finite float, got nan"),
        (f"learning_rate = 1{'0' * 400}", "learning_rate must be a finite float, got 1000"),
        ('learning_rate = "1e-4"', "learning_rate must be a finite float, got '1e-4'"),
        ("list_actions = 1", "list_actions must be true or false, got 1"),
        ("model = 3", "model must be a string, got 3"),
        ("data = 3", "data must be a string (a path), got 3"),
        ('out = ""', "out must be a string (a path), got ''"),
        ('data = ["a"]', "data must be a string (a path), got ['a']"),
        ("resume = true", "sets resume, which belongs on the command line"),
        ("max_turns = 3\nmax-turns = 4", "sets a setting twice"),
        ("[train]\ngroups = 4", "sets train, which is no setting of train"),
    ],
)
def test_recipes_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        cli._defaults(["--config", str(path)], Config)
    assert message in str(error.value)
