"""Training: losses, optimiser, checkpoints, and one file per job."""
