"""Checkpoints of the Qwen and Llama families: what `transformers` answers, round trips, shards, wrong files."""

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen_record
from close import EPS, roundings, same_gradient
from fresh import fresh
from safetensors import safe_open

from proxmo_jax.policy import weights
from proxmo_jax.policy.decoder import Policy, PolicyConfig
from proxmo_jax.policy.decoding import sample
from proxmo_jax.policy.model_config import read_config
from proxmo_jax.policy.sampling import Decoding
from proxmo_jax.policy.weights import load_weights, save_weights

TOKENS, LENGTHS = (np.asarray(x, np.int32) for x in qwen_record.prompts())


def batch_logits(params, config, tokens=TOKENS, lengths=LENGTHS):
    """Logits of a left-padded batch."""
    start = tokens.shape[1] - lengths
    slots = np.arange(tokens.shape[1])
    positions = np.maximum(slots[None] - start[:, None], 0)
    mask = (slots[None, None] >= start[:, None, None]) & (slots[None, None] <= slots[None, :, None])
    return np.asarray(jax.jit(Policy(config).apply)({"params": params}, tokens, positions, mask)[0])


@pytest.fixture(params=list(qwen_record.CASES))
def checkpoint(request):
    return qwen_record.FOLDER / request.param


def test_logits_equal_those_of_transformers(checkpoint):
    config = read_config(checkpoint)
    answers = np.load(checkpoint / "answers.npz")
    ours = batch_logits(load_weights(checkpoint, config), config)
    atol = 2 * roundings(config, 17) * EPS
    for row, length in enumerate(LENGTHS):  # what padding positions say is nobody's business
        np.testing.assert_allclose(ours[row, -length:], answers["logits"][row, -length:], rtol=0, atol=atol)


def test_greedy_answers_are_token_for_token_those_of_transformers(checkpoint):
    """The two likeliest tokens are at least 0.005 apart in all of these answers, and a logit is off by 2e-4 at most."""
    config = read_config(checkpoint)
    theirs = np.load(checkpoint / "answers.npz")["greedy"]
    drawn = sample(
        load_weights(checkpoint, config), TOKENS, LENGTHS, jax.random.key(0), jnp.float32(0.0),
        config=config, decoding=Decoding(theirs.shape[1], (5,)),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(drawn.tokens), theirs)


def test_a_round_trip_changes_nothing(checkpoint, tmp_path, monkeypatch):
    config = read_config(checkpoint)
    params = load_weights(checkpoint, config)
    one = save_weights(tmp_path / "one", params, config)
    assert [file.name for file in one] == ["model.safetensors"]
    monkeypatch.setattr(weights, "SHARD", 20_000)
    many = save_weights(tmp_path / "many", params, config)
    assert len(many) > 3
    for folder in ("one", "many"):
        assert read_config(tmp_path / folder) == config
        again = load_weights(tmp_path / folder, config)
        jax.tree.map(np.testing.assert_array_equal, params, again)
    with safe_open(checkpoint / "model.safetensors", "np") as a, safe_open(one[0], "np") as b:
        assert set(a.keys()) - {"lm_head.weight"} == set(b.keys()) - {"lm_head.weight"}
        for name in b.keys():  # noqa: SIM118
            np.testing.assert_array_equal(a.get_tensor(name), b.get_tensor(name))


def test_bfloat16_stays_close(checkpoint):
    config = read_config(checkpoint, dtype="bfloat16", param_dtype="bfloat16")
    params = load_weights(checkpoint, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    ours = batch_logits(params, config)
    assert ours.dtype == np.float32
    theirs = np.load(checkpoint / "answers.npz")["logits"]
    for row, length in enumerate(LENGTHS):
        assert np.abs(ours[row, -length:] - theirs[row, -length:]).mean() < 0.15


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_gradient(remat):
    gradients = []
    for kind in ("none", remat):
        config = PolicyConfig(vocab_size=40, hidden_size=32, intermediate_size=48, head_dim=8, remat=kind)
        params = fresh(PolicyConfig(vocab_size=40, hidden_size=32, intermediate_size=48, head_dim=8))
        tokens = np.random.default_rng(0).integers(0, 40, (2, 9))
        mask = np.tril(np.ones((2, 9, 9), bool))

        def loss(params, config=config, tokens=tokens, mask=mask):
            logits, _ = Policy(config).apply({"params": params}, tokens, np.tile(np.arange(9), (2, 1)), mask)
            return jnp.square(jax.nn.log_softmax(logits)).mean()

        gradients.append(jax.jit(jax.grad(loss))(params))
    same_gradient(gradients[1], gradients[0], 3 * roundings(config, 9) + 2 * 9)


def spoil_config(**changes):
    def spoil(folder):
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({k: v for k, v in {**data, **changes}.items() if v is not ...}))

    return spoil


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BROKEN = {
    "holds no config.json": lambda folder: (folder / "config.json").unlink(),
    "not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "architecture 'gemma' is not supported, need llama, mistral, qwen2, qwen3": spoil_config(model_type="gemma"),
    "model.layers.0.self_attn.k_proj.bias is left over": spoil_config(model_type="llama"),
    "has no 'hidden_size'": spoil_config(hidden_size=...),
    "has use_sliding_window": spoil_config(use_sliding_window=True),
    "rope_type 'longrope' is not supported": spoil_config(rope_parameters={"rope_type": "longrope"}),
    "holds no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "is truncated or no safetensors file": truncate,
    "model.layers.2.input_layernorm.weight is left over": spoil_config(num_hidden_layers=2),
    "model.layers.3.input_layernorm.weight is missing": spoil_config(num_hidden_layers=4),
    "has shape [64, 32], need [80, 32]": spoil_config(vocab_size=80),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_is_wrong_is_said(message, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(qwen_record.FOLDER / "qwen2", folder)
    BROKEN[message](folder)
    with pytest.raises(ValueError, match=r"model") as error:
        load_weights(folder, read_config(folder))
    assert message in str(error.value)
    assert str(folder) in str(error.value)


def test_older_names_for_positions_are_read(tmp_path):
    shutil.copytree(qwen_record.FOLDER / "qwen2_untied_yarn", tmp_path / "model")
    new = read_config(tmp_path / "model")
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    spoil_config(rope_parameters=..., rope_theta=10_000.0, rope_scaling=scaling)(tmp_path / "model")
    assert read_config(tmp_path / "model") == new


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "has attention_bias in a llama, need none"),
        ("llama", {"mlp_bias": True}, "has mlp_bias"),
        (
            "llama",
            {"sliding_window": 64},
            "has sliding_window 64, need null or at least its 128 max_position_embeddings",
        ),
        ("mistral", {"max_position_embeddings": 8192}, "has sliding_window 4096, need null or at least its 8192"),
        ("mistral", {"sliding_window": "4096"}, "has sliding_window '4096'"),
        (
            "llama",
            {"rope_scaling": {**qwen_record.LLAMA_3, "high_freq_factor": 1}},
            "has high_freq_factor 1, need more",
        ),
    ],
)
def test_what_would_compute_something_else_is_refused(tmp_path, kind, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(qwen_record.config_with(kind, changes)))
    with pytest.raises(ValueError, match=r"config\.json") as error:
        read_config(tmp_path)
    assert message in str(error.value)


def test_a_mistral_without_a_window_is_saved_as_a_llama(tmp_path):
    config = read_config(qwen_record.FOLDER / "mistral")
    save_weights(tmp_path, load_weights(qwen_record.FOLDER / "mistral", config), config)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (saved["model_type"], saved["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "sliding_window" not in saved


def test_biases_with_normalised_heads_are_not_saved(tmp_path):
    config = PolicyConfig(vocab_size=40, qkv_bias=True, qk_norm=True)
    with pytest.raises(ValueError, match="no Llama, no Qwen2 and no Qwen3"):
        save_weights(tmp_path, {}, config)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_transformers_loads_what_we_save(checkpoint, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(checkpoint)
    save_weights(tmp_path, load_weights(checkpoint, config), config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    mask = torch.arange(17)[None] >= torch.tensor(17 - LENGTHS)[:, None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS).long(), attention_mask=mask, position_ids=positions).logits.numpy()
    theirs = np.load(checkpoint / "answers.npz")["logits"]
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row, -length:], theirs[row, -length:], rtol=1e-5, atol=1e-5)
