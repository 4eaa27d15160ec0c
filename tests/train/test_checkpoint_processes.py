"""A checkpoint that two processes write together, each its own shards."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from infinitevl_jax.checkpoints.array_reader import ArrayReader
from infinitevl_jax.checkpoints.checksums import read_checksums
from infinitevl_jax.checkpoints.stored import open_arrays

ROOT = Path(__file__).resolve().parents[2]

PROCESS = """
import sys
from pathlib import Path
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P

rank, port, root = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)

from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.train.checkpoints import Checkpoints, abstract_state
from infinitevl_jax.train.step import TrainState

mesh = jax.make_mesh((4,), ("fsdp",))

def array(value, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

def state(step):
    stack = np.arange(3 * 8 * 4, dtype=np.float32).reshape(3, 8, 4) + step
    return TrainState(
        {"layers.blocks.0.w": array(stack, None, "fsdp"), "norm": array(stack[0, 0])},
        {"embedding": array(np.arange(32, dtype=np.float32).reshape(8, 4), "fsdp")},
        {"mu": {"layers.blocks.0.w": array(stack / 2, None, None, "fsdp")}},
        array(np.int32(step)),
    )

layers = {"layers.blocks.0.w": ["layers.0.w", "layers.1.w", "layers.2.w"]}
checkpoints = Checkpoints(root / "run", root / "model", Manifest(), 2, layers=layers)
checkpoints.save(state(1), {"rows": 1})

def refused(*arguments, **options):
    raise AssertionError("the thread that writes asks the devices")

for name in ("sync_global_devices", "broadcast_one_to_all", "process_allgather"):
    setattr(multihost_utils, name, refused)
total = jax.jit(lambda x: x.trainable["norm"].sum() + x.frozen["embedding"].sum(), donate_argnums=0)
for step in (2, 3):  # written while the devices of both compute together
    now = state(step)
    checkpoints.begin(now, {"rows": step})
    expected = 496 + 6 + 4 * step
    for turn in range(20):
        assert float(total(now if turn == 0 else state(step))) == expected
checkpoints.wait()
shardings = jax.tree.map(lambda x: x.sharding, state(3))
found = checkpoints.restore(abstract_state(state(3), shardings), lambda place: None)
for there, here in zip(jax.tree.leaves(found), jax.tree.leaves(state(3)), strict=True):
    assert there.sharding == here.sharding
    for a, b in zip(there.addressable_shards, here.addressable_shards, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
print("equal", flush=True)
"""


def test_two_processes(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), port, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("equal" in text for text in said), said[0][-2000:] + said[1][-2000:]
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    value = np.arange(3 * 8 * 4, dtype=np.float32).reshape(3, 8, 4) + 3
    inodes = [(folder / s / "checksums" / "frozen.1.json").stat().st_ino for s in ("2", "3")]
    assert inodes[0] == inodes[1]
    reader = open_arrays(folder / "3")
    assert sorted(reader.shapes) == ["embedding", "layers.0.w", "layers.1.w", "layers.2.w", "norm"]
    for layer in range(3):
        np.testing.assert_array_equal(reader.read(f"layers.{layer}.w"), value[layer])
        moment = ArrayReader(folder / "3", "optimizer").read(f"state.mu.layers.{layer}.w")
        np.testing.assert_array_equal(moment, value[layer] / 2)
    parts = read_checksums(folder / "3", "params")
    assert [len(parts[name]) for name in ("layers.0.w", "norm")] == [4, 1]  # one by each device
