"""Frozen configurations of the model, the run (mesh and precision) and the training."""
