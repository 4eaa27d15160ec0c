"""Teacher and student side by side, for figures of a student's checkpoints."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from infinitevl_jax import InfiniteVL, checkpoints
from infinitevl_jax.checkpoints.newest import checkpoint_folder
from infinitevl_jax.config.objective import DistillConfig, SupervisedConfig
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.student import TeacherConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.nn.params import Params, parameters
from infinitevl_jax.processing import Processor
from infinitevl_jax.serve.engine import Engine
from infinitevl_jax.sharding import make_mesh, parameter_shardings
from infinitevl_jax.train.models import Teacher, common_layout
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER, Measured
from infinitevl_jax.train.step import Bind, StageLoss, model_of, put_batch

SLOTS = 16  # sequences that are generated at a time


class Pair:
    """A teacher and a student, on one device.

    Programs are compiled once for all checkpoints of a student.

    Attributes:
      config: of the student.
    """

    def __init__(self, teacher: Path, student: Path, run: RunConfig):
        """student: a checkpoint folder, or a run's for its newest checkpoint."""
        self.run = dataclasses.replace(run, data=1, fsdp=1, tensor=1, remat="none")
        self.mesh = make_mesh(self.run)
        ops = resolve_ops(self.mesh, run.ops)
        folder = checkpoint_folder(teacher)
        self.config = checkpoints.read_config(checkpoint_folder(student))
        source = TeacherConfig(str(folder))
        self._teacher = Teacher(checkpoints.read_config(folder), folder, source)
        self._layout = common_layout(self.config, self._teacher.config)
        binds: dict[str, Bind] = {
            STUDENT: model_of(self.config, self.run, ops, self._layout),
            TEACHER: self._teacher.bind(self.run, ops, self._layout),
        }
        self._compare = jax.jit(StageLoss(DistillConfig(cross_entropy=1.0), binds))
        self._alone = {
            name: jax.jit(StageLoss(SupervisedConfig(), {STUDENT: bind}))
            for name, bind in binds.items()
        }
        with jax.set_mesh(self.mesh):
            self._params = {TEACHER: self._teacher.load(self._layout, self.mesh)}
        self.processor = Processor.from_pretrained(folder)
        self._folders = {TEACHER: folder}
        self._engines: dict[str, Engine] = {}
        self.open(student)

    def open(self, student: Path) -> None:
        """Take another checkpoint of the student."""
        folder = checkpoint_folder(student)
        if self._folders.get(STUDENT) == folder:
            return
        self._folders[STUDENT] = folder
        self._params.pop(STUDENT, None)  # one student at a time
        known = parameters(self.config, scanned=self._layout)
        places = parameter_shardings(known, self.mesh)
        self._params[STUDENT] = checkpoints.load_params(
            folder, scanned=self._layout, shardings=places
        )[1]
        if STUDENT in self._engines:  # whose programs stay
            self._engines[STUDENT].model = self._model(STUDENT)

    def engine(self, name: str, max_length: int) -> Engine:
        """The student or the teacher, to generate with.

        max_length: tokens of a sequence.
        """
        if name not in self._engines:
            model = self._model(name)
            self._engines[name] = Engine(model, slots=SLOTS, rows=SLOTS, max_length=max_length)
        return self._engines[name]

    def _model(self, name: str) -> InfiniteVL:
        return InfiniteVL.from_pretrained(self._folders[name], dtype=self.run.dtype)

    def compare(self, batches: Iterable[TrainBatch]) -> dict[str, float]:
        """Means of the distillation objective: `kl`, `cross_entropy`, `accuracy`, `agreement`; and
        `tokens`, their number."""
        params: dict[str, Params] = {TEACHER: self._params[TEACHER]}
        return self._mean(self._compare, batches, self._params[STUDENT], params)

    def alone(self, name: str, batches: Iterable[TrainBatch]) -> dict[str, float]:
        """Means of the supervised objective of one model: `loss`, `accuracy`, `exact`; and
        `tokens`."""
        return self._mean(self._alone[name], batches, self._params[name], {})

    def _mean(
        self,
        loss: Callable[..., Measured],
        batches: Iterable[TrainBatch],
        params: Params,
        held: dict[str, Params],
    ) -> dict[str, float]:
        sums: dict[str, np.ndarray] = {}
        tokens = 0.0
        with jax.set_mesh(self.mesh):
            for batch in batches:
                tokens += float(np.sum(batch.weights))
                found = loss(params, {}, put_batch(batch, self.mesh), held)
                for name, mean in {"loss": found.loss[-1], **found.logged}.items():
                    pair = np.array([mean.total, mean.weight], np.float64)
                    sums[name] = sums.get(name, 0.0) + pair
        means = {name: float(total / max(weight, 1)) for name, (total, weight) in sums.items()}
        return {**means, "tokens": tokens}
