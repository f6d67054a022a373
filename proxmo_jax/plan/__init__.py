"""What a training run needs of a TPU slice, from its programs compiled ahead of time; no TPU and no weights needed."""
