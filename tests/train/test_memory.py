"""A model that exceeds the memory is refused before allocation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny_run import write_preset

from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.train import memory
from infinitevl_jax.train.loop import train

SHAPES = {
    name: jax.ShapeDtypeStruct((1000,), dtype)
    for name, dtype in (("a", jnp.float32), ("b", jnp.bfloat16))
}
MESH = Mesh(np.array(jax.devices("cpu")[:2]), ("fsdp",))


@pytest.mark.parametrize("trainable, bytes_", [(["a", "b"], 24_000), (["a"], 14_000), ([], 4_000)])
def test_weights_and_moments_count(monkeypatch, trainable, bytes_):
    monkeypatch.setattr(memory, "_memory", lambda mesh: bytes_)
    memory.check_memory(SHAPES, trainable, MESH)
    monkeypatch.setattr(memory, "_memory", lambda mesh: bytes_ - 1)
    with pytest.raises(InfiniteVLError, match="parameters and moments take 0.0 GB"):
        memory.check_memory(SHAPES, trainable, MESH)


def test_a_teacher_counts_but_for_what_it_may_share(monkeypatch):
    teacher = {name: jax.ShapeDtypeStruct((1000,), jnp.bfloat16) for name in "abc"}
    for trainable, bytes_ in ((["a"], 14_000 + 4_000), (["a", "b"], 24_000 + 6_000)):
        monkeypatch.setattr(memory, "_memory", lambda mesh, b=bytes_: b)
        memory.check_memory(SHAPES, trainable, MESH, teacher)
        monkeypatch.setattr(memory, "_memory", lambda mesh, b=bytes_: b - 1)
        with pytest.raises(InfiniteVLError, match="parameters and moments take"):
            memory.check_memory(SHAPES, trainable, MESH, teacher)
    monkeypatch.setattr(memory, "_memory", lambda mesh: 24_000 + 2 * 6_000 - 1)
    with pytest.raises(InfiniteVLError, match="parameters and moments take"):
        memory.check_memory(SHAPES, ["a", "b"], MESH, teacher, replicated=True)


def test_devices_of_one_machine_share_its_memory():
    assert 1e9 < memory._memory(MESH) < 1e15


def test_a_preset_too_large_is_refused_early(tmp_path, tiny_data):
    sizes = [
        "model.text.intermediate_size=1048576",
        "model.text.hidden_size=262144",
        "model.vision.out_hidden_size=262144",
    ]
    preset = load_preset(write_preset(tmp_path, tiny_data), sizes)
    with pytest.raises(
        InfiniteVLError,
        match=r"parameters and moments take [0-9,]+\.\d GB, the devices of this mesh have",
    ):
        train(preset)
    assert not (tmp_path / "run" / "checkpoints").exists()
