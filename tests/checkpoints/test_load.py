"""Parameters into memory: layouts, dtypes, meshes; and that a device reads only its own shard."""

import logging
import os
import shutil
import sys
import threading

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from torch_folders import BF16, hybrid_folder, hybrid_tensors

from infinitevl_jax.checkpoints import import_folder, load_params
from infinitevl_jax.checkpoints.array_reader import ArrayReader
from infinitevl_jax.checkpoints.array_writer import LazyArray, write_arrays
from infinitevl_jax.checkpoints.load import from_source
from infinitevl_jax.checkpoints.placing import place
from infinitevl_jax.checkpoints.reading import read_leaf
from infinitevl_jax.checkpoints.source import open_source
from infinitevl_jax.checkpoints.weights import count, hub_name, leaves, runtime_name
from infinitevl_jax.config.model import infinitevl_4b
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.sharding import parameter_shardings


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("load")
    src = hybrid_folder(root / "src", mixed=True, shards=2)
    import_folder(src, root / "ours")
    return {"hf": src, "ours": root / "ours"}


def mesh(fsdp, tensor):
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and np.array_equal(np.asarray(a[n]), np.asarray(b[n])) for n in a
    )


def test_every_parameter_of_the_published_model_has_a_line():
    config = infinitevl_4b()
    assert count(config) == 4_408_381_536
    scanned, single = leaves(config, scanned=True), leaves(config, scanned=False)
    names = [name for leaf in single for name in leaf.torch]
    assert len(names) == len(set(names)) and sorted(names) == sorted(
        name for leaf in scanned for name in leaf.torch
    )
    assert all(hub_name(runtime_name(name)) == name for name in names)
    assert {leaf.name: leaf.shape for leaf in scanned} == {
        n: tuple(s.shape) for n, s in parameters(config, scanned=True).items()
    }


@pytest.mark.parametrize("kind", ["hf", "ours"])
def test_layouts(folders, kind):
    """Every layer's tensor is where the layout says, turned to [in, out], in its own dtype."""
    tensors = hybrid_tensors(mixed=True)
    config, single = load_params(folders[kind], scanned=False)
    assert single.keys() == parameters(config, scanned=False).keys()
    _, scanned = load_params(folders[kind], scanned=True)
    assert {n: p.shape for n, p in scanned.items()} == {
        n: s.shape for n, s in parameters(config, scanned=True).items()
    }
    # two repeats of [S, L L L] and one layer more: blocks of 2 and 6 layers, and a rest
    places = (
        (0, "o_proj", "blocks.0", 0),
        (1, "v_proj", "blocks.1", 0),
        (5, "g_proj", "blocks.1", 3),
        (8, "q_proj", "8", ...),
    )
    for layer, weight, block, index in places:
        torch = tensors[f"model.layers.{layer}.self_attn.{weight}.weight"]
        found = single[f"layers.{layer}.self_attn.{weight}.kernel"]
        assert found.dtype == torch.dtype and np.array_equal(np.asarray(found), torch.T)
        stacked = scanned[f"layers.{block}.self_attn.{weight}.kernel"][index]
        assert np.array_equal(np.asarray(stacked, np.float32), torch.T.astype(np.float32))
    conv = tensors["model.layers.1.self_attn.q_conv1d.weight"]
    assert np.array_equal(np.asarray(single["layers.1.self_attn.q_conv1d.weight"]), conv[:, 0].T)
    patch = tensors["visual.patch_embed.proj.weight"]
    assert np.array_equal(np.asarray(single["visual.patch_embed.kernel"]), patch.reshape(16, -1).T)
    assert np.array_equal(
        np.asarray(single["visual.merger.fc2.bias"]), tensors["visual.merger.mlp.2.bias"]
    )
    bias = tensors["visual.blocks.2.attn.proj.bias"]
    assert np.array_equal(np.asarray(single["visual.blocks.2.attn.proj.bias"]), bias)


@pytest.mark.parametrize("kind", ["hf", "ours"])
def test_dtype(folders, kind):
    _, own = load_params(folders[kind], scanned=False)
    assert {p.dtype for p in own.values()} == {BF16, np.dtype(np.float32)}
    for dtype in ("float32", "bfloat16"):
        _, cast = load_params(folders[kind], scanned=False, dtype=dtype)
        assert equal(cast, {n: p.astype(dtype) for n, p in own.items()})


@pytest.mark.parametrize("kind", ["hf", "ours"])
@pytest.mark.parametrize("scanned", [True, False])
def test_mesh(folders, kind, scanned):
    """On 4 x 2 devices: the same numbers, laid out as asked."""
    config, whole = load_params(folders[kind], scanned=scanned)
    shardings = parameter_shardings(parameters(config, scanned=scanned), mesh(4, 2))
    _, spread = load_params(folders[kind], scanned=scanned, shardings=shardings)
    assert equal(whole, spread)
    assert all(spread[n].sharding == shardings[n] for n in spread)
    if scanned:
        big = spread["layers.blocks.0.mlp.up_proj.kernel"]
        assert {s.data.size for s in big.addressable_shards} == {big.size // 8}
    one = {n: SingleDeviceSharding(jax.devices()[3]) for n in whole}
    _, placed = load_params(folders[kind], scanned=scanned, shardings=one)
    assert equal(whole, placed) and placed["norm.weight"].devices() == {jax.devices()[3]}


@pytest.mark.parametrize("damage", ["none", "zeros", "lost"])
def test_threads_leave_the_process_as_it_was(folders, tmp_path, caplog, damage):
    """Hooks and loggers belong to the program around us, while folders load side by side and after;
    one message says it all."""
    shutil.copytree(folders["ours"], tmp_path / "ours")
    for path in (tmp_path / "ours" / "params").rglob("d/*"):
        if damage == "lost":
            path.unlink()
        elif damage == "zeros":
            path.write_bytes(b"\0" * path.stat().st_size)

    def state():
        absl = logging.getLogger("absl")
        return (
            sys.unraisablehook,
            threading.excepthook,
            sys.excepthook,
            absl.level,
            absl.disabled,
            list(absl.filters),
        )

    before, seen, results = state(), [], []

    def load():
        for _ in range(2):
            try:
                results.append(len(load_params(tmp_path / "ours", scanned=True)[1]))
            except InfiniteVLError as error:
                results.append(error.culprit)
            seen.append(state())

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(state())
        threads[0].join(0.01)
        for thread in threads[1:]:
            thread.join(0.01)
    assert all(found == before for found in seen) and state() == before
    assert len(results) == 8 and len(set(results)) == 1
    if damage != "none":
        assert "cannot be read" in results[0] and not caplog.records


def test_each_device_reads_only_its_shard(tmp_path):
    """Bytes taken from a Hugging Face folder: the devices' shards together, and not one byte
    more."""
    source = open_source(hybrid_folder(tmp_path / "src"))
    config, whole = load_params(tmp_path / "src", scanned=True)
    wanted = leaves(config, scanned=True)
    shardings = parameter_shardings(parameters(config, scanned=True), mesh(4, 2))
    params = from_source(source, wanted, None, shardings)
    assert equal(whole, params)
    assert source.bytes_read == sum(p.nbytes for p in params.values())  # replicas are read once

    # What one device of the eight would read alone, as a process with that device does.
    before = source.bytes_read
    for leaf in wanted:
        index = shardings[leaf.name].addressable_devices_indices_map(leaf.shape)[jax.devices()[5]]
        part = read_leaf(source, leaf, BF16, index)
        shard = next(
            s for s in params[leaf.name].addressable_shards if s.device == jax.devices()[5]
        )
        assert np.array_equal(part, np.asarray(shard.data))
    alone = source.bytes_read - before
    assert alone == sum(p.addressable_shards[5].data.nbytes for p in params.values())
    assert alone < 0.25 * sum(p.nbytes for p in params.values())


def test_each_device_reads_only_its_shard_of_ours(tmp_path):
    """The same of our folder, whose chunks follow no mesh: counted by the kernel."""
    shape = (2, 2048, 4096)
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    write_arrays(tmp_path, "params", [LazyArray("w", value.nbytes, lambda: value)])
    reader = ArrayReader(tmp_path, "params")

    def read_bytes():
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    for spec in (PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, None, "fsdp")):
        sharding = NamedSharding(
            jax.make_mesh((8, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2), spec
        )
        before = read_bytes()
        whole = place(shape, sharding, lambda index: reader.read("w", index))
        assert np.array_equal(np.asarray(whole), value)
        assert (
            read_bytes() - before < 1.2 * value.nbytes
        )  # all eight together; were each to read it all, 8 times


@pytest.mark.parametrize("kind", ["pipe", "device", "nothing", "circle"])
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_stored_file_that_is_none_is_refused_at_once(folders, tmp_path, name, kind):
    ours = shutil.copytree(folders["ours"], tmp_path / "ours")
    path = ours / "params" / "state" / name
    path.unlink()
    target = {"device": "/dev/zero", "nothing": "no", "circle": path}
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(target[kind])
    with pytest.raises(InfiniteVLError, match=f"{name} is not a regular file"):
        load_params(ours, scanned=True)
