"""Names of parameters on disk, layer by layer: "layers.3.mlp.up_proj.kernel", whatever a run
scans."""

import dataclasses
import re

from infinitevl_jax.checkpoints.weights import Leaf, leaves
from infinitevl_jax.config.model import ModelConfig

_UNROLLED = re.compile(r"(layers|visual\.blocks)\.rest\.(\d+)\.(.+)")


def layer_leaves(config: ModelConfig) -> list[Leaf]:
    """Every parameter as it is named and shaped on disk."""
    return [
        dataclasses.replace(leaf, name=_UNROLLED.sub(r"\1.\2.\3", leaf.name))
        for leaf in leaves(config, scanned=False)
    ]


def disk_names(config: ModelConfig) -> dict[str, str]:
    """Torch name -> name on disk."""
    return {leaf.torch[0]: leaf.name for leaf in layer_leaves(config)}


def stack_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Name of a parameter in the scanned layout -> its names on disk: those of its layers, in the
    order of the leading axis; one, where it is no stack."""
    names = disk_names(config)
    return {
        leaf.name: tuple(names[torch] for torch in leaf.torch)
        for leaf in leaves(config, scanned=True)
    }
