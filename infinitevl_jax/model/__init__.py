"""The model: flax modules over arrays, and the host-side numpy that prepares those arrays."""
