"""Timing of training steps on random rows, and their MFU."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.timing import summary
from benchmarks.trace import kernels, table
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.train.step import TrainState, put_batch

PEAK = {"H100": 989e12, "H200": 989e12}  # bf16 FLOP/s without sparsity
GRID = (1, 32, 32)  # patches of an image: 448 x 448 pixels
# texts are drawn from so few tokens that they can be learnt, and the loss falls
WORDS = 1000


def random_batch(
    config: ModelConfig, rng: np.random.Generator, length: int, images: int, grid=GRID
) -> TrainBatch:
    """One full row: images, then random text as the answer."""
    pads = grid[0] * grid[1] * grid[2] // config.vision.merge_unit if images else 0
    words = min(WORDS, config.image_token_id, config.vision_start_token_id)
    image = [
        config.vision_start_token_id,
        *[config.image_token_id] * pads,
        config.vision_end_token_id,
    ]
    head = np.array(image * images, np.int32)
    row = np.concatenate([head, rng.integers(1, words, length + 1 - len(head), np.int32)])
    vision = {}
    if images:
        pixels = rng.standard_normal(
            (images * int(np.prod(grid)), config.vision.patch_features), np.float32
        )
        vision = {"pixel_values": pixels, "image_grid_thw": np.array([grid] * images)}
    inputs = build_inputs(config, row[None, :-1], **vision, patches_by_row=True)
    weights = (np.arange(1, length + 1) >= len(head)).astype(np.float32)
    return TrainBatch(inputs.patches, None, inputs.decoder, None, row[None, 1:], weights[None])


def mfu(flops: float, milliseconds: float, devices: int) -> float | None:
    """Model FLOPs utilisation of a step; None if `PEAK` lacks this kind of device."""
    kind = jax.devices()[0].device_kind
    peak = next((rate for name, rate in PEAK.items() if name in kind), None)
    return peak and round(flops / (milliseconds * 1e-3) / peak / devices, 4)


def memory_figures(compiled) -> dict[str, float]:
    """GB per device of a compiled step: what it is given and returns, and what it needs besides."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "state_GB": round(held / 1e9, 2),
        "temporaries_GB": round(memory.temp_size_in_bytes / 1e9, 2),
    }


def time_steps(
    step: Callable,
    state: TrainState,
    mesh: Mesh,
    draw: Callable[[], TrainBatch],
    flops: Mapping[str, float],
    *,
    steps: int,
    warmup: int,
    profile: str | None,
) -> dict:
    """Figures of a step on a mesh of one device: time, memory, losses, FLOPs and MFU.

    Args:
      step: maps a state, which it takes over, and a batch to the new state and metrics.
      draw: makes the next batch on the host.
      flops: of a step, by term.
      steps: timed steps, after `warmup` steps.
      profile: folder for a trace of two further steps.
    """
    times, losses = [], []

    def one(state):
        batch = draw()
        placed = jax.block_until_ready(put_batch(batch, mesh))
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, placed))
        times.append((time.perf_counter() - started) * 1e3)
        losses.append(float(metrics.loss))
        return state, batch.branches.tokens.size

    with jax.set_mesh(mesh):
        for _ in range(warmup + steps):
            state, tokens = one(state)
        step_ms = summary(times[warmup:], 2) | {"steps": steps}
        stats = jax.devices()[0].memory_stats() or {}
        if profile:
            with jax.profiler.trace(profile):
                for _ in range(2):
                    state, _ = one(state)
            print(table(kernels(profile)), flush=True)
    total = sum(flops.values())
    return {
        "step_ms": step_ms,
        "tokens_per_s": round(tokens / step_ms["median"] * 1e3, 1),
        "TFLOP": {term: round(count / 1e12, 3) for term, count in flops.items()}
        | {"all": round(total / 1e12, 2)},
        "mfu": mfu(total, step_ms["median"], 1),
        # of the process: it cannot be reset
        "peak_GB_so_far": round(stats.get("peak_bytes_in_use", 0) / 1e9, 2),
        "loss": [round(loss, 4) for loss in (losses[0], losses[len(losses) // 2], losses[-1])],
        "loss_finite": bool(np.isfinite(losses).all()),
        "loss_fell": losses[-1] < losses[0],
    }
