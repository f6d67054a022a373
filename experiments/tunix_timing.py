"""Time google-tunix's Qwen2, sampler and GRPO loss; `bench_policy` runs this file in an environment that has it.

Standard input: the request of `bench_policy`. Standard output, one JSON line: seconds of the first call and median
seconds of the later ones, for prefill, decoding and a training step, and the number of tokens read or decoded.
"""

import json
import os
import sys
from types import SimpleNamespace


def main() -> None:
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from timing import timed  # the script's own folder is first on the path
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen2.model import ModelConfig, Qwen2
    from tunix.rl.algo_core import grpo_loss_fn
    from tunix.rl.common import TrainExample

    shape = request["shape"]
    config = ModelConfig(
        num_layers=shape["num_hidden_layers"], vocab_size=shape["vocab_size"], embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"], num_heads=shape["num_attention_heads"], head_dim=shape["head_dim"],
        num_kv_heads=shape["num_key_value_heads"], rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=True,
        dtype=jnp.dtype(request["dtype"]), param_dtype=jnp.dtype(request["dtype"]),
    )  # fmt: skip
    model = Qwen2(config, rngs=nnx.Rngs(0))

    prompts, responses = request["prompts"], request["responses"]
    decode = request["decode"]
    texts = {str(i): ids for i, ids in enumerate(decode["prompts"])}
    tokenizer = SimpleNamespace(
        encode=lambda text, **_: texts[text], decode=lambda ids, **_: "", bos_id=lambda: None, pad_id=lambda: 0,
        eos_id=lambda: shape["vocab_size"] - 1,
    )  # fmt: skip
    width, steps = max(map(len, decode["prompts"])), decode["steps"]
    cache = CacheConfig(width + steps, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(model, tokenizer, cache)
    produced = []

    def generate(steps=steps):
        out = sampler(list(texts), max_generation_steps=steps, max_prompt_length=width, temperature=0.0)
        produced.append(sum(len(tokens) for tokens in out.tokens))
        return out.tokens

    timings = {"prefill": {**timed(lambda: generate(1), request["repeat"]), "tokens": width * len(texts)}}
    timings["decode"] = timed(generate, request["repeat"])
    timings["decode"]["tokens"] = produced[-1]

    longest = max(map(len, prompts)), max(map(len, responses))

    def padded(rows, size, left):
        return jnp.array([[0] * (size - len(r)) + r if left else r + [0] * (size - len(r)) for r in rows], jnp.int32)

    prompt_ids, response_ids = padded(prompts, longest[0], True), padded(responses, longest[1], False)
    example = TrainExample(
        prompt_ids=prompt_ids, prompt_mask=prompt_ids != 0,
        completion_ids=response_ids, completion_mask=response_ids != 0,
        advantages=jnp.array(request["advantages"], jnp.float32),
        ref_per_token_logps=jnp.full(response_ids.shape, -5.0), old_per_token_logps=jnp.full(response_ids.shape, -5.0),
    )  # fmt: skip
    settings = SimpleNamespace(
        beta=0.01, epsilon=0.2, epsilon_high=0.2, epsilon_c=3.0, loss_algo="grpo", loss_agg_mode="token-mean",
        temperature=1.0, kl_loss_mode="low_var_kl", kl_clamp_value=None,
    )  # fmt: skip
    optimizer = nnx.Optimizer(model, optax.adamw(1e-6, weight_decay=0.01), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, example):
        def loss(model):
            return grpo_loss_fn(model, example, settings, pad_id=0, eos_id=shape["vocab_size"] - 1)

        (value, _), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, gradient)
        return value

    timings["train"] = timed(lambda: step(model, optimizer, example), request["repeat"])
    print(json.dumps(timings), file=pipe, flush=True)


if __name__ == "__main__":
    main()
