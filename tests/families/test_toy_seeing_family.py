"""A vision tower from this file alone, and a family that chooses it: the mean of each token's
patches, projected."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_folder import tiny_config, tiny_model

from infinitevl_jax import InfiniteVL
from infinitevl_jax.checkpoints import export_folder, import_folder, read_config, save_params
from infinitevl_jax.cli import info
from infinitevl_jax.config.model import VisionConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families import infinitevl, register_family
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.layers import Linear
from infinitevl_jax.nn.params import functional, parameters
from infinitevl_jax.nn.towers import register_tower
from pallas_kernels.testing.parity import rel_rms

FAMILY = "seeing_toy"


@dataclass(frozen=True)
class MeanConfig(VisionConfig):
    gain: float = 1.0


class MeanTower(nnx.Module):
    def __init__(self, config, ops, *, scanned, remat):
        self.unit, self.gain = config.merge_unit, config.gain
        axes = ("width", "hidden")
        self.proj = Linear(config.patch_features, config.out_hidden_size, axes)

    def __call__(self, patches, dtype):
        rows, count, features = patches.pixels.shape
        tokens = patches.pixels.astype(dtype).reshape(rows, count // self.unit, -1, features)
        return self.proj(tokens.mean(2) * self.gain)


register_tower(MeanConfig, MeanTower)


def read(file):
    config = infinitevl.read(file)
    sizes = {field.name: getattr(config.vision, field.name) for field in VISION_FIELDS}
    tower = MeanConfig(**sizes, gain=file.vision["gain"])
    return dataclasses.replace(config, vision=tower, family=FAMILY)


def write(config):
    out = infinitevl.write(config)
    out["vision_config"]["gain"] = config.vision.gain
    return out


VISION_FIELDS = dataclasses.fields(VisionConfig)
register_family(
    dataclasses.replace(
        infinitevl.FAMILY, name=FAMILY, read=read, write=write, transformers_code=None
    )
)


@pytest.fixture(scope="module")
def model():
    config = tiny_config()
    sizes = {field.name: getattr(config.vision, field.name) for field in VISION_FIELDS}
    tower = MeanConfig(**sizes, gain=2.0)
    return tiny_model(dataclasses.replace(config, vision=tower, family=FAMILY))


def test_the_decoder_reads_its_tokens(model):
    config, rng = model.config, np.random.default_rng(0)
    ids = [5, config.vision_start_token_id, *[config.image_token_id] * 15, 7, 8]
    pixels = rng.normal(size=(60, config.vision.patch_features)).astype(np.float32)
    image = {"pixel_values": pixels, "image_grid_thw": np.array([[1, 6, 10]])}
    prepared = build_inputs(config, np.array([ids]), **image)
    tokens = functional(config, scanned=False)(model.params).encode(prepared.patches)[0]
    place = np.asarray(prepared.decoder.vision_index)[0]
    kernel = np.asarray(model.params["visual.proj.kernel"], np.float64)
    exact = 2.0 * pixels.astype(np.float64).reshape(15, 4, -1).mean(1) @ kernel
    assert rel_rms(jnp.asarray(tokens)[place[place >= 0]], exact) <= 1e-6
    other = image | {"pixel_values": 2 * pixels}
    shown, darker = (model(np.array([ids]), **seen).logits for seen in (image, other))
    np.testing.assert_array_equal(shown[0, :2], darker[0, :2])
    assert rel_rms(shown[0, 2:], darker[0, 2:]) > 1e-3


def test_a_folder_and_back(model, tmp_path):
    save_params(tmp_path / "ours", model.params, model.config)
    export_folder(tmp_path / "ours", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "again")
    assert read_config(tmp_path / "again") == model.config
    again = InfiniteVL.from_pretrained(tmp_path / "again")
    for name, value in model.params.items():
        np.testing.assert_array_equal(again.params[name], value)
    parts = info.describe(tmp_path / "again")["parts"]
    assert parts["vision tower"]["parameters"] == model.params["visual.proj.kernel"].size
    assert not list((tmp_path / "hf").glob("*.py"))


def test_a_tower_that_nobody_registered(model):
    @dataclass(frozen=True)
    class Unknown(VisionConfig):
        pass

    tower = Unknown(out_hidden_size=model.config.text.hidden_size)
    with pytest.raises(InfiniteVLError, match="no vision tower is registered for Unknown"):
        parameters(dataclasses.replace(model.config, vision=tower), scanned=False)
    with pytest.raises(InfiniteVLError, match="give a VisionConfig or None"):
        dataclasses.replace(model.config, vision="a tower")
