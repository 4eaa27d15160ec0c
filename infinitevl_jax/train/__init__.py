"""Training: losses, optimiser, step, loop."""
