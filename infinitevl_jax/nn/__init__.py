"""The model: flax modules over arrays."""
