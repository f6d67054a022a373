"""A language model trained end to end, exported, and what is said of models that do not fit."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from nested import config_with
from test_train import proxmo
from tiny_model import write_tiny_model

from proxmo_jax import cli
from proxmo_jax.agent.make_player import chat, language_player, make_player
from proxmo_jax.agent.report import read_metrics
from proxmo_jax.agent.run_files import default
from proxmo_jax.agent.settings import check
from proxmo_jax.policy.model_config import read_config
from proxmo_jax.policy.sharding import make_mesh
from proxmo_jax.policy.weights import load_weights

RUN = (
    "--rollout.prompt notes --env.train-games 6 --env.eval-games 2 --rollout.num-groups 2 --rollout.group-size 2"
    " --rollout.max-turns 2 --rollout.max-prompt-length 500 --rollout.max-response-length 12"
    " --optimizer.row-length 512 --optimizer.rows-per-batch 2 --optimizer.micro-batch-tokens 1024"
    " --rollout.max-num-seqs 2 --env.workers 1 --output.eval-every 2 --output.save-every 1 --output.no-page"
    " --rollout.stop </action> --rollout.top-k 50"
).split()
SMALLER = "--model.dtype bfloat16 --model.remat full --optimizer.moments-dtype bfloat16".split()
ADAPTERS = (
    "--model.lora-rank 4 --optimizer.learning-rate 0.01 --loss.old-log-probs trainer --loss.kl-coef 0"
    " --model.attention splash --warm-start.steps 2 --rollout.max-response-length 48 --optimizer.row-length 640"
    " --optimizer.micro-batch-tokens 1280"
).split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder)
    return folder


@pytest.mark.slow
def test_a_language_model_is_trained_resumed_evaluated_and_exported(model, tmp_path, capsys):
    """Adapters, in bfloat16; a policy whose parameters are all trained is `test_train.py`'s subject."""
    out = tmp_path / "run"
    done = proxmo("train", "--model", str(model), "--out", str(out), "--iterations", "1", *RUN, *ADAPTERS, *SMALLER)
    assert done.returncode == 0, done.stderr
    assert "warm start: 0 of 2" in done.stdout
    assert (out / "warm_start").exists()
    done = proxmo("train", "--resume", "--out", str(out), "--iterations", "2")
    assert done.returncode == 0, done.stderr
    assert [row["iteration"] for row in read_metrics(out / "metrics.jsonl")] == [0, 1, 2]
    done = proxmo("export", str(out), str(tmp_path / "policy"), "--checkpoint", "best")  # of equals the newest
    assert done.returncode == 0, done.stderr
    assert "iteration 2" in done.stdout
    config = read_config(tmp_path / "policy")
    assert config == read_config(model)
    before, after = load_weights(model, config), load_weights(tmp_path / "policy", config)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1
    assert moved["embedding"] == moved["layers"]["query"]["bias"] == 0
    assert moved["layers"]["query"]["kernel"] > 0
    again = proxmo("eval", str(out), "--games", "2")  # the program that training evaluated with
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "eval.json").read_text(encoding="utf-8"))["iteration"] == 2
    assert cli.main(["export", str(out), str(tmp_path / "policy")]) == 2
    assert "is in use; name a new folder" in capsys.readouterr().err


def test_a_model_that_is_not_there_leaves_no_folder(tmp_path, capsys):
    options = ["--model", str(tmp_path / "absent"), "--out", str(tmp_path / "run")]
    assert cli.main(["train", *options]) == 2
    assert "absent is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_prompts_go_through_the_models_own_template(model):
    player = language_player(config_with(model__path=str(model)), make_mesh(devices=jax.devices()[:1]))
    assert chat(player.tokenizer, "go") == "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"
    ids = player.tokenizer.encode(player.render("go"), add_special_tokens=False)
    assert ids[0] == 257  # the template's tokens are special ones, not letters
    assert player.decoding.stop_ids == (256, 258)
    player.tokenizer.chat_template = None
    assert chat(player.tokenizer, "go") == "go"


def spoil(name, change):
    def apply(folder):
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**data, **change}))

    return apply


@pytest.mark.parametrize(
    ("harm", "options", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), {}, "holds no tokenizer"),
        (lambda f: (f / "model.safetensors").unlink(), {}, "holds no weights"),
        (spoil("config.json", {"vocab_size": 100}), {}, "has 259 tokens, need at most the 100 of its vocab_size"),
        (
            None,
            {"rollout__max_prompt_length": 40_000, "optimizer__row_length": 50_000},
            "add up to 40008, need at most the model's 32768",
        ),
        (None, {"mesh__tensor": 8}, "does not divide heads 4 by tensor 8, kv_heads 2 by tensor 8"),
        (None, {"model__path": "/nowhere/at/all"}, "--model: /nowhere/at/all is not a folder"),
    ],
)
def test_models_that_do_not_fit_are_refused(model, tmp_path, harm, options, message):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    if harm:
        harm(folder)
    config = config_with(**{"model__path": str(folder), **options})
    mesh = make_mesh(0, config.mesh.fsdp, config.mesh.tensor)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make_player(config, mesh)
    assert message in str(error.value)


@pytest.mark.parametrize("size", ["1.5b", "7b"])
@pytest.mark.parametrize(("env", "turns", "prompt"), [("alfworld", 50, 2048), ("webshop", 15, 4096)])
def test_recipes_are_loaded_by_name(env, turns, prompt, size, tmp_path, monkeypatch):
    """The published constants; everything else of them is the check's to refuse."""
    (tmp_path / "train").mkdir()
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    config = default(["--config", f"{env}_qwen2.5_{size}"])
    assert (config.rollout.num_groups, config.rollout.group_size, config.rollout.max_turns, config.iterations) == (
        16,
        8,
        turns,
        150,
    )
    assert (config.optimizer.learning_rate, config.optimizer.final_rate, config.loss.kl_coef, config.loss.clip) == (
        1e-6,
        1.0,
        0.01,
        0.2,
    )
    assert (config.rollout.max_prompt_length, config.rollout.max_response_length, config.rollout.history) == (
        prompt,
        512,
        2,
    )
    assert config.model.path == f"Qwen/Qwen2.5-{size.upper()}-Instruct"
    check(config)  # on the tests' eight devices
