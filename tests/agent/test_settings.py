"""Settings that cannot work are refused in one sentence; how a mini-batch is cut up; what a resumed run takes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from nested import config_with

from proxmo_jax import cli
from proxmo_jax.agent import train
from proxmo_jax.agent.loop import learning_rate_share
from proxmo_jax.agent.player import batch_bucket
from proxmo_jax.agent.run_files import RECIPES, default, flat, of_another_run, open_folder, resumed, stored_config
from proxmo_jax.agent.settings import (
    Config,
    EnvSettings,
    RolloutSettings,
    check,
    check_devices,
    check_estimator,
    for_playing,
    has_warm_start,
    micro_batches,
    of_preset,
    small_policy,
    warm_steps,
)
from proxmo_jax.agent.warm_start import needs_demonstrations, refuse_missing_demonstrations
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.presets import PRESETS
from proxmo_jax.policy.decoder import init_params
from proxmo_jax.policy.sharding import make_mesh, parameter_shardings

HERE = Path(__file__).parents[1]
FLOATS = [name for name, value in flat(Config()).items() if isinstance(value, float)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__lora_rank": 4}, "--model.lora-rank needs a --model"),
        ({"model__lora_rank": -1}, "--model.lora-rank must be at least 0, got -1"),
        ({"model__lora_alpha": 0.0}, "--model.lora-alpha must be above 0"),
        ({"rollout__max_num_seqs": 12}, "--rollout.max-num-seqs must be a multiple of the 8 devices"),
        (
            {"model__attention": "splash"},
            "--optimizer.row-length must be a multiple of 128 for --model.attention splash, got 160",
        ),
        ({"optimizer__micro_batch_tokens": 0}, "--optimizer.micro-batch-tokens must be at least 1"),
        ({"optimizer__rows_per_batch": 12}, "--optimizer.rows-per-batch must be a multiple of the 8 devices"),
        *(
            ({"model__hidden_size": n}, f"--model.hidden-size must be a multiple of 32, got {n}")
            for n in (1, 16, 30, 80)
        ),
        ({"model__hidden_size": 0}, "--model.hidden-size must be at least 1"),
        (
            {"model__hidden_size": 32, "mesh__tensor": 2},
            "--model.hidden-size must be a multiple of 32 x --mesh.tensor 2, got 32",
        ),
        (
            {"model__hidden_size": 36, "mesh__fsdp": 8},
            "--model.hidden-size must be a multiple of --mesh.fsdp 8, got 36",
        ),
        ({"mesh__fsdp": 0}, "--mesh.fsdp must be at least 1"),
        ({"mesh__tensor": 3}, "--mesh.fsdp 1 x --mesh.tensor 3 must divide the 8 devices"),
        ({"model__layers": 0}, "--model.layers must be at least 1, got 0"),
        ({"optimizer__learning_rate": -1.0}, "--optimizer.learning-rate must be above 0, got -1"),
        ({"optimizer__learning_rate": 0.0}, "--optimizer.learning-rate must be above 0, got 0"),
        ({"warm_start__learning_rate": 0.0}, "--warm-start.learning-rate must be above 0"),
        ({"optimizer__weight_decay": -0.1}, "--optimizer.weight-decay must be at least 0, got -0.1"),
        ({"optimizer__max_grad_norm": 0.0}, "--optimizer.max-grad-norm must be above 0"),
        ({"loss__kl_coef": -0.01}, "--loss.kl-coef must be at least 0"),
        ({"loss__entropy_coef": -0.01}, "--loss.entropy-coef must be at least 0"),
        ({"estimator__invalid_penalty": -1.0}, "invalid_penalty must be"),
        ({"env__reward_scale": 0.0}, "--env.reward-scale must be above 0"),
        ({"loss__clip": 0.0}, "--loss.clip must be above 0"),
        ({"loss__clip": 1.5}, "--loss.clip must lie between 0 and 1, got 1.5"),
        (
            {"loss__importance_cap": 2.0},
            "--loss.importance-cap 2 needs --loss.old-log-probs trainer, whose log-probs it compares",
        ),
        ({"loss__importance_cap": -1.0}, "--loss.importance-cap must be at least 0, got -1"),
        ({"loss__clip_high": -0.1}, "--loss.clip-high must be at least 0"),
        ({"loss__dual_clip": 1.0}, "--loss.dual-clip must be above 1"),
        ({"output__eval_temperature": -0.4}, "--output.eval-temperature must be at least 0"),
        ({"rollout__temperature": 0.0}, "--rollout.temperature must be above 0"),
        ({"rollout__top_k": -1}, "--rollout.top-k must be at least 0"),
        ({"rollout__top_p": 0.0}, "--rollout.top-p must be above 0 and at most 1, got 0"),
        ({"seed": -1}, "--seed must be at least 0 and below 4294967296, got -1"),
        ({"seed": 1 << 32}, "--seed must be at least 0 and below 4294967296"),
        ({"optimizer__decay_iterations": -1}, "--optimizer.decay-iterations must be at least 0"),
        ({"rollout__max_prompt_length": 0}, "--rollout.max-prompt-length must be at least 1"),
        ({"optimizer__row_length": 135}, "--optimizer.row-length must hold a whole turn, at least 136 tokens; got 135"),
        ({"optimizer__response_share": 1.5}, "--optimizer.response-share must lie between 0 and 1"),
        ({"rollout__stop": ("x",)}, "--rollout.stop needs a --model"),
        ({"model__dtype": "bfloat16"}, "--model.dtype needs a --model"),
        ({"model__remat": "full"}, "--model.remat needs a --model"),
        ({"model__path": "x", "warm_start__from_run": Path("/nowhere")}, "/nowhere holds no warm start"),
        ({"warm_start__steps": 0}, "--warm-start.steps 0 needs a --model"),
        ({"warm_start__from_run": Path("/nowhere")}, "--warm-start.from-run: /nowhere holds no warm start"),
        *(({name.replace(".", "__"): value}, "got") for name in FLOATS for value in (float("nan"), float("inf"))),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check(config_with(**options))
    assert message in str(error.value)


@pytest.mark.parametrize("size", [32, 40, 48, 64, 96, 128, 160])
def test_hidden_sizes_that_work_are_accepted(size):
    """Every size that is accepted can be made."""
    check(config_with(model__hidden_size=size))
    params = jax.eval_shape(
        lambda: init_params(small_policy(config_with(model__hidden_size=size), 40), jax.random.key(0))
    )
    assert params["embedding"].shape == (64, size)


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (2, 2), (8, 1), (1, 8), (4, 2)])
def test_what_is_accepted_can_be_laid_out(fsdp, tensor):
    for size in range(16, 272, 8):
        try:
            config = config_with(model__hidden_size=size, mesh__fsdp=fsdp, mesh__tensor=tensor)
            check(config)
        except UserError:
            continue
        parameter_shardings(make_mesh(0, fsdp, tensor), small_policy(config, 77))
    check(config_with(model__hidden_size=256, mesh__fsdp=fsdp, mesh__tensor=tensor))


def test_a_warm_start_of_another_shape_is_refused(tmp_path):
    (tmp_path / "warm_start").mkdir()
    stored = {"hidden_size": 64, "num_hidden_layers": 3}
    (tmp_path / "warm_start" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"--model\.layers must be 3, as in --warm-start\.from-run, got 2"):
        check(config_with(warm_start__from_run=tmp_path))
    check(config_with(warm_start__from_run=tmp_path, model__layers=3))
    check(config_with(output__dir=tmp_path, warm_start__from_run=Path("/gone"), model__layers=3))  # it has been taken


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
        with pytest.raises(
            UserError, match=f"--optimizer.rows-per-batch must be a multiple of the {count} devices, got {rows}"
        ):
            check_devices(config_with(optimizer__rows_per_batch=rows), count)
    check_devices(config_with(optimizer__rows_per_batch=36, rollout__num_groups=16), 6)
    check_devices(config_with(optimizer__rows_per_batch=32, rollout__num_groups=3), 32)


EPISODES = """
import sys, tempfile
import jax, jax.numpy as jnp, numpy as np
from nested import config_with
from scripted import ScriptedPool, say, small_player
from proxmo_jax.agent.rollout import collect
from proxmo_jax.agent.settings import check
from proxmo_jax.agent.batches import batches
from proxmo_jax.training.buffers import Buffer
from proxmo_jax.policy.decoder import init_params
from proxmo_jax.policy.sharding import make_mesh, replicate
count = int(sys.argv[1])
assert jax.device_count() == count
config = config_with(
    optimizer__rows_per_batch=count, rollout__num_groups=1, rollout__group_size=5, rollout__max_turns=3,
    rollout__max_prompt_length=64, rollout__max_response_length=2,
)
check(config)
mesh = make_mesh()
player = small_player(tempfile.mkdtemp(), mesh)
params = replicate(mesh, init_params(player.config, jax.random.key(0)))
buffer = replicate(mesh, Buffer.empty(1, 5, 3, prompt=64, response=2, words=16))
pool = ScriptedPool(lambda slot, attempt, turn: say(f"turn {turn}", done=slot < turn))
with jax.set_mesh(mesh):
    played = collect(player, params, pool, ["x"] * 5, jax.random.key(1), temperature=1.0, buffer=buffer)
    assert played.finished.all()
    turns, zero = played.prompt_lengths > 0, jnp.zeros((5, 3))
    found = batches(config, mesh, played, turns, zero, np.random.default_rng(0))
    shapes = {rows.tokens.shape for rows in found}
assert shapes == {(count, config.optimizer.row_length)}
"""


@pytest.mark.slow
def test_a_few_episodes_on_a_number_of_devices_that_divides_none_of_them():
    count = 6
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
        sizes = {
            "optimizer__row_length": row_length,
            "optimizer__micro_batch_tokens": budget,
            "rollout__max_prompt_length": 64,
        }
        assert micro_batches(config_with(optimizer__rows_per_batch=rows, **sizes)) == parts
        assert micro_batches(config_with(optimizer__rows_per_batch=rows // 2, mesh__tensor=2, **sizes)) == parts


def test_a_run_of_another_version_is_not_resumed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"iterations": 1, "method": "proxmo", "groups": 8}))
    with pytest.raises(UserError, match=r"was written by proxmo-jax 0\.1, whose settings had no parts"):
        stored_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"iterations": 1, "rollout": {"colour": 1}}))
    with pytest.raises(UserError, match=r"sets rollout\.colour, which is no setting of train"):
        stored_config(tmp_path)


def longer(run, iterations):
    return resumed(dataclasses.replace(stored_config(run), iterations=iterations))[0]


def write_run(folder, config):
    open_folder(dataclasses.replace(config, resume=True, output=dataclasses.replace(config.output, dir=folder)))
    return folder


def test_a_longer_run_keeps_the_rate_it_has_come_to(tmp_path):
    planned = config_with(iterations=50, optimizer__final_rate=0.05)
    shares = [learning_rate_share(planned, i) for i in range(1, 51)]
    assert shares[0] == 1
    assert shares[-1] == pytest.approx(0.05)
    assert shares == sorted(shares, reverse=True)
    run = write_run(tmp_path / "run", planned)
    once = longer(run, 100)
    write_run(run, once)
    again = longer(run, 200)
    assert (once.iterations, again.iterations, again.optimizer.decay_iterations) == (100, 200, 50)
    assert [learning_rate_share(again, i) for i in range(1, 51)] == shares
    assert {learning_rate_share(again, i) for i in range(51, 201)} == {shares[-1]}
    assert longer(run, 20).iterations == 100  # no run is made shorter
    still = write_run(tmp_path / "still", config_with(iterations=50, optimizer__final_rate=0.0))
    with pytest.raises(UserError, match=r"--iterations 100: with --optimizer\.final-rate 0 the run learns nothing"):
        longer(still, 100)
    assert longer(still, 50).iterations == 50


@pytest.fixture
def resume(tmp_path, monkeypatch):
    """The settings of `proxmo train --resume` with some options, and what it ignores of them."""
    stop = {"model__path": "m", "rollout__stop": ("</action>",)}
    run = write_run(tmp_path / "run", config_with(iterations=7, optimizer__learning_rate=1e-3, **stop))

    def resume(*options):
        given = []
        monkeypatch.setattr(train, "main", given.append)
        assert cli.main(["train", "--resume", "--out", str(run), *options]) == 0
        return resumed(given[0])

    return resume


def test_a_resumed_run_names_what_it_does_not_take(resume, tmp_path):
    config, ignored = resume()
    assert (config.iterations, config.optimizer.learning_rate, config.rollout.stop) == (7, 1e-3, ("</action>",))
    assert ignored == []
    config, ignored = resume("--optimizer.learning-rate", "123", "--preset=grpo", "--rollout.no-list-actions")
    assert (config.preset, config.optimizer.learning_rate, config.rollout.list_actions) == ("proxmo", 1e-3, True)
    assert ignored == [
        "--preset grpo (the run has proxmo)",
        "--rollout.list-actions False (the run has True)",
        "--optimizer.learning-rate 123.0 (the run has 0.001)",
    ]
    assert resume("--optimizer.learning-rate", "0.001", "--preset", "proxmo")[1] == []  # what it has anyway
    config, ignored = resume("--iterations", "9")
    assert (config.iterations, ignored) == (9, [])
    config, ignored = resume("--iterations", "5")
    assert (config.iterations, ignored) == (7, ["--iterations 5 (the run has 7)"])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("iterations = 40\nseed = 3\n")
    config, ignored = resume("--config", str(recipe))
    assert (config.iterations, config.seed, ignored) == (7, 0, ["--seed 3 (the run has 0)"])
    config, ignored = resume("--mesh.fsdp", "2", "--output.keep", "5", "--env.workers", "3")  # where it runs is free
    assert (config.mesh.fsdp, config.output.keep, config.env.workers, ignored) == (2, 5, 3, [])
    elsewhere = {"settings": json.loads(json.dumps(flat(config), default=str))}
    assert of_another_run(resume()[0], elsewhere) == of_another_run(config, {}) == ""
    elsewhere["settings"]["loss.clip"] = 0.1
    assert of_another_run(config, elsewhere) == "--loss.clip 0.1 instead of 0.2"
    assert resume("--env", "household")[1] == []
    assert resume("--env", "shop")[1] == ["--env.name shop (the run has household)"]  # its recipe is not asked for


def from_recipe(folder, text, *options):
    path = folder / "recipe.toml"
    path.write_text(text)
    return default(["--config", str(path), *options])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ('[model]\npath = "m"\n[rollout]\nstop = ["</action>", "x"]', "rollout.stop", ("</action>", "x")),
        ("[rollout]\nstop = []", "rollout.stop", ()),
        ("[optimizer]\nlearning_rate = 1", "optimizer.learning_rate", 1.0),
        ("[optimizer]\nlearning-rate = 1e-4", "optimizer.learning_rate", 1e-4),
        ('[env]\ndata = "games"', "env.data", Path("games")),
        ('[env]\ndata = ""', "env.data", None),
        ('[output]\ndir = "runs/x"', "output.dir", Path("runs/x")),
        ("[rollout]\nlist_actions = false", "rollout.list_actions", False),
        ("[rollout]\nnum_groups = 4", "rollout.num_groups", 4),
        ('[model]\npath = ""', "model.path", ""),
        ("[estimator]\ntemperature = 0.3", "estimator.temperature", 0.3),
        ('preset = "gigpo"', "estimator.aggregation", "hard"),
        ("", "estimator.invalid_penalty", 1.5),
    ],
)
def test_recipes_say_in_toml_what_settings_are(tmp_path, text, name, value):
    found = flat(from_recipe(tmp_path, text))[name]
    assert (found, type(found)) == (value, type(value))


def test_the_command_line_wins_over_the_recipe(tmp_path):
    config = from_recipe(tmp_path, 'preset = "gigpo"\n[estimator]\ndiscount = 0.9', "--preset", "grpo")
    assert (config.preset, config.estimator.aggregation, config.estimator.discount) == ("grpo", "none", 0.9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[rollout]\nstop = "x"', "rollout.stop: input should be a valid array, got 'x'"),
        ("[rollout]\nstop = [1]", "rollout.stop.0: input should be a valid string, got 1"),
        ("[rollout]\nnum_groups = 4.0", "rollout.num_groups: input should be a valid integer, got 4.0"),
        ("[rollout]\nnum_groups = true", "rollout.num_groups: input should be a valid integer, got True"),
        ("[optimizer]\nlearning_rate = true", "optimizer.learning_rate: input should be a valid number, got True"),
        ("[optimizer]\nlearning_rate = nan", "--optimizer.learning-rate must be above 0, got nan"),
        ('[optimizer]\nlearning_rate = "1e-4"', "optimizer.learning_rate: input should be a valid number, got '1e-4'"),
        ("[rollout]\nlist_actions = 1", "rollout.list_actions: input should be a valid boolean, got 1"),
        ("[model]\npath = 3", "model.path: input should be a valid string, got 3"),
        ("[env]\ndata = 3", "env.data: input should be a valid string, got 3"),
        ("[rollout]\ngroup_size = 1", "--rollout.group-size must be at least 2, got 1"),
        ('[loss]\nold_log_probs = "both"', "loss.old_log_probs: input should be 'sampler' or 'trainer', got 'both'"),
        ('preset = "sarsa"', "--preset must be one of grpo"),
        ("resume = true", "sets resume, which belongs on the command line"),
        ("[rollout]\nmax_turns = 3\nmax-turns = 4", "sets max_turns twice"),
        ("[train]\ngroups = 4", "sets train, which is no setting of train"),
        ("groups = 4", "sets groups, which is no setting of train"),
        ("rollout = 4", "rollout: input should be an object, got 4"),
    ],
)
def test_recipes_that_are_wrong(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        from_recipe(tmp_path, text)
    assert message in str(error.value)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_every_recipe_is_read(recipe):
    default(["--config", recipe])


@pytest.mark.parametrize(
    ("preset", "knobs", "message"),
    [
        ("empg", {}, "--preset empg needs the entropy of each response"),
        ("gagpo", {"values_over": "batch"}, "--estimator.values-over must be group"),
        ("graphgpo", {"aggregation": "similar"}, "--estimator.aggregation must be hard or soft with score distance"),
        ("g2po", {"success_reward": 1.0}, "--estimator.success-reward must be --env.reward-scale, 10"),
    ],
)
def test_estimators_that_a_rollout_cannot_serve(preset, knobs, message):
    with pytest.raises(UserError, match=message):
        check_estimator(PRESETS[preset](**knobs), EnvSettings())


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"empg"}))
def test_estimators_that_a_rollout_serves(preset):
    check_estimator(PRESETS[preset](), EnvSettings())


def test_scores_need_an_environment_that_has_them():
    with pytest.raises(UserError, match=r"--env\.reward score needs an environment with scores"):
        check(config_with(env__reward="score"))
    check(config_with(env__reward="score", env__name="shop"))


@pytest.mark.parametrize("preset", ["g2po", "graphgpo"])
def test_a_penalty_must_not_hide_that_the_goal_was_reached(preset):
    config = of_preset(preset, rollout=RolloutSettings(overlong="penalise", overlong_buffer=2))
    with pytest.raises(UserError, match=r"--rollout\.overlong penalise changes the rewards by which score"):
        check(config)
    check(of_preset("gagpo", rollout=RolloutSettings(overlong="penalise", overlong_buffer=2)))


def test_a_run_is_played_on_other_devices_than_it_was_trained_on():
    trained = config_with(mesh__fsdp=4, mesh__tensor=2, optimizer__rows_per_batch=32, rollout__max_num_seqs=8)
    for count, fsdp, rows, together in ((8, 4, 32, 8), (1, 1, 32, 8), (6, 1, 36, 12)):
        config = for_playing(trained, count)
        check_devices(config, count)
        found = config.mesh.fsdp, config.optimizer.rows_per_batch, config.rollout.max_num_seqs
        assert found == (fsdp, rows, together)


def test_demonstrations_are_read_only_by_a_run_that_needs_them(tmp_path):
    config = config_with(output__dir=tmp_path, warm_start__demonstrations=tmp_path / "gone.jsonl")
    assert needs_demonstrations(config)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").touch()
    assert needs_demonstrations(config)
    (tmp_path / "warm_start").mkdir()
    (tmp_path / "warm_start" / "config.json").touch()
    assert not needs_demonstrations(config)
    refuse_missing_demonstrations(config)
    assert not needs_demonstrations(config_with(warm_start__from_run=tmp_path))


def test_a_warm_start_of_another_rank_is_refused(tmp_path):
    (tmp_path / "warm_start").mkdir()
    (tmp_path / "warm_start" / "config.json").write_text('{"lora_rank": 8}')
    config = config_with(model__path="x", model__lora_rank=16, warm_start__from_run=tmp_path)
    with pytest.raises(UserError, match=r"lora-rank must be 8, as in --warm-start\.from-run, got 16"):
        check(config)


def test_a_small_policy_begins_with_a_warm_start_and_a_language_model_may():
    assert (warm_steps(config_with()), has_warm_start(config_with())) == (1500, True)
    model = {"model__path": "x"}
    assert (warm_steps(config_with(**model)), has_warm_start(config_with(**model))) == (0, False)
    assert warm_steps(config_with(**model, warm_start__steps=7)) == 7
    assert has_warm_start(config_with(**model, warm_start__from_run=Path("y")))
