"""The policy of a run: a small one made for it, or a language model, and how it reads and answers."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from envs_bridge.actions import TAGS, spelled
from envs_bridge.prompts import ANSWER_START, readable
from proxmo_jax.agent.chat import answer_start, chat, template_arguments, turn_end
from proxmo_jax.agent.demonstrations import Example
from proxmo_jax.agent.player import Limits, Player
from proxmo_jax.agent.settings import Config, small_policy
from proxmo_jax.agent.tasks import environment, memory_of
from proxmo_jax.errors import UserError
from proxmo_jax.policy import adapters
from proxmo_jax.policy.attention import attention_kind
from proxmo_jax.policy.decoder import init_params
from proxmo_jax.policy.model_config import read_config, read_json
from proxmo_jax.policy.sampling import Decoding, stop_table
from proxmo_jax.policy.sharding import local_mesh, parameter_shardings, place_optimizer, replicate
from proxmo_jax.policy.tokenizer import (
    build_word_tokenizer,
    load_model_tokenizer,
    load_tokenizer,
    save_tokenizer,
    token_count,
)
from proxmo_jax.policy.weights import find_model, load_weights, weight_files
from proxmo_jax.training.checkpoint import load_params
from proxmo_jax.training.update import TrainState, make_optimizer

WARM_START = "warm_start"  # what it has trained, in the run's folder
TOKENIZER = "tokenizer"  # of a small policy, in the run's folder


def make_player(config: Config, mesh: Mesh, demonstrations: Sequence[Example] = ()) -> Player:
    """The run's policy. A small one's tokenizer is read from the run's folder, or built from demonstrations there.

    Raises UserError for a model that is not there, is not supported, or does not fit the run.
    """
    player = language_player(config, mesh) if config.model.path else small_player(config, mesh, demonstrations)
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
            config.rollout.max_response_length,
            (tokenizer.eos_token_id,),
            tokenizer.pad_token_id,
            config.rollout.top_k,
            config.rollout.top_p,
        ),
        slots=config.rollout.max_num_seqs,
        gather_weights=config.rollout.gather_weights,
        start=memory_of(config),
        render=lambda prompt: prompt + ANSWER_START,
        answer_start=ANSWER_START,
        spell=spelled,
        tail=environment(config).tail,
    )


def make_tokenizer(config: Config, demonstrations: Sequence[Example]) -> PreTrainedTokenizerFast:
    """The run's tokenizer; built the first time from the demonstrations' prompts, and names or numbers they lack."""
    folder = config.output.dir / TOKENIZER
    if holds_tokenizer(config.output.dir):
        return load_tokenizer(folder)
    if config.warm_start.from_run:
        tokenizer = load_tokenizer(config.warm_start.from_run / TOKENIZER)
        save_tokenizer(tokenizer, folder)
        return tokenizer
    texts = [f"{example.memory.prompt()}{ANSWER_START} {example.command}" for example in demonstrations]
    return build_word_tokenizer(map(readable, [*texts, environment(config).words]), folder)


def language_player(config: Config, mesh: Mesh) -> Player:
    """A Llama, Qwen2, Qwen2.5 or Qwen3 with its own tokenizer and chat template."""
    folder = find_model(config.model.path)
    names = ("dtype", "param_dtype", "remat", "lora_rank", "lora_alpha")
    attention = attention_kind(config.model.attention, config.optimizer.row_length, tpu=jax.default_backend() == "tpu")
    policy = read_config(folder, attention=attention, **{name: getattr(config.model, name) for name in names})
    weight_files(folder)  # what is not there, or does not fit, is refused before anything is read
    parameter_shardings(mesh, policy)
    tokenizer = load_model_tokenizer(folder, policy.vocab_size)
    arguments = template_arguments(config.model.chat_template_args)
    longest = config.rollout.max_prompt_length + config.rollout.max_response_length
    if longest > policy.max_position_embeddings:
        raise UserError(
            f"--rollout.max-prompt-length and --rollout.max-response-length add up to {longest}, need at most the"
            f" model's {policy.max_position_embeddings}"
        )
    begun = answer_start(tokenizer, **arguments)
    stops, end = stop_ids(folder, tokenizer, **arguments), turn_end(tokenizer, **arguments)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    table = None
    if config.rollout.stop:
        # Ids past the tokenizer's, which pad the embedding, say nothing.
        texts = tokenizer.batch_decode([[i] for i in range(token_count(tokenizer))], skip_special_tokens=False)
        table = replicate(
            local_mesh(mesh), stop_table([*texts, *[""] * (policy.vocab_size - len(texts))], config.rollout.stop)
        )
    known = tokenizer.backend_tokenizer.get_added_tokens_decoder()  # some tokenizers call the tags of an answer special
    return Player(
        tokenizer,
        policy,
        limits_of(config),
        mesh,
        Decoding(config.rollout.max_response_length, stops, pad, config.rollout.top_k, config.rollout.top_p),
        table,
        config.rollout.max_num_seqs,
        config.rollout.gather_weights,
        start=memory_of(config),
        render=partial(chat, tokenizer, **arguments),
        answer_start=begun,
        answer_end=(next(i for i in (end, tokenizer.eos_token_id, stops[0]) if i is not None),),
        skip_special_tokens=not any(added.special and added.content in TAGS for added in known.values()),
        tail=environment(config).tail,
    )


def stop_ids(folder: Path, tokenizer, **arguments: Any) -> tuple[int, ...]:
    """Tokens that end an answer.

    The tokenizer's, the one that the chat template (rendered with `arguments`) ends a turn with, and those of
    `generation_config.json`, or of `config.json` where that names none. Raises UserError if there are none, naming the
    file if it has ids that are none.
    """
    found = {tokenizer.eos_token_id, turn_end(tokenizer, **arguments)} - {None}
    size = read_json(folder / "config.json")["vocab_size"]
    named = _named_stops(folder / "generation_config.json", size) or _named_stops(folder / "config.json", size)
    if not found.union(named):
        raise UserError(
            f"{folder}: neither tokenizer, chat template, generation_config.json nor config.json ends a text"
        )
    return tuple(sorted(found.union(named)))


def _named_stops(path: Path, vocab_size: int) -> list[int]:
    value = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise UserError(f"{path}: has the eos_token_id {token!r}, need token ids below its vocab_size {vocab_size}")
    return ids


def limits_of(config: Config) -> Limits:
    return Limits(config.rollout.max_turns, config.rollout.max_prompt_length, config.rollout.max_response_length)


def fresh_params(player: Player, key: jax.Array) -> Any:
    """Parameters that have learned nothing, where they are to lie."""
    shardings = parameter_shardings(player.mesh, player.config)
    return jax.jit(partial(init_params, player.config), out_shardings=shardings)(key)


def pretrained_params(config: Config, player: Player) -> Any:
    """The parameters of --model, where they are to lie, with fresh adapters if it has some."""
    plain = dataclasses.replace(player.config, lora_rank=0)
    params = load_weights(find_model(config.model.path), plain, parameter_shardings(player.mesh, plain))
    if not player.config.lora_rank:
        return params
    _, shardings = adapters.split(parameter_shardings(player.mesh, player.config))
    fresh = jax.jit(lambda key: adapters.split(init_params(player.config, key))[1], out_shardings=shardings)
    return adapters.join(params, fresh(jax.random.key(config.seed)))


def untrained_params(config: Config, player: Player, key: jax.Array) -> Any:
    """The parameters before any training: those of --model, or fresh ones."""
    return pretrained_params(config, player) if config.model.path else fresh_params(player, key)


def warm_params(folder: Path, untrained: Any) -> Any:
    """The parameters after the warm start of a run's folder. Raises UserError if they cannot be read."""
    frozen, learned = adapters.split(untrained)
    return adapters.join(frozen, load_params(folder / WARM_START, learned))


def holds_tokenizer(folder: Path) -> bool:
    """Whether a run's folder holds the tokenizer of a small policy."""
    return (folder / TOKENIZER / "tokenizer.json").is_file()


def holds_warm_start(folder: Path) -> bool:
    """Whether a run's folder holds a finished warm start."""
    return (folder / WARM_START / "config.json").is_file()


def run_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimiser of a run's reinforcement."""
    return make_optimizer(
        config.optimizer.learning_rate,
        config.optimizer.weight_decay,
        config.optimizer.max_grad_norm,
        warmup=5,
        moments_dtype=config.optimizer.moments_dtype,
    )


def new_state(player: Player, params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The start of learning from these parameters; what is learned is copied."""
    own = jax.tree.map(jnp.copy, adapters.split(params)[1])
    _, shardings = adapters.split(parameter_shardings(player.mesh, player.config))
    return TrainState(own, place_optimizer(optimizer, own, shardings))
