"""Tokens and floating-point operations of an iteration, and how fast they were done.

Counted is what the mathematics needs ("model FLOPs", PaLM, arXiv 2204.02311, appendix B; 2 operations per weight and
token as in arXiv 2001.08361, section 2.1), not what the programs do: no padding, no rematerialisation, no second look
at a shared prompt. For a turn of p prompt and r response tokens, n = p + r:

    forward = 2 W n + 2 H r + 4 A n (n + 1) / 2

with W the weights of the layers' matrices (LoRA's too), H those of the head, which is applied to response tokens only,
and A = layers x heads x head dimensions; a token attends to itself and those before it. The embedding is a look-up and
costs nothing. The backward pass costs twice the forward pass, 3 x forward in all; with LoRA the gradients of the frozen
matrices, 2 (W - LoRA's) n + 2 H r, are not computed and not counted.
"""

from dataclasses import dataclass

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from proxmo_jax.agent.rollout import Rollout
from proxmo_jax.agent.settings import Config
from proxmo_jax.policy.decoder import PolicyConfig, parameter_shapes


@dataclass(frozen=True)
class Work:
    """What a token costs in a policy.

    Attributes:
        matrices: weights of the layers' matrices, adapters included.
        adapters: weights of adapters; 0 if all is trained.
        head: weights of the head.
        attention: layers x heads x head dimensions.
    """

    matrices: int
    adapters: int
    head: int
    attention: int

    @classmethod
    def of(cls, config: PolicyConfig) -> "Work":
        """The work of a policy of this shape."""
        flat = flatten_dict(parameter_shapes(config)["layers"])
        sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flat.items() if path[-1] == "kernel"}
        return cls(
            matrices=sum(sizes.values()),
            adapters=sum(size for path, size in sizes.items() if "_lora_" in path[-2]),
            head=config.vocab_size * config.hidden_size,
            attention=config.num_hidden_layers * config.num_attention_heads * config.head_dim,
        )

    def forward(self, prompt: np.ndarray, response: np.ndarray) -> float:
        """Operations of a forward pass.

        Args:
            prompt: int [N], prompt tokens of turns.
            response: int [N], their response tokens.

        Returns:
            Operations of all turns.
        """
        n, r = np.add(prompt, response, dtype=np.float64), np.asarray(response, np.float64)
        return float((2 * self.matrices * n + 2 * self.head * r + 2 * self.attention * n * (n + 1)).sum())

    def training(self, prompt: np.ndarray, response: np.ndarray) -> float:
        """Operations of a forward and a backward pass; arguments and result as in `forward`."""
        frozen = 0.0
        if self.adapters:
            n, r = np.add(prompt, response, dtype=np.float64), np.asarray(response, np.float64)
            frozen = float((2 * (self.matrices - self.adapters) * n + 2 * self.head * r).sum())
        return 3 * self.forward(prompt, response) - frozen


def throughput_row(
    config: Config, work: Work, rollout: Rollout, trained: np.ndarray, seconds: dict[str, float]
) -> dict[str, float]:
    """Metrics of an iteration.

    `perf/total_num_tokens` and `perf/throughput` are verl's: tokens that are trained on, and those per second and
    device. Prompt and response tokens are all that the sampler read and drew, also in episodes that were lost or drawn
    anew. Operations per second are those of all devices together; the rollout's time contains that of the environments.

    Args:
        config: the run's settings.
        work: of the policy.
        rollout: what was played.
        trained: bool [E, T], the turns that were trained on.
        seconds: of the rollout, the estimator and the update, by these names.

    Returns:
        The metrics by name.
    """
    prompts, responses = (np.concatenate([turn[i] for turn in rollout.sampled]).astype(np.int64) for i in (0, 1))
    lengths = rollout.prompt_lengths[trained], rollout.response_lengths[trained]
    tokens = int(sum(x.sum(dtype=np.int64) for x in lengths))
    passes = (config.loss.kl_coef > 0) + (config.loss.old_log_probs == "trainer")  # for log-probs
    update = passes * work.forward(*lengths) + config.optimizer.num_iterations * work.training(*lengths)
    return {
        "perf/prompt_tokens": int(prompts.sum()),
        "perf/response_tokens": int(responses.sum()),
        "perf/total_num_tokens": tokens,
        "perf/throughput": tokens / (sum(seconds.values()) * jax.device_count()),
        "perf/rollout_response_tokens_per_second": int(responses.sum()) / seconds["rollout"],
        "perf/update_tokens_per_second": tokens / seconds["update"],
        "perf/rollout_flops_per_second": work.forward(prompts, responses) / seconds["rollout"],
        "perf/update_flops_per_second": update / seconds["update"],
    }
