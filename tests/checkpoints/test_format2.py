"""Checkpoints as format 2 wrote them, before parameters were stored layer by layer, still open.

data/format2-*.tar.xz were written by the code of that time: a hybrid of nine layers ([S, L, L, L]
twice, and one more) with bf16 and f32 tensors, imported, and a step of its training.
"""

import json
import re
import shutil
import tarfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_folders import BF16, read_folder

from infinitevl_jax.checkpoints import export_folder, inspect_folder, load_params, read_config
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.save import run_manifest
from infinitevl_jax.checkpoints.weights import leaves
from infinitevl_jax.config.train import OptimizerConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.params import parameters, stack_layouts
from infinitevl_jax.sharding import parameter_shardings
from infinitevl_jax.train.checkpoints import Checkpoints, abstract_state
from infinitevl_jax.train.optimizer import make_optimizer
from infinitevl_jax.train.step import init_state

DATA = Path(__file__).parent / "data"


@pytest.fixture
def old(tmp_path):
    """Unpacks one of the archives."""

    def unpack(name):
        with tarfile.open(DATA / f"format2-{name}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path / name

    return unpack


def tensors(config) -> dict[str, np.ndarray]:
    """The torch tensors that were imported: every fifth is f32."""
    shapes = sorted(
        (name, leaf.torch_shape) for leaf in leaves(config, scanned=False) for name in leaf.torch
    )
    return {
        name: np.random.default_rng(zlib.crc32(name.encode()))
        .normal(size=shape)
        .astype(BF16 if i % 5 else np.float32)
        for i, (name, shape) in enumerate(shapes)
    }


def expected(config, scanned) -> dict[str, np.ndarray]:
    """The parameters in one layout: tensors turned to [in, out], in their own dtype; a stack of
    both is f32."""
    source, out = tensors(config), {}
    for leaf in leaves(config, scanned=scanned):
        parts = [source[name] for name in leaf.torch]
        parts = [(p.reshape(len(p), -1).T if leaf.transposed else p) for p in parts]
        dtype = parts[0].dtype if len({p.dtype for p in parts}) == 1 else np.float32
        value = np.stack(parts) if leaf.stacked else parts[0]
        out[leaf.name] = value.astype(dtype).reshape(leaf.shape)
    return out


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)


@pytest.mark.parametrize("scanned", [True, False])
def test_every_parameter_is_the_same(old, scanned):
    folder = old("imported")
    assert json.loads((folder / "infinitevl_jax.json").read_text())["format"] == 2
    config, params = load_params(folder, scanned=scanned)
    same(params, expected(config, scanned))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    shardings = parameter_shardings(parameters(config, scanned=scanned), mesh)
    _, spread = load_params(folder, scanned=scanned, shardings=shardings)
    same(spread, expected(config, scanned))
    assert all(spread[name].sharding == shardings[name] for name in spread)


def test_export_gives_the_source_back(old, tmp_path):
    folder = old("imported")
    export_folder(folder, tmp_path / "back")
    found = read_folder(tmp_path / "back")
    wanted = tensors(read_config(folder))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        spelled = "BF16" if value.dtype == BF16 else "F32"
        assert found[name] == (spelled, value.shape, value.tobytes()), name
    described = inspect_folder(folder)
    assert described.parameters == sum(value.size for value in wanted.values())


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_the_manifest_narrows_what_is_stored(old, tmp_path, dtype):
    """One layer of a stack of float32 said to be narrower: its values would lose digits without a
    word."""
    folder = old("imported")
    own = Manifest.read(folder).dtypes
    stacks = [leaf.torch for leaf in leaves(read_config(folder), scanned=True)]
    name = next(
        name
        for stack in stacks
        for name in stack
        if own[name] == np.float32
        and sum(own[n] == np.float32 for n in stack) > 1
        and sum(own[n] == BF16 for n in stack)
    )
    manifest = json.loads((folder / "infinitevl_jax.json").read_text())
    entry = next(t for file in manifest["files"] for t in file["tensors"] if t[0] == name)
    entry[1] = dtype
    (folder / "infinitevl_jax.json").write_text(json.dumps(manifest))
    for action in (
        lambda: load_params(folder, scanned=False),
        lambda: export_folder(folder, tmp_path / "back"),
    ):
        with pytest.raises(InfiniteVLError, match="cannot hold the values"):
            action()
    load_params(folder, scanned=True)


def test_a_run_goes_on(old, tmp_path):
    """A step of format 2: parameters, moments, counters and the place in the data; the next step is
    written layer by layer, beside it."""
    run = old("run")
    files = tmp_path / "files"
    files.mkdir()
    shutil.copy(run / "checkpoints" / "3" / "config.json", files)
    config = read_config(run / "checkpoints" / "3")
    params = expected(config, True)
    names = [n for n in params if "norm" in n or n.endswith("A_log") or "v_proj.bias" in n]
    params |= {name: params[name].astype(np.float32) for name in names}
    optimizer = make_optimizer(OptimizerConfig(), 10, parameters(config, scanned=True))
    shapes = jax.eval_shape(lambda: init_state(params, trainable=names, optimizer=optimizer))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = abstract_state(shapes, jax.tree.map(lambda _: here, shapes))

    manifest = Manifest.read(run / "checkpoints" / "3")
    layers = {name: p.layers for name, p in parameters(config, scanned=True).items()}
    checkpoints = Checkpoints(run, files, manifest, 3, layers=layers)
    for step in (3, 4):
        places = []
        state = checkpoints.restore(wanted, places.append)
        assert int(state.step) == step and places == [{"rows": 3, "skipped": {}}]
        same({**state.trainable, **state.frozen}, params)
        moments = jax.tree_util.tree_flatten_with_path(state.optimizer)[0]
        with np.load(DATA / "format2-moments.npz") as stored:
            assert len(moments) == len(stored.files)
            for path, value in moments:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                np.testing.assert_array_equal(np.asarray(value), stored[old_name(name, config)])
        checkpoints.save(state._replace(step=jnp.asarray(4, jnp.int32)), places[0])
    assert Manifest.read(run / "checkpoints" / "3").format == 2
    assert Manifest.read(run / "checkpoints" / "4").format == 4
    for step in ("3", "4"):
        same(load_params(run / "checkpoints" / step, scanned=True)[1], params)


def old_name(name: str, config) -> str:
    """The name that a moment had: what is in no block was counted from the first such layer."""

    def counted(found) -> str:
        stack, layer = found[1], int(found[2])
        return f"{stack}.rest.{layer - stack_layouts(config, scanned=True)[stack].stacked}."

    return re.sub(r"(?<=\.)(layers|visual\.blocks)\.(\d+)\.", counted, name)


def test_a_run_that_starts_from_it(old):
    """The dtypes of stacks, as the run will hold them."""
    folder = old("imported")
    config = read_config(folder)
    assert run_manifest(folder, config).dtypes == {
        name: expected(config, True)[leaf.name].dtype
        for leaf in leaves(config, scanned=True)
        for name in leaf.torch
    }


def test_of_another_model(old):
    folder = old("imported")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 12}))
    with pytest.raises(InfiniteVLError, match="extra: layers.blocks.0"):
        load_params(folder, scanned=False)
