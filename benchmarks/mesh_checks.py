"""Exact checks on a mesh.

A small float32 model is compared with one device. A checkpoint is written on a mesh and restored on
one device.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.mesh_training import Setting, Training  # before jax, for its memory

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.train_step import starter
from infinitevl_jax.config.model import ModelConfig, TextConfig, VisionConfig, hybrid_pattern
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.sharding import make_mesh
from infinitevl_jax.train.step import TrainState, state_shardings
from pallas_kernels.testing.parity import rel_rms

AGREE = 1e-5  # largest relative difference of losses, and of the RMS of each gradient
# of plain gradient descent: Adam would turn a gradient that is only rounding into a full step
RATE = 1e-4


def small_model() -> ModelConfig:
    """One layer of each kind, two tower blocks, all sizes multiples of eight.

    It is shallow because each layer amplifies rounding. Its head is untied because a tied head
    amplifies rounding, too.
    """
    text = TextConfig(
        hybrid_pattern(2, period=2),
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=192,
        mrope_section=(4, 6, 6),
        num_linear_heads=8,
        linear_head_dim=32,
        tie_word_embeddings=False,
    )
    vision = VisionConfig(
        depth=2,
        hidden_size=128,
        intermediate_size=256,
        num_heads=8,
        patch_size=4,
        window_size=16,
        out_hidden_size=256,
        fullatt_block_indexes=(1,),
    )
    return ModelConfig(
        text,
        vision,
        image_token_id=1001,
        video_token_id=1002,
        vision_start_token_id=1003,
        vision_end_token_id=1004,
        pad_token_id=0,
        eos_token_ids=(1005,),
    )


def small_setting(rows: int) -> Setting:
    """All in float32. The Hopper kernels do not take it, so `xla` runs."""
    return Setting(
        small_model(),
        "all",
        rows,
        steps=3,
        length=256,
        images=1,
        grid=(1, 16, 16),
        remat="none",
        dtype="float32",
        attend="xla",
        gated_delta_rule="xla",
    )


def float32_agreement(meshes: Sequence[Mapping[str, int]], rows: int, results) -> None:
    """Compare three steps of gradient descent on every mesh with one device.

    Compared are the losses and all gradients of the last step.
    """
    setting = small_setting(rows)
    begin = starter(setting.config, jnp.float32)
    optimizer = optax.chain(optax.trace(0.0), optax.scale(-RATE))  # trace stores the gradient
    gradients, losses = {}, []

    def run(axes) -> dict:
        with jax.default_matmul_precision("highest"):
            training = Training(setting, axes, begin, optimizer).train(setting.batches)
        found = {name: np.asarray(g) for name, g in training.state.optimizer[0].trace.items()}
        figures = training.summary()
        if not axes:
            gradients.update(found)
            losses.extend(figures["loss"])
            return figures
        return figures | agreement(figures["loss"], losses, found, gradients)

    for axes in ({}, *meshes):
        results.attempt("float32", setting, axes, lambda axes=axes: run(axes))


def agreement(
    losses: Sequence[float], wanted: Sequence[float], gradient: Mapping, expected: Mapping
) -> dict:
    """The largest relative difference of a loss and of a gradient, and the name of the latter.

    Has a `problem` if one is above `AGREE`.
    """
    if not wanted:
        return {"problem": "there is no result of one device to compare with"}
    loss = float(np.max(np.abs(np.divide(losses, wanted) - 1)))
    apart = {name: rel_rms(gradient[name], value) for name, value in expected.items()}
    worst = max(apart, key=lambda name: np.nan_to_num(apart[name], nan=np.inf))
    found = {"loss_apart": loss, "gradient_apart": apart[worst], "gradient_apart_of": worst}
    if not loss <= AGREE:
        return found | {"problem": f"a loss is {loss:.1e} off, allowed are {AGREE:.0e}"}
    if not apart[worst] <= AGREE:
        return found | {
            "problem": (
                f"the gradient of {worst} is {apart[worst]:.1e} off, allowed are {AGREE:.0e}"
            )
        }
    return found


def restored_alone(setting: Setting, axes: Mapping[str, int], begin, folder: str | None) -> dict:
    """Train two steps on a mesh, save a checkpoint and restore it on one device.

    Every bit of every array must be equal.

    folder: on a disk with room for the state; a temporary folder is created in it.
    """
    from infinitevl_jax.checkpoints.manifest import Manifest
    from infinitevl_jax.train.checkpoints import (
        Checkpoints,
        abstract_state,
    )  # imported here because it needs the extra `run`

    training = Training(setting, axes, begin).train(setting.batches[:2])
    state = training.state
    one = make_mesh(RunConfig(fsdp=1), jax.devices()[:1])
    with tempfile.TemporaryDirectory(dir=folder) as place:
        files = Path(place) / "files"
        files.mkdir()
        checkpoints = Checkpoints(Path(place) / "run", files, Manifest(), keep=1)
        started = time.perf_counter()
        path = checkpoints.save(state, {})
        written = time.perf_counter()
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        shapes, known = jax.eval_shape(lambda: state), parameters(setting.config, scanned=True)
        restored = checkpoints.restore(
            abstract_state(shapes, state_shardings(shapes, known, one)), lambda place: None
        )
        jax.block_until_ready(restored)
        figures = {
            "written_s": round(written - started, 1),
            "restored_s": round(time.perf_counter() - written, 1),
        }
    figures |= {"checkpoint_GB": round(size / 1e9, 2), "loss": training.losses}
    return figures | compared(state, restored)


def compared(state: TrainState, restored: TrainState) -> dict:
    """The number of arrays that are bit-identical.

    Instead, the `problem` if an array differs or is not on one device.
    """
    pairs = list(zip(jax.tree.leaves_with_path(state), jax.tree.leaves(restored), strict=True))
    for (path, before), after in pairs:
        if len(after.sharding.device_set) != 1:
            return {
                "problem": (
                    f"{jax.tree_util.keystr(path)} was restored to {len(after.sharding.device_set)}"
                    " devices"
                )
            }
        a, b = np.asarray(before), np.asarray(after)
        if (a.dtype, a.shape) != (b.dtype, b.shape) or a.tobytes() != b.tobytes():
            return {"problem": f"{jax.tree_util.keystr(path)} differs after it was restored"}
    return {"arrays_equal": len(pairs)}
