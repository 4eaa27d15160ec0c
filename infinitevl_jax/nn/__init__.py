"""Flax modules of the model. They run on the device."""
