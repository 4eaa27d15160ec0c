"""Tiny random models for tests, with the real layer pattern."""

import jax
import numpy as np
from flax import nnx

from infinitevl_jax import InfiniteVL
from infinitevl_jax.config.model import ModelConfig, TextConfig, VisionConfig, hybrid_pattern
from infinitevl_jax.nn.params import parameters

IMAGE, VIDEO, START, END = 91, 92, 93, 94


def hybrid_config(layers: int = 5, window: int = 24, **text) -> ModelConfig:
    """[S, G, G, G] and a remainder, two kv heads, values wider than keys, special ids below 100."""
    text = (
        dict(
            layer_types=hybrid_pattern(layers),
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=window,
            mrope_section=(2, 3, 3),
            num_linear_heads=2,
            linear_head_dim=16,
        )
        | text
    )
    vision = VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        patch_size=2,
        window_size=8,
        out_hidden_size=32,
        fullatt_block_indexes=(1,),
    )
    return ModelConfig(
        TextConfig(**text),
        vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        pad_token_id=0,
        eos_token_ids=(98,),
        initializer_range=0.5,
    )


def shapes(config: ModelConfig, dtype="float32") -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model layer by layer, without values."""
    known = parameters(config, scanned=False)
    return {name: jax.ShapeDtypeStruct(p.shape, dtype) for name, p in known.items()}


def initialised(module: nnx.Module) -> nnx.Module:
    """A layer by itself with its initial values."""
    graphdef, params = nnx.split(module)
    leaves = nnx.to_flat_state(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [
        (path, nnx.Param(leaf.get_metadata()["facts"].init(key, leaf.get_value().shape)))
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(values))


def loud(params, seed=0):
    """Randomise everything, including biases, norms, convolutions and gates."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, p in params.items():
        p = np.asarray(p)
        if name.endswith((".bias", ".weight")):
            p = p + rng.normal(scale=0.3, size=p.shape)
        out[name] = jax.numpy.asarray(p, "float32")
    return out


def hybrid(seed: int = 0, **config) -> InfiniteVL:
    model = InfiniteVL.random(hybrid_config(**config), seed)
    return InfiniteVL(model.config, loud(model.params, seed))


def conversation(config: ModelConfig, seed: int = 0, text: int = 30):
    """One sequence of text, image, text, video, text, with Hugging Face's argument names."""
    rng = np.random.default_rng(seed)
    image, video = (1, 6, 10), (3, 4, 6)
    before, between, after = (rng.integers(1, 90, n) for n in (5, 4, text))
    ids = [*before, START, *[IMAGE] * 15, END, *between, START, *[VIDEO] * 18, END, *after]
    features = config.vision.patch_features
    return {
        "input_ids": np.array([ids]),
        "second_per_grid_ts": [1.5],
        "pixel_values": rng.normal(size=(60, features)).astype(np.float32),
        "image_grid_thw": np.array([image]),
        "pixel_values_videos": rng.normal(size=(72, features)).astype(np.float32),
        "video_grid_thw": np.array([video]),
    }
