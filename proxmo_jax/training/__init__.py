"""Training: rollout buffer, sequence packing, losses, policy updates and checkpoints."""
