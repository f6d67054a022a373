"""Odd files of models: what `transformers` makes of them, and which file is named where nothing can be made of it."""

import json
import shutil

import jax
import numpy as np
import pytest
import qwen_record
from nested import config_with
from safetensors.numpy import load_file, save_file
from test_language_model import spoil
from tiny_model import TEMPLATE, write_tiny_model

from envs_bridge.actions import project
from proxmo_jax.agent import check_model
from proxmo_jax.agent.chat import chat, settings_of, template_arguments
from proxmo_jax.agent.make_player import language_player
from proxmo_jax.agent.run_files import default
from proxmo_jax.agent.settings import check
from proxmo_jax.policy import weights
from proxmo_jax.policy.decoder import PolicyConfig, Rope, init_params
from proxmo_jax.policy.model_config import hugging_face_config, read_config
from proxmo_jax.policy.sharding import make_mesh
from proxmo_jax.policy.tokenizer import build_word_tokenizer, load_tokenizer
from proxmo_jax.policy.weights import load_weights, save_weights

POSITIONS = json.loads((qwen_record.FOLDER / "positions.json").read_text(encoding="utf-8"))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def config_of(tmp_path, kind="qwen2", **changes):
    (tmp_path / "config.json").write_text(json.dumps(qwen_record.config_with(kind, changes)))
    return read_config(tmp_path)


# --- config.json


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("name", qwen_record.POSITIONS)
def test_configs_are_read_as_transformers_reads_them(tmp_path, kind, name):
    theirs = POSITIONS[kind][name]
    if theirs is None or name == "by layer, none":  # which a llama there reads as plain positions
        with pytest.raises(ValueError, match=r"config\.json"):
            config_of(tmp_path, kind, **qwen_record.POSITIONS[name])
        return
    config = config_of(tmp_path, kind, **qwen_record.POSITIONS[name])
    frequencies, scale = config.rope.frequencies(config.head_dim)
    np.testing.assert_allclose(frequencies[:: len(frequencies) // 8], theirs["frequencies"], rtol=1e-5)  # float32 there
    assert scale == pytest.approx(theirs["scale"], rel=1e-12)
    assert (config.head_dim, config.num_key_value_heads) == (theirs["head_dim"], theirs["kv_heads"])


def test_what_no_qwen_of_transformers_reads_but_says_clearly_what_it_is(tmp_path):
    by_layer = {"full_attention": {"rope_type": "default", "rope_theta": 5e5}, "sliding_attention": None}
    assert config_of(tmp_path, rope_parameters=by_layer).rope == Rope(5e5)
    by_layer = {"full_attention": YARN}
    assert config_of(tmp_path, rope_parameters=by_layer, rope_theta=7e5).rope == Rope(7e5, "yarn", 4.0, 32)
    # Without a factor it is how much longer texts became (128 / 32).
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 32}
    assert config_of(tmp_path, rope_scaling=scaling).rope == Rope(1e4, "yarn", 4.0, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type 'mrope' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1}}, "high_freq_factor None, need a number"),
        ({"rope_scaling": {**YARN, "ramp": 3}}, "rotary parameters ramp, which are not known"),
        ({"rope_parameters": {"full_attention": YARN, "factor": 2}}, "rotary parameters full_attention"),
        ({"rope_scaling": "yarn"}, "rotary parameters 'yarn', need an object"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "factor '4', need a number of more than 0"),
        ({"rope_scaling": {**YARN, "factor": float("nan")}}, "factor nan, need a number"),
        ({"rope_theta": 0}, "rope_theta 0, need a number of more than 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, need 1"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5, need 1"),
        ({"rotary_pct": 0.25}, "rotary_pct, which may change what is computed"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping, which may change"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config, which may change"),
        ({"mlp_bias": True}, "mlp_bias, which may change"),
        ({"layer_types": ["sliding_attention"]}, "layer_types other than full_attention"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', need silu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ({"num_attention_heads": 3, "head_dim": 16}, "3 num_attention_heads, need a multiple of its 2"),
        ({"num_attention_heads": 2, "hidden_size": 66}, "head_dim 33, need an even number"),
        ({"num_hidden_layers": True}, "num_hidden_layers True, need a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1, need a whole number"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=r"config\.json") as error:
        config_of(tmp_path, **changes)
    assert message in str(error.value)


def test_settings_that_change_nothing_are_left_alone(tmp_path):
    plain = config_of(tmp_path)
    real = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "sliding_window": 4096,
        "max_window_layers": 28, "use_sliding_window": False, "use_mrope": False, "rope_scaling": None,
        "_attn_implementation_autoset": True,
        "attn_implementation": "sdpa", "unsloth_fixed": True, "torch_dtype": "bfloat16", "use_cache": True,
        "layer_types": ["attention"], "mlp_bias": False, "quantization_config": None, "hidden_act": "swish",
    }  # fmt: skip
    assert config_of(tmp_path, **real) == plain
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"holds \[1\], need an object"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(1e6),
        Rope(1e6, "linear", 2.0),
        Rope(1e6, "yarn", 4.0, 32, attention_factor=1.25, truncate=False),
    ],
)
def test_a_saved_config_says_its_positions_in_both_generations_of_names(tmp_path, rope):
    config = PolicyConfig(vocab_size=40, rope=rope, param_dtype="bfloat16")
    saved = hugging_face_config(config)
    assert (saved["rope_theta"], saved["torch_dtype"], saved["dtype"]) == (1e6, "bfloat16", "bfloat16")
    for missing in (["rope_parameters"], ["rope_theta", "rope_scaling"]):  # what one of the generations does not read
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in saved.items() if k not in missing}))
        assert read_config(tmp_path).rope == rope
    # transformers 4 takes a theta from beside the scaling alone, and knows no scaling of the default kind.
    scaling = saved["rope_scaling"]
    assert scaling is None if rope.kind == "default" else "rope_theta" not in scaling


# --- weights


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A checkpoint in several files, its parameters, and how to change a file."""
    config = PolicyConfig(vocab_size=40, hidden_size=32, intermediate_size=48, head_dim=8)
    params = init_params(config, jax.random.key(0))
    monkeypatch.setattr(weights, "SHARD", 20_000)
    folder = tmp_path / "model"
    assert len(save_weights(folder, params, config)) > 1
    return folder, config, params


def same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def tensors(folder) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]


def test_the_index_decides_which_file_a_tensor_is_of(shards):
    folder, config, params = shards
    first, *_, last = sorted(set(tensors(folder).values()))
    for stale, fresh in ((first, last), (last, first)):  # whichever is opened later
        name = next(name for name, file in tensors(folder).items() if file == fresh)
        held = load_file(folder / stale)
        save_file(
            {**held, name: np.zeros_like(load_file(folder / fresh)[name]), "stray.weight": np.ones(3)}, folder / stale
        )
        assert same(load_weights(folder, config), params)


def test_one_file_comes_before_an_index_and_others_are_left_alone(shards):
    folder, config, params = shards
    save_file({"base_model.lora_A.weight": np.ones(3, np.float32)}, folder / "adapter_model.safetensors")
    (folder / "consolidated.safetensors").write_bytes(b"junk")
    assert same(load_weights(folder, config), params)
    newer = init_params(config, jax.random.key(1))
    weights.SHARD = 1 << 30  # the fixture puts it back
    save_weights(folder, newer, config)
    assert (folder / "model.safetensors.index.json").is_file()
    assert same(load_weights(folder, config), newer)


def test_shards_that_are_wrong_are_named(shards):
    folder, config, _ = shards
    shard = sorted(set(tensors(folder).values()))[1]
    held = load_file(folder / shard)
    name = sorted(held)[0]

    def refused(message):
        with pytest.raises(ValueError, match="model") as error:
            load_weights(folder, config)
        assert message in str(error.value)
        assert str(folder) in str(error.value)

    save_file({k: v for k, v in held.items() if k != name} | {"another": np.ones(2)}, folder / shard)
    refused(f"{shard}: lacks {name}")
    save_file({k: v.astype(np.int8) for k, v in held.items()}, folder / shard)
    refused("has type I8, need one of BF16, F16, F32, F64")
    save_file(held, folder / shard)
    (folder / shard).write_bytes((folder / shard).read_bytes()[:-10])
    refused(f"{shard}: is truncated")
    (folder / shard).unlink()
    refused(f"lacks {shard}, which its index names")
    index = folder / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'):
        index.write_text(text)
        refused("model.safetensors.index.json")
    index.unlink()
    refused("holds no weights")
    refused("but model-0")


# --- tokenizer, chat template, and what ends an answer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder)
    return folder


@pytest.fixture
def model(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


def player_of(folder, **options):
    return language_player(config_with(model__path=str(folder), **options), make_mesh(devices=jax.devices()[:1]))


CUT = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
FILLED = {
    "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 256, "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", {"truncation": CUT}),
        ("tokenizer.json", {"padding": FILLED}),
        ("tokenizer.json", {"padding": {**FILLED, "strategy": "BatchLongest"}}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("tokenizer_config.json", {"model_max_length": 16}),
    ],
)
def test_a_prompt_is_read_whole_however_the_tokenizer_was_saved(model, file, change):
    texts = [chat(player_of(model).tokenizer, text) for text in ("go " * 100, "go")]
    plain = player_of(model).tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    spoil(file, change)(model)
    tokenizer = player_of(model).tokenizer
    for _ in range(2):  # the tokenizer's own way of encoding sets what the next text is read with
        rows = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        assert [row.ids for row in rows] == [row.ids for row in plain]
        assert tokenizer.encode(texts[0], add_special_tokens=False) == plain[0].ids


def test_a_runs_own_tokenizer_is_read_whole_too(tmp_path):
    build_word_tokenizer(["go to desk 1"], tmp_path)
    plain = load_tokenizer(tmp_path).encode("go to desk 1")
    spoil("tokenizer.json", {"truncation": {**CUT, "max_length": 2}, "padding": {**FILLED, "pad_id": 0}})(tmp_path)
    assert load_tokenizer(tmp_path).backend_tokenizer.encode("go to desk 1").ids == plain


def template(opening: str) -> str:
    assert TEMPLATE.count("assistant\n") == 1
    return TEMPLATE.replace("assistant\n", f"assistant\n{opening}")


SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
CLOSE = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}<think>"
INSTRUCTED = "Use <think>.{{ messages[-1].content }}{% if add_generation_prompt %}: {% endif %}"
ANSWERS = [  # template, arguments, what begins an answer, what the policy says, whether that is well formed
    (template(""), (), "", "<think>a</think><action>go</action>", True),
    (template(""), (), "", "a</think><action>go</action>", False),
    (template("<think>\n"), (), "<think>\n", "a</think><action>go</action>", True),
    (template("<think>\n"), (), "<think>\n", "a<action>go</action>", False),
    (template(SWITCH), (), "", "<action>go</action>", False),
    (template(SWITCH), ("enable_thinking=true",), "", "<action>go</action>", False),
    (template(SWITCH), ("enable_thinking=False",), "<think>\n\n</think>\n\n", "<action>go</action>", True),
    # No line between turns, and a beginning that is written whether it is asked for or not.
    (CLOSE, (), "<think>", "</think><action>go</action>", True),
    # Tags that the instruction of a system turn names begin nothing.
    (INSTRUCTED, (), "", "a</think><action>go</action>", False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "arguments", "start", "answer", "valid"), ANSWERS)
def test_what_the_template_opened_counts_as_said(model, text, arguments, start, answer, valid):
    (model / "chat_template.jinja").write_text(text)
    player = player_of(model, model__chat_template_args=arguments)
    assert player.answer_start == start
    assert player.render("task").endswith(start)
    assert project(player.answer_start + answer) == ("go", valid)


def test_tags_that_a_tokenizer_calls_special_stay_in_an_answer(model):
    data = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    for i, tag in enumerate(("<think>", "</think>", "<action>", "</action>")):
        data["added_tokens"].append({**data["added_tokens"][-1], "id": 259 + i, "content": tag})
    (model / "tokenizer.json").write_text(json.dumps(data))
    player = player_of(model)
    backend, said = player.tokenizer.backend_tokenizer, "<think>a</think><action>go</action>"
    ids = backend.encode(said, add_special_tokens=False).ids
    assert len(ids) == 7
    assert backend.decode(ids, skip_special_tokens=player.skip_special_tokens) == said


def test_template_arguments_are_typed():
    settings = ("a=true", "b=False", "c=3", "d=-0.5", "e=low", 'f="3"', "g=", "h=x=y", "i=NaN", "j=[1]", "k=null")
    expected = {"a": True, "b": False, "c": 3, "d": -0.5, "e": "low", "f": "3", "g": "", "h": "x=y", "i": "NaN"}
    assert template_arguments(settings) == {**expected, "j": "[1]", "k": "null"}
    table = {"a": True, "c": 3, "d": 0.5, "e": "3", "f": "true"}
    assert template_arguments(settings_of(table)) == table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("enable_thinking",), "need name=value, got 'enable_thinking'"),
        (("=1",), "need name=value"),
        (("a b=1",), "need name=value"),
        (("add_generation_prompt=false",), "add_generation_prompt is set for every template"),
        (("enable_thinkin=false",), "chat template does not read enable_thinkin"),
    ],
)
def test_template_arguments_that_say_nothing_are_refused(model, arguments, message):
    (model / "chat_template.jinja").write_text(template(SWITCH))
    with pytest.raises(ValueError, match="chat-template-args") as error:
        player_of(model, model__chat_template_args=arguments)
    assert message in str(error.value)


def test_template_arguments_come_from_recipes_and_go_with_models_alone(tmp_path):
    recipe = tmp_path / "think.toml"
    recipe.write_text('[model]\npath = "m"\n[model.chat_template_args]\nenable_thinking = false\neffort = "low"\n')
    config = default(["--config", str(recipe)])
    assert template_arguments(config.model.chat_template_args) == {"enable_thinking": False, "effort": "low"}
    recipe.write_text("[model.chat_template_args]\nsteps = [1]\n")
    with pytest.raises(ValueError, match=r"chat_template_args\.steps must be true"):
        default(["--config", str(recipe)])
    with pytest.raises(ValueError, match="needs a --model"):
        check(config_with(model__chat_template_args=("a=1",)))


@pytest.mark.parametrize(
    "text", ["{% for m in messages %}", "{{ raise_exception('no system turn') }}", "{{ messages + 1 }}"]
)
def test_templates_that_cannot_be_rendered_are_refused(model, text):
    (model / "chat_template.jinja").write_text(text)
    with pytest.raises(ValueError, match="its chat template cannot be rendered"):
        player_of(model)


USER_ALONE = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
)
NEVER_ASKED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_ASSISTANT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + none }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} -> {% endif %}"
)
PLAIN_TURNS = NEVER_ASKED + "{% if add_generation_prompt %}assistant: {% endif %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
    "<|endoftext|>{% endif %}{% endfor %}"
)


def test_a_template_without_a_generation_prompt_is_refused_where_an_answer_needs_one(model):
    (model / "chat_template.jinja").write_text(LLAMA_2)  # an answer follows the user's turn as it is
    assert player_of(model).render("task") == "[INST] task [/INST]"
    (model / "chat_template.jinja").write_text(NEVER_ASKED)
    with pytest.raises(ValueError, match=r"no generation prompt, but begins an answer with 'assistant:'; need"):
        player_of(model)


def test_an_answer_ends_where_the_template_ends_a_turn(model):
    spoil("tokenizer_config.json", {"eos_token": "<|endoftext|>"})(model)
    (model / "generation_config.json").unlink()
    assert player_of(model).decoding.stop_ids == (256, 258)
    for text in (
        USER_ALONE,
        PLAIN_TURNS,
        NO_ASSISTANT,
    ):  # no turn of an assistant, or one that no token of its own ends
        (model / "chat_template.jinja").write_text(text)
        assert player_of(model).decoding.stop_ids == (256,)


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        (258, None, (256, 258)),
        ([258, 7], None, (7, 256, 258)),
        (None, 258, (256, 258)),
        ([], [258], (256, 258)),
        (7, 258, (7, 256)),  # config.json is for models without a generation_config.json that says it
        (None, None, (256,)),
        (7, -1, (7, 256)),
        ("<|im_end|>", None, "generation_config.json: has the eos_token_id '<|im_end|>'"),
        ([[258]], None, "generation_config.json: has the eos_token_id [258]"),
        ([None], None, "generation_config.json: has the eos_token_id None"),
        (True, None, "generation_config.json: has the eos_token_id True"),
        (258.0, None, "generation_config.json: has the eos_token_id 258.0"),
        (288, None, "generation_config.json: has the eos_token_id 288, need token ids below its vocab_size 288"),
        (None, -1, "config.json: has the eos_token_id -1"),
    ],
)
def test_stops_are_those_that_the_files_name(model, generation, config, stops):
    spoil("tokenizer_config.json", {"eos_token": "<|endoftext|>"})(model)
    (model / "chat_template.jinja").unlink()
    spoil("generation_config.json", {"eos_token_id": generation})(model)
    spoil("config.json", {"eos_token_id": config})(model)
    if isinstance(stops, tuple):
        assert player_of(model).decoding.stop_ids == stops
        return
    with pytest.raises(ValueError, match="eos_token_id") as error:
        player_of(model)
    assert stops in str(error.value)


@pytest.mark.parametrize("content", [b"eos: 3", b"[1]", b'{"a": "\xe9"}', b"", b"[" * 100_000])
def test_a_generation_config_that_is_none_is_named(model, content):
    (model / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"generation_config\.json: (not JSON|holds)"):
        player_of(model)
    with pytest.raises(ValueError, match=r"generation_config\.json: (not JSON|holds)"):
        check_model.main(check_model.Config(str(model)))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe"])
def test_a_tokenizer_that_is_none_is_named(model, content):
    (model / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
        player_of(model)


def test_token_ids_past_the_models_are_refused_also_where_the_tokenizer_has_few(model):
    data = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"]["zzz"] = 300
    (model / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="has 301 tokens, need at most the 288 of its vocab_size"):
        player_of(model)
