"""Training on one mesh of this host's devices: the runs that `benchmarks.meshes` compares.

Every mesh trains on the same rows. They are processed together, or a few at a time with their
gradients averaged in float32. One GPU cannot hold the activations of all rows; with a few at a time
it computes the same step as a mesh whose devices hold one row each.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

# the rest of the memory is for NCCL's buffers and the driver
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")

from benchmarks.train_step import LAYERS, TRAIN, compile_step  # noqa: E402  before jax

import jax  # noqa: E402  # isort: skip
import numpy as np  # noqa: E402
import optax  # noqa: E402

from benchmarks.step_timing import GRID, mfu, random_batch  # noqa: E402
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

WARMUP = 3  # first steps, whose times do not count
SEED = 0  # of the random rows

# trained parameters: the two sets whose FLOPs `train_flops` counts, and all
TRAINED = TRAIN | {"all": [".*"]}

Rows = list[TrainBatch]  # one row each, on the host


@dataclass(frozen=True)
class Setting:
    """Model, rows and run settings, without the mesh.

    Attributes:
      train: a key of `TRAINED`.
      rows: rows per step, over all devices. at_once: rows per pass; None: all.
      length: tokens per row. images: images per row, of `grid` patches each.
      compiler_options: pairs of name and value.
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
    compiler_options: tuple[tuple[str, str], ...] = ()

    @property
    def batches(self) -> list[Rows]:
        """The rows of every step.

        All rows have the same number of answer tokens, so the mean of their losses is the mean over
        tokens.
        """
        return synthetic_rows(
            self.config, self.rows, self.steps, self.length, self.images, self.grid
        )

    def words(self) -> dict:
        """The setting as recorded in a line of results."""
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
        options = {"compiler_options": dict(self.compiler_options)} if self.compiler_options else {}
        return {name: getattr(self, name) for name in named} | {
            "at_once": self.at_once or self.rows,
            "patches": patches,
            "seed": SEED,
            **options,
        }

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW without warm-up, so that the first steps change the parameters."""
        return make_optimizer(
            OptimizerConfig(peak_lr=self.peak_lr, warmup=0.0),
            1000,
            parameters(self.config, scanned=True),
        )


@lru_cache(maxsize=1)
def synthetic_rows(
    config: ModelConfig, rows: int, steps: int, length: int, images: int, grid: tuple[int, int, int]
) -> list[Rows]:
    """Images and random text: the same for the same step and row on every mesh."""

    def row(step: int, place: int) -> TrainBatch:
        return random_batch(
            config, np.random.default_rng((SEED, step, place)), length, images, grid
        )

    return [[row(step, place) for place in range(rows)] for step in range(steps)]


def joined(rows: Sequence[TrainBatch]) -> TrainBatch:
    """Several batches concatenated along their batch axes."""

    def concatenate(axes, *leaves):
        return np.concatenate(leaves, axes.index("batch"))

    return jax.tree.map(
        concatenate,
        batch_axes(rows[0]),
        *rows,
        is_leaf=lambda x: isinstance(x, tuple) and "batch" in x,
    )


class Training:
    """A training state on a mesh and its compiled step."""

    def __init__(
        self,
        setting: Setting,
        axes: Mapping[str, int],
        begin,
        optimizer: optax.GradientTransformation | None = None,
    ):
        """
        Args:
          axes: sizes of the mesh axes, {"fsdp": 2, "tensor": 2}; the others have size 1.
          begin: returns the parameters, the same ones at each call.
          optimizer: None: the one of the setting.
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
        known = parameters(setting.config, scanned=True)
        names, _ = split_trainable(known, TRAINED[setting.train])
        layers = [layer for name in names for layer in known[name].layers]
        first = setting.batches[0]
        self.flops = (
            sum(step_flops(setting.config, layers, joined(first)).values())
            if setting.train in TRAIN
            else None
        )
        part = joined(first[: self.at_once])
        self._step, self.state, self.figures = compile_step(
            setting.config,
            run,
            self.mesh,
            optimizer,
            names,
            begin,
            part,
            dict(setting.compiler_options),
        )
        ops = resolve_ops(self.mesh, run.ops)
        self.figures["ran"] = ops.report()
        self.losses, self.norms, self.times = [], [], []

    def train(self, batches: Sequence[Rows], say=print) -> "Training":
        """Train one step for each element of `batches`.

        Records per step the mean loss over its rows, the largest gradient norm of its passes, and
        milliseconds from the rows on the devices to the end of the step.
        """
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
        """Figures of the steps so far: losses, time, tokens/s per device, MFU, peak GB of each
        device."""
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
            ],  # of the process: it cannot be reset
        }

    def profile(self, folder: str, steps: int = 2) -> dict:
        """Shares of the GPUs' busy time spent in collectives, over `steps` further steps.

        Prints the kernels.
        """
        with jax.profiler.trace(folder):
            self.train(self.setting.batches[:steps])
        found = kernels(folder)
        print(table(found, 30), flush=True)
        return {name: round(share, 4) for name, share in collective_share(found).items()}


def one_gpu(setting: Setting, at_once: int = 1) -> Setting:
    """The same rows, `at_once` at a time.

    The saved activations of two rows do not fit in 80 GB, so they are recomputed.
    """
    return replace(setting, at_once=at_once, remat=setting.remat if at_once == 1 else "full")
