"""Model families: how each writes config.json and names its tensors."""

from infinitevl_jax.families.family import Family, family, register_family

__all__ = ["Family", "family", "register_family"]
