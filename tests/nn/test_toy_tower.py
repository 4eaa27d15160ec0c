"""A vision tower from this file alone: one linear map of each merged group of patches."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
from flax import nnx
from tiny_folder import tiny_config

from infinitevl_jax import InfiniteVL, InfiniteVLError
from infinitevl_jax.config.model import ModelConfig, VisionConfig
from infinitevl_jax.nn.layers import Linear
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.nn.towers import register_tower
from pallas_kernels.testing.parity import rel_rms

GRID = (1, 4, 8)


@dataclass(frozen=True)
class ToyVisionConfig(VisionConfig):
    """Patches as Qwen2.5-VL's; `scale` multiplies the outputs."""

    scale: float = 2.0


class ToyTower(nnx.Module):
    def __init__(self, config: ToyVisionConfig, ops, *, scanned, remat):
        self.scale, self.group = config.scale, config.merge_unit
        features = config.merge_unit * config.patch_features
        self.proj = Linear(features, config.out_hidden_size, ("hidden", "width"))

    def __call__(self, patches, dtype):
        rows, count, width = patches.pixels.shape
        groups = patches.pixels.astype(dtype).reshape(rows, count // self.group, -1)
        return self.scale * self.proj(groups)


register_tower(ToyVisionConfig, ToyTower)
TINY = tiny_config()
CONFIG = dataclasses.replace(TINY, vision=ToyVisionConfig(**dataclasses.asdict(TINY.vision)))


def image_batch(seed):
    tokens = int(np.prod(GRID)) // CONFIG.vision.merge_unit
    begin, end = CONFIG.vision_start_token_id, CONFIG.vision_end_token_id
    ids = [[begin, *[CONFIG.image_token_id] * tokens, end, 5, 6, 7]]
    shape = int(np.prod(GRID)), CONFIG.vision.patch_features
    pixels = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": np.array([GRID])}


def test_it_is_the_tower_of_its_configuration():
    known = parameters(CONFIG, scanned=False)
    tower = {name: p for name, p in known.items() if name.startswith("visual.")}
    assert list(tower) == ["visual.proj.kernel"]
    assert tower["visual.proj.kernel"].axes == ("hidden", "width")
    others = parameters(TINY, scanned=False)
    assert known.keys() - tower.keys() == {n for n in others if not n.startswith("visual.")}


def test_the_model_sees_through_it():
    model = InfiniteVL.random(CONFIG)
    one, two = (image_batch(seed) for seed in (0, 1))
    assert rel_rms(model(**one).logits, model(**two).logits) > 1e-2
    kernel = "visual.proj.kernel"
    blind = InfiniteVL(CONFIG, dict(model.params) | {kernel: 0 * model.params[kernel]})
    np.testing.assert_array_equal(blind(**one).logits, blind(**two).logits)
    assert model.generate(**one, max_new_tokens=4).shape == (1, 4)


def test_its_own_sizes_are_checked():
    with pytest.raises(InfiniteVLError, match="scale is 'large'\n.*give a number"):
        dataclasses.replace(CONFIG.vision, scale="large")
    with pytest.raises(InfiniteVLError, match="vision is 5\n.*give a VisionConfig"):
        ModelConfig(TINY.text, 5)
