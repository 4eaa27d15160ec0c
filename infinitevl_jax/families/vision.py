"""Reading and writing of the Qwen2.5-VL tower's vision_config.

A family with another tower reads and writes the configuration of that tower
(`infinitevl_jax.nn.towers.register_tower`) in its own file.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from infinitevl_jax.config.model import ModelConfig, VisionConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families.config_file import (
    SILU,
    ConfigFile,
    Eps,
    Index,
    Keys,
    Layers,
    Rate,
    Size,
    given,
)
from infinitevl_jax.families.decoder import RopeKeys
from infinitevl_jax.special_tokens import VISION_TOKENS

# our path -> name on disk
TENSOR_NAMES = (
    (r"^visual\.patch_embed\.", "visual.patch_embed.proj."),
    (r"^visual\.merger\.fc1\.", "visual.merger.mlp.0."),
    (r"^visual\.merger\.fc2\.", "visual.merger.mlp.2."),
)


class VisionKeys(msgspec.Struct):
    """vision_config. None: the file does not say."""

    hidden_size: Size
    depth: Layers | None = None
    intermediate_size: Size | None = None
    num_heads: Size | None = None
    in_channels: Size | None = None
    patch_size: Size | None = None
    temporal_patch_size: Size | None = None
    spatial_merge_size: Size | None = None
    window_size: Size | None = None
    fullatt_block_indexes: Annotated[list[Index], Meta(max_length=128)] | None = None
    out_hidden_size: Size | None = None
    tokens_per_second: Rate | None = None
    rms_norm_eps: Eps | None = None


# Keys that change the maths -> the values this package computes with
VISION_VALUES: dict[str, tuple] = {
    "hidden_act": SILU,
    "quantization_config": (),
    "qkv_bias": (True,),
    "deepstack_visual_indexes": ([],),
}


def read_vision(
    file: ConfigFile, hidden_size: int, tokens_per_second: float, hint: str = ""
) -> VisionConfig:
    """The tower of a config.json.

    Args:
      hidden_size: the decoder's. tokens_per_second: where the file does not say it.
      hint: to add to the cure where there is no vision_config.
    """
    if not file.vision:
        raise InfiniteVLError(
            f"{file.source} has no vision_config",
            f"take the config.json that was published with the weights{hint}",
        )
    content = dict(file.vision)
    patch = content.get("patch_size")
    if isinstance(patch, list) and patch and all(side == patch[0] for side in patch):
        content["patch_size"] = patch[0]  # [14, 14]
    keys = Keys(f"{file.source}: vision_config", content)
    keys.check(VISION_VALUES)
    rope: Mapping[str, Any] = keys.section("rope_parameters") or {}
    ropes = Keys(f"{keys.source}.rope_parameters", rope)
    ropes.check({"rope_type": ("axial", "default"), "partial_rotary_factor": (1,)})
    default = {
        "out_hidden_size": hidden_size,
        "tokens_per_second": tokens_per_second,
        "rope_theta": ropes.read(RopeKeys).rope_theta or 1e4,
    }
    return VisionConfig(**default | given(keys.read(VisionKeys)))


def write_vision(config: ModelConfig) -> dict[str, Any]:
    """Keys of config.json that only a model with a tower has."""
    vision = config.vision
    names = (
        "depth hidden_size intermediate_size num_heads in_channels patch_size temporal_patch_size"
        " spatial_merge_size window_size out_hidden_size"
    )
    rate = vision.tokens_per_second
    keys = {
        "model_type": config.family,
        "hidden_act": "silu",
        **{name: getattr(vision, name) for name in names.split()},
        "fullatt_block_indexes": list(vision.fullatt_block_indexes),
        "tokens_per_second": int(rate) if rate == int(rate) else rate,
    }
    if vision.rms_norm_eps != VisionConfig.rms_norm_eps:
        keys["rms_norm_eps"] = vision.rms_norm_eps
    if vision.rope_theta != VisionConfig.rope_theta:
        keys["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.rope_theta}
    return {name: getattr(config, name) for name in VISION_TOKENS} | {"vision_config": keys}
