"""The life of a run: its directory, checkpoints, rank 0's duties, evaluation."""
