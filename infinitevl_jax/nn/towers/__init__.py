"""Vision towers by type of their configuration."""

from infinitevl_jax.nn.towers import qwen2_5_vl
from infinitevl_jax.nn.towers.registry import make_tower, register_tower

__all__ = ["make_tower", "qwen2_5_vl", "register_tower"]
