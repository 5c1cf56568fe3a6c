"""Training: Algorithm 1, its options, checkpoints, run folder and loggers."""
