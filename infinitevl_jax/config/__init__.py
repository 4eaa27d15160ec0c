"""Three frozen configurations that never mix: the model (what weights mean), the run (mesh,
precision), the training."""
