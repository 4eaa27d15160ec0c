"""Training on one mesh of this host's devices, over rows that are given: the runs that
`benchmarks.meshes` compares.

The rows of a step are the same on every mesh. They pass at once, or in turn, a few at a time, with
their gradients averaged in float32: so one GPU, which cannot hold the activations of all of them,
  makes the same step as a mesh whose devices hold one row each.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

# what the allocator leaves is for NCCL's buffers and the driver
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")

from benchmarks.train_step import (
    GRID,
    LAYERS,
    TRAIN,
    compile_step,
    mfu,
    random_batch,
)  # noqa: E402  before jax, for its memory

import jax  # noqa: E402  # isort: skip
import numpy as np  # noqa: E402
import optax  # noqa: E402

from benchmarks.timing import summary  # noqa: E402
from benchmarks.trace import collective_share, kernels, table  # noqa: E402
from benchmarks.train_flops import step_flops  # noqa: E402
from infinitevl_jax.config.model import ModelConfig, infinitevl_4b  # noqa: E402
from infinitevl_jax.config.run import OpsConfig, RunConfig  # noqa: E402
from infinitevl_jax.config.train import OptimizerConfig  # noqa: E402
from infinitevl_jax.data.batch import TrainBatch  # noqa: E402
from infinitevl_jax.nn.ops import resolve_ops  # noqa: E402
from infinitevl_jax.nn.params import parameters  # noqa: E402
from infinitevl_jax.sharding import make_mesh  # noqa: E402
from infinitevl_jax.train.optimizer import make_optimizer, split_trainable  # noqa: E402
from infinitevl_jax.train.step import batch_axes, put_batch  # noqa: E402

WARMUP = 3  # steps whose losses count and whose times do not
SEED = 0  # of the rows

# what trains: the two whose arithmetic `train_flops` counts, and everything
TRAINED = TRAIN | {"all": [".*"]}

Rows = list[TrainBatch]  # each of one row, on the host


@dataclass(frozen=True)
class Setting:
    """What is trained on what, the mesh apart.

    train: of `TRAINED`. rows: of a step, over all devices. at_once: how many of them go through in
      one pass, None for all.
    length: tokens of a row. images: in each row, of `grid` patches.
    """

    config: ModelConfig = infinitevl_4b()
    train: str = "mixers"
    rows: int = 1
    at_once: int | None = None
    steps: int = 30
    length: int = 8192
    images: int = 4
    grid: tuple[int, int, int] = GRID
    remat: str = "dots"
    layers: str = "scanned"
    dtype: str = "bfloat16"
    attend: str | None = None
    gated_delta_rule: str | None = None
    peak_lr: float = 1e-4

    @property
    def batches(self) -> list[Rows]:
        """The rows of every step. Each has as many answer tokens: the mean over rows of their
        losses is the mean over tokens."""
        return synthetic_rows(
            self.config, self.rows, self.steps, self.length, self.images, self.grid
        )

    def words(self) -> dict:
        """The setting as it stands in a line of results."""
        named = (
            "train",
            "rows",
            "steps",
            "length",
            "remat",
            "layers",
            "dtype",
            "attend",
            "gated_delta_rule",
            "peak_lr",
        )
        patches = self.images * int(np.prod(self.grid))
        return {name: getattr(self, name) for name in named} | {
            "at_once": self.at_once or self.rows,
            "patches": patches,
            "seed": SEED,
        }

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW, without a warm-up so that the first steps move."""
        return make_optimizer(
            OptimizerConfig(peak_lr=self.peak_lr, warmup=0.0),
            1000,
            parameters(self.config, scanned=True),
        )


@lru_cache(maxsize=1)
def synthetic_rows(
    config: ModelConfig, rows: int, steps: int, length: int, images: int, grid: tuple[int, int, int]
) -> list[Rows]:
    """Images and random text, the same numbers for the same step and row whatever the mesh."""

    def row(step: int, place: int) -> TrainBatch:
        return random_batch(
            config, np.random.default_rng((SEED, step, place)), length, images, grid
        )

    return [[row(step, place) for place in range(rows)] for step in range(steps)]


def joined(rows: Sequence[TrainBatch]) -> TrainBatch:
    """One batch of several, along their batch axes."""

    def concatenate(axes, *leaves):
        return np.concatenate(leaves, axes.index("batch"))

    return jax.tree.map(
        concatenate,
        batch_axes(rows[0]),
        *rows,
        is_leaf=lambda x: isinstance(x, tuple) and "batch" in x,
    )


class Training:
    """A state on a mesh and its compiled step."""

    def __init__(
        self,
        setting: Setting,
        axes: Mapping[str, int],
        begin,
        optimizer: optax.GradientTransformation | None = None,
    ):
        """
        Args:
          axes: parts of the mesh's axes, {"fsdp": 2, "tensor": 2}; those left out have one.
          begin: gives the parameters, the same at each call.
          optimizer: the setting's, if None.
        """
        run = RunConfig(
            **{"fsdp": 1, **axes},
            dtype=setting.dtype,
            remat=setting.remat,
            scan=LAYERS[setting.layers],
            ops=OpsConfig(attention=setting.attend, gated_delta_rule=setting.gated_delta_rule),
        )
        self.setting, self.mesh = setting, make_mesh(run)
        self.at_once = setting.at_once or setting.rows
        parts, over = divmod(setting.rows, self.at_once)
        if over:
            raise ValueError(f"{setting.rows} rows are not a multiple of {self.at_once} at once")
        optimizer = optimizer or setting.optimizer()
        if parts > 1:
            optimizer = optax.MultiSteps(optimizer, parts).gradient_transformation()
        names, _ = split_trainable(parameters(setting.config, scanned=True), TRAINED[setting.train])
        first = setting.batches[0]
        self.flops = (
            sum(step_flops(setting.config, names, joined(first)).values())
            if setting.train in TRAIN
            else None
        )
        part = joined(first[: self.at_once])
        self._step, self.state, self.figures = compile_step(
            setting.config, run, self.mesh, optimizer, names, begin, part
        )
        ops = resolve_ops(self.mesh, run.ops)
        self.figures["ran"] = ops.report()
        self.losses, self.norms, self.times = [], [], []

    def train(self, batches: Sequence[Rows], say=print) -> "Training":
        """A step for each element of `batches`. Losses are means over all rows of a step,
        gradients' norms the largest of a pass, times milliseconds from the rows on the devices to
        the step's end."""
        for count, rows in enumerate(batches, 1):
            with jax.set_mesh(self.mesh):
                parts = [rows[at : at + self.at_once] for at in range(0, len(rows), self.at_once)]
                parts = jax.block_until_ready(
                    [put_batch(joined(part), self.mesh) for part in parts]
                )
                started, metrics = time.perf_counter(), []
                for part in parts:
                    self.state, done = self._step(self.state, part)
                    metrics.append(done)
                jax.block_until_ready(self.state)
            self.times.append((time.perf_counter() - started) * 1e3)
            self.losses.append(float(np.mean([float(m.loss) for m in metrics])))
            self.norms.append(float(np.max([float(m.grad_norm) for m in metrics])))
            if count % 10 == 0:
                say(
                    f"  step {count}: loss {self.losses[-1]:.4f}, {self.times[-1]:.0f} ms",
                    flush=True,
                )
        return self

    def summary(self) -> dict:
        """Figures of the steps done: losses, time, tokens/s a device, MFU, and gigabytes each
        device has held at most."""
        timed = self.times[WARMUP:] or self.times
        step_ms = summary(timed, 2) | {"steps": len(timed)}
        tokens = self.setting.rows * self.setting.length
        devices = list(self.mesh.devices.flat)
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices]
        return self.figures | {
            "loss": list(self.losses),
            "grad_norm": [round(norm, 4) for norm in self.norms],
            "step_ms": step_ms,
            "tokens_per_s_per_device": round(tokens / step_ms["median"] * 1e3 / len(devices), 1),
            "mfu": self.flops and mfu(self.flops, step_ms["median"], len(devices)),
            "peak_GB_so_far": [
                round(peak / 1e9, 2) for peak in peaks
            ],  # of the process: it cannot be set back
        }

    def profile(self, folder: str, steps: int = 2) -> dict:
        """Shares of the GPUs' busy time that collectives took over some steps more; what ran is
        printed."""
        with jax.profiler.trace(folder):
            self.train(self.setting.batches[:steps])
        found = kernels(folder)
        print(table(found, 30), flush=True)
        return {name: round(share, 4) for name, share in collective_share(found).items()}


def one_gpu(setting: Setting, at_once: int = 1) -> Setting:
    """The same rows, few at a time. Two rows' kept activations do not fit on 80 GB, so that these
    are computed again."""
    return replace(setting, at_once=at_once, remat=setting.remat if at_once == 1 else "full")
