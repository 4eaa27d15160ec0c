"""Model families: how each writes config.json and names its tensors, one file a family."""

from infinitevl_jax.families import infinitevl, qwen2, qwen2_5_vl
from infinitevl_jax.families.config_file import ConfigFile, Keys
from infinitevl_jax.families.family import Family, TransformersCode, family, register_family

__all__ = [
    "ConfigFile",
    "Family",
    "Keys",
    "TransformersCode",
    "family",
    "infinitevl",
    "qwen2",
    "qwen2_5_vl",
    "register_family",
]
