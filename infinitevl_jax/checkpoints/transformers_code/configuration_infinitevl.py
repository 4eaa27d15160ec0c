"""InfiniteVL's configuration for transformers, loaded with trust_remote_code=True."""

from transformers import PretrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

# For files that leave these out: the sizes of the published model.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "sliding_window": 8192,
    "num_attention_sinks": 0,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "conv_size": 4,
    "expand_v": 2.0,
    "linear_head_dim": 128,
    "norm_eps": 1e-5,
    "num_linear_heads": 16,
}


class InfiniteVLConfig(PretrainedConfig):
    """Reads the flat config.json of published checkpoints and the one with a nested text_config."""

    model_type = "infinite_vl"
    sub_configs = {"vision_config": Qwen2_5_VLVisionConfig}

    def __init__(self, vision_config=None, text_config=None, **keys):
        keys = {**(text_config or {}), **keys}
        keys.pop(
            "attn_implementation", None
        )  # of the machine that trained it: flash-attn need not be here
        rope = {
            **(keys.pop("rope_scaling", None) or {}),
            **(keys.pop("rope_parameters", None) or {}),
        }
        theta = keys.pop("rope_theta", None)
        depth = keys.get("num_hidden_layers", 36)
        types = keys.pop("layer_types", None)
        keys = {**_DEFAULTS, **keys}

        if isinstance(vision_config, dict):
            known = {name: value for name, value in vision_config.items() if name != "model_type"}
            vision_config = Qwen2_5_VLVisionConfig(**known)
        self.vision_config = vision_config
        super().__init__(**keys)
        self.rope_parameters = {
            "rope_type": "default",
            "rope_theta": rope.get("rope_theta") or theta or 1e6,
            "mrope_section": rope.get("mrope_section"),
        }
        self.layer_types = types or [
            "linear_attention" if i % 4 else "sliding_attention" for i in range(depth)
        ]
