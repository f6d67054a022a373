"""Low-rank adapters (LoRA, arXiv 2106.09685): which parameters are learned when there are some, and how they end.

With `PolicyConfig.lora_rank` r every linear layer x W of the decoder is x W + (alpha / r) (x A) B; A and B lie beside W
in the tree of parameters, named `..._lora_a` and `..._lora_b`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict


def split(params: Any) -> tuple[Any, Any]:
    """(frozen, learned): adapters alone are learned where there are any, and everything where there are none."""
    flat = flatten_dict(params)
    learned = {path: leaf for path, leaf in flat.items() if any("_lora_" in name for name in path)} or flat
    frozen = {path: leaf for path, leaf in flat.items() if path not in learned}
    return unflatten_dict(frozen), unflatten_dict(learned)


def join(frozen: Any, learned: Any) -> Any:
    """The whole tree again; nothing is copied."""
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(learned)})


@jax.jit
def merge(params: Any, scale: jax.Array) -> Any:
    """The same policy without adapters: W + scale A B in float32, in W's dtype. `scale` is alpha / r."""
    flat = flatten_dict(params)
    answer = {path: leaf for path, leaf in flat.items() if not any("_lora_" in name for name in path)}
    for path, leaf in flat.items():
        name = path[-2] if len(path) > 1 else ""
        if not name.endswith("_lora_a"):
            continue
        target = (*path[:-2], name.removesuffix("_lora_a"), "kernel")
        right = flat[(*path[:-2], name.replace("_lora_a", "_lora_b"), "kernel")]
        layers, rank = leaf.shape[0], leaf.shape[-1]
        product = jnp.einsum("lir,lro->lio", leaf.reshape(layers, -1, rank), right.reshape(layers, rank, -1))
        kernel = answer[target]
        answer[target] = (kernel + scale * product.reshape(kernel.shape)).astype(kernel.dtype)
    return unflatten_dict(answer)
