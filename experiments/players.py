"""The policy of a run: a small one made for it, or a language model, and how it reads and answers."""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from envs_bridge.actions import ALFWORLD_TAIL, WEBSHOP_TAIL, spelled
from envs_bridge.collect import Example, Limits, Player
from envs_bridge.household import lexicon
from envs_bridge.prompts import ANSWER_START, readable
from experiments.setup import SHOPS, Config, small_policy
from experiments.worlds import memory_of
from proxmo_jax import adapters
from proxmo_jax.attention import BLOCK
from proxmo_jax.errors import UserError
from proxmo_jax.learner import TrainState, make_optimizer
from proxmo_jax.policy import init_params
from proxmo_jax.sampling import Decoding, stop_table
from proxmo_jax.sharding import parameter_shardings, place_optimizer, replicate
from proxmo_jax.tokenizer import build_word_tokenizer, load_tokenizer, save_tokenizer
from proxmo_jax.weights import find_model, load_weights, read_config, weight_files


def make_player(config: Config, mesh: Mesh, demonstrations: Sequence[Example] = ()) -> Player:
    """The run's policy. A small one's tokenizer is read from the run's folder, or built from demonstrations there.

    Raises UserError for a model that is not there, is not supported, or does not fit the run.
    """
    player = language_player(config, mesh) if config.model else small_player(config, mesh, demonstrations)
    player.check_room()
    return player


def small_player(config: Config, mesh: Mesh, demonstrations: Sequence[Example]) -> Player:
    """A word-level policy; its thought is closed for it, so that it answers with a command alone."""
    tokenizer = make_tokenizer(config, demonstrations)
    policy = small_policy(config, len(tokenizer))
    return Player(
        tokenizer,
        policy,
        limits_of(config),
        mesh,
        Decoding(
            config.max_response_tokens, (tokenizer.eos_token_id,), tokenizer.pad_token_id, config.top_k, config.top_p
        ),
        slots=config.decode_rows,
        start=memory_of(config),
        render=lambda prompt: prompt + ANSWER_START,
        answer_start=ANSWER_START,
        spell=spelled,
        tail=tail_of(config),
    )


def make_tokenizer(config: Config, demonstrations: Sequence[Example]) -> PreTrainedTokenizerFast:
    """The run's tokenizer; built the first time from the demonstrations' prompts, and names or numbers they lack."""
    folder = config.out / "tokenizer"
    if folder.exists():
        return load_tokenizer(folder)
    if config.warm_start_from:
        tokenizer = load_tokenizer(config.warm_start_from / "tokenizer")
        save_tokenizer(tokenizer, folder)
        return tokenizer
    texts = [f"{example.memory.prompt()}{ANSWER_START} {example.command}" for example in demonstrations]
    if config.env in SHOPS:
        more = " ".join(f"{number:02d}" for number in range(100))
    else:
        words = {*lexicon.HOLDS, *(thing for things in lexicon.OBJECTS.values() for thing in things)}
        more = " ".join([*sorted(words), *map(str, range(1, 31))])
    return build_word_tokenizer(map(readable, [*texts, more]), folder)


def language_player(config: Config, mesh: Mesh) -> Player:
    """A Qwen2, Qwen2.5 or Qwen3 with its own tokenizer and chat template."""
    folder = find_model(config.model)
    names = ("dtype", "param_dtype", "remat", "lora_rank", "lora_alpha")
    attention = config.attention
    if attention == "auto":
        attention = "splash" if jax.default_backend() == "tpu" and config.row_length % BLOCK == 0 else "dense"
    policy = read_config(folder, attention=attention, **{name: getattr(config, name) for name in names})
    weight_files(folder)  # what is not there, or does not fit, is refused before anything is read
    parameter_shardings(mesh, policy)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(f"--model: {config.model} holds no tokenizer (tokenizer.json)")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"--model: {config.model} holds no tokenizer ({str(error).strip().splitlines()[0]})") from error
    if len(tokenizer) > policy.vocab_size:
        raise UserError(
            f"--model: {config.model}: its tokenizer has {len(tokenizer)} tokens, need at most the {policy.vocab_size}"
            " of its vocab_size"
        )
    longest = config.max_prompt_tokens + config.max_response_tokens
    if longest > policy.max_position_embeddings:
        raise UserError(
            f"--max-prompt-tokens and --max-response-tokens add up to {longest}, need at most the model's"
            f" {policy.max_position_embeddings}"
        )
    stops = stop_ids(folder, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    table = None
    if config.stop:
        # Ids past the tokenizer's, which pad the embedding, say nothing.
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=False)
        table = replicate(mesh, stop_table([*texts, *[""] * (policy.vocab_size - len(texts))], config.stop))
    return Player(
        tokenizer,
        policy,
        limits_of(config),
        mesh,
        Decoding(config.max_response_tokens, stops, pad, config.top_k, config.top_p),
        table,
        config.decode_rows,
        start=memory_of(config),
        render=partial(chat, tokenizer),
        skip_special_tokens=True,
        tail=tail_of(config),
    )


def stop_ids(folder: Path, tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's and the generation config's. Raises UserError if there are none."""
    found = {tokenizer.eos_token_id} - {None}
    path = folder / "generation_config.json"
    if path.is_file():
        also = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(also if isinstance(also, list) else [also]) - {None}
    if not found:
        raise UserError(f"{folder}: neither tokenizer nor generation_config.json names an eos token")
    return tuple(sorted(found))


def chat(tokenizer, prompt: str) -> str:
    """The prompt as the user's turn, by the tokenizer's own template where it has one."""
    if not tokenizer.chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def limits_of(config: Config) -> Limits:
    return Limits(config.max_turns, config.max_prompt_tokens, config.max_response_tokens)


def tail_of(config: Config) -> int:
    """How much of an answer without action tags is taken for its command."""
    return WEBSHOP_TAIL if config.env in SHOPS else ALFWORLD_TAIL


def fresh_params(player: Player, key: jax.Array) -> Any:
    """Parameters that have learned nothing, where they are to lie."""
    shardings = parameter_shardings(player.mesh, player.config)
    return jax.jit(partial(init_params, player.config), out_shardings=shardings)(key)


def pretrained_params(config: Config, player: Player) -> Any:
    """The parameters of --model, where they are to lie, with fresh adapters if it has some."""
    plain = dataclasses.replace(player.config, lora_rank=0)
    params = load_weights(find_model(config.model), plain, parameter_shardings(player.mesh, plain))
    if not player.config.lora_rank:
        return params
    _, shardings = adapters.split(parameter_shardings(player.mesh, player.config))
    fresh = jax.jit(lambda key: adapters.split(init_params(player.config, key))[1], out_shardings=shardings)
    return adapters.join(params, fresh(jax.random.key(config.seed)))


def run_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimiser of a run's reinforcement."""
    return make_optimizer(
        config.learning_rate,
        config.weight_decay,
        config.max_grad_norm,
        warmup=5,
        moments_dtype=config.moments_dtype,
    )


def new_state(player: Player, params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The start of learning from these parameters; what is learned is copied."""
    own = jax.tree.map(jnp.copy, adapters.split(params)[1])
    _, shardings = adapters.split(parameter_shardings(player.mesh, player.config))
    return TrainState(own, place_optimizer(optimizer, own, shardings))
