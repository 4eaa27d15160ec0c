"""Operators on plain JAX arrays, one folder each: `reference` (the truth, in any precision), `xla` (runs everywhere) and
room for device kernels.

Nothing here knows of models, parameters or caches.
"""
