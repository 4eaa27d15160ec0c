"""Operators on plain JAX arrays, mostly one folder each: `reference` (the truth, in any precision), `xla` (runs everywhere), the kernels of
TPUs and Hopper GPUs, and `implementations`, which of them comes first.

Nothing here knows of models, parameters or caches.
"""
