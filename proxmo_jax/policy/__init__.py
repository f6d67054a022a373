"""The policy: decoder, adapters, checkpoints, tokenizers, sampling and sharding."""
