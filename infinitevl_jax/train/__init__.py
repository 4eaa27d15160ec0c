"""Training: losses, optimiser, the step, the loop around it."""
