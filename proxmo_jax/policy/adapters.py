"""Low-rank adapters (LoRA, arXiv 2106.09685): which parameters are trained, and how adapters are merged.

With `PolicyConfig.lora_rank` r, every linear layer x W of the decoder becomes x W + (alpha / r) (x A) B. A and B are
stored beside W in the parameter tree, named `..._lora_a` and `..._lora_b`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from proxmo_jax.policy.decoder import PolicyConfig


def split(params: Any) -> tuple[Any, Any]:
    """Separate trainable from frozen parameters: adapters if there are any, else everything, is trainable.

    Args:
        params: all parameters of the policy.

    Returns:
        (frozen, trainable) trees.
    """
    flat = flatten_dict(params)
    learned = {path: leaf for path, leaf in flat.items() if any("_lora_" in name for name in path)} or flat
    frozen = {path: leaf for path, leaf in flat.items() if path not in learned}
    return unflatten_dict(frozen), unflatten_dict(learned)


def join(frozen: Any, learned: Any) -> Any:
    """Reassemble the parameter tree, without copies.

    Args:
        frozen: first result of `split`.
        learned: second result of `split`.

    Returns:
        All parameters of the policy.
    """
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(learned)})


def without(params: Any, config: PolicyConfig) -> tuple[Any, PolicyConfig]:
    """An equal policy without adapters, which computes faster.

    Args:
        params: all parameters of the policy.
        config: its shape.

    Returns:
        Its parameters and shape; the same ones if it has no adapters.
    """
    if not config.lora_rank:
        return params, config
    return merge(params, config.lora_alpha / config.lora_rank), dataclasses.replace(config, lora_rank=0)


@jax.jit
def merge(params: Any, scale: jax.Array) -> Any:
    """Merge adapters into the weights: W + scale A B in float32, stored in W's dtype.

    Args:
        params: all parameters of the policy.
        scale: float32 [], alpha / r.

    Returns:
        The parameters of an equal policy without adapters.
    """
    flat = flatten_dict(params)
    merged = {path: leaf for path, leaf in flat.items() if not any("_lora_" in name for name in path)}
    for path, leaf in flat.items():
        name = path[-2] if len(path) > 1 else ""
        if not name.endswith("_lora_a"):
            continue
        target = (*path[:-2], name.removesuffix("_lora_a"), "kernel")
        right = flat[(*path[:-2], name.replace("_lora_a", "_lora_b"), "kernel")]
        layers, rank = leaf.shape[0], leaf.shape[-1]
        product = jnp.einsum("lir,lro->lio", leaf.reshape(layers, -1, rank), right.reshape(layers, rank, -1))
        kernel = merged[target]
        merged[target] = (kernel + scale * product.reshape(kernel.shape)).astype(kernel.dtype)
    return unflatten_dict(merged)
