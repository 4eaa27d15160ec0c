"""An attention language model becomes a hybrid, stage by stage, on text files.

Examples:

    # all stages of linearise.toml; the same command goes on where it was stopped
    python -m benchmarks.training.linearise SmolLM2 texts runs/linearise --minutes 25

    # from the authors' initialisation, in another folder
    python -m benchmarks.training.linearise SmolLM2 texts runs/paper mixers.initialise.name=paper

    # only the figures of what is there
    python -m benchmarks.training.linearise SmolLM2 texts runs/linearise --evaluate

The teacher is a checkpoint folder with tokenizer. Texts are UTF-8 files, one for each document,
plain or .xz, in a subfolder for each corpus. Every 20th document is held out, and all of the
corpora that the configuration calls `unseen`.

OUT/log.jsonl has a line for every few steps, and after the initialisation and each stage the
figures: perplexity of teacher and student on every corpus, divergence, greedy agreement; and at
multiples of the training length the perplexity of a row's last tokens with the whole history, and
with that of the training length. OUT/STAGE/checkpoints holds the newest state of a stage.
"""

import argparse
import json
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.training.text import Corpus, batch_of, tails, training_batches
from infinitevl_jax import checkpoints
from infinitevl_jax.checkpoints.newest import checkpoint_folder
from infinitevl_jax.config.objective import DistillConfig, ObjectiveConfig, SupervisedConfig
from infinitevl_jax.config.presets import ModelSource, override, parse
from infinitevl_jax.config.ranges import Name, Positive, check_ranges
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.student import MixersConfig, TeacherConfig
from infinitevl_jax.config.train import LearningRateFactor, OptimizerConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.sharding import make_mesh
from infinitevl_jax.train.begin import begin_or_restore
from infinitevl_jax.train.checkpoints import Checkpoints
from infinitevl_jax.train.models import Teacher, common_layout, first_params, hold_teacher
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER, objective
from infinitevl_jax.train.optimizer import learning_rate_factors, make_optimizer, schedule
from infinitevl_jax.train.setup import Start, prepare_start
from infinitevl_jax.train.step import (
    StageLoss,
    TrainState,
    model_of,
    put_batch,
    train_step,
)

CONFIG = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class Stage:
    """A stage on text.

    Attributes:
      tokens: in all. step_tokens: of a step, in rows of `length`.
    """

    tokens: Positive
    step_tokens: Positive
    length: Positive
    trainable: tuple[Name, ...] | dict[Name, LearningRateFactor]
    objective: ObjectiveConfig = field(default_factory=SupervisedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self):
        check_ranges(self)

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.step_tokens)


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out text.

    Attributes:
      length: tokens of a row. rows: of each corpus.
      multiples: of the length, for the perplexity of the last tokens of a row.
    """

    length: Positive = 2048
    rows: Positive = 32
    multiples: tuple[Positive, ...] = (4, 16)


@dataclass(frozen=True)
class Plan:
    """A linearisation. Its stages, by name in the order of the file, are read beside it."""

    mixers: MixersConfig
    seed: int = 0
    unseen: tuple[Name, ...] = ()
    log_every: Positive = 20
    save_minutes: float = 4.0
    run: RunConfig = field(default_factory=RunConfig)
    evaluation: Evaluation = field(default_factory=Evaluation)


def read_plan(path: Path, changes: Sequence[str]) -> tuple[Plan, dict[str, Stage]]:
    """The plan and its stages."""
    tree = tomllib.loads(path.read_text("utf-8"))
    for change in changes:
        override(tree, change)
    stages = tree.pop("stages")
    return parse(Plan, tree, "", str(path)), {
        name: parse(Stage, table, f"stages.{name}", str(path)) for name, table in stages.items()
    }


class Linearisation:
    """Runs the stages, each from the one before."""

    def __init__(self, teacher: Path, texts: Path, out: Path, plan: Plan, minutes: float):
        self.plan, self.out, self.texts = plan, out, texts
        self.ends = time.monotonic() + 60 * minutes
        self.mesh = make_mesh(plan.run)
        self.ops = resolve_ops(self.mesh, plan.run.ops)
        self.folder = checkpoint_folder(teacher)
        source = TeacherConfig(str(self.folder))
        self.teacher = Teacher(checkpoints.read_config(self.folder), self.folder, source)
        (out / "log.jsonl").parent.mkdir(parents=True, exist_ok=True)
        self.corpora: list[Corpus] = []

    def log(self, **line: Any) -> None:
        text = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()})
        print(text, flush=True)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def logged(self, key: str, stage: str) -> bool:
        path = self.out / "log.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return any(key in line and line["stage"] == stage for line in map(json.loads, lines))

    def read_texts(self, start: Start) -> None:
        for folder in sorted(path for path in self.texts.iterdir() if path.is_dir()):
            trained = folder.name not in self.plan.unseen
            corpus = Corpus(folder, start.processor, self.out / "tokens", trained)
            self.corpora.append(corpus)

    def run(self, stages: Mapping[str, Stage], evaluate_only: bool = False) -> bool:
        """All stages, as far as the time goes. Returns whether they are finished."""
        source = ModelSource(from_=str(self.folder), mixers=self.plan.mixers)
        for number, (name, stage) in enumerate(stages.items()):
            folder = self.out / name
            folder.mkdir(exist_ok=True)
            done = folder / "checkpoints" / str(stage.steps)
            if done.exists() and self.logged("perplexity", name):
                source = ModelSource(from_=str(done))
                continue
            start = prepare_start(source, None, folder, self.plan.seed)
            if not self.corpora:
                self.read_texts(start)
            run = StageRun(self, name, stage, start)
            if number == 0 and not evaluate_only and not self.logged("perplexity", "start"):
                if run.step == 0:
                    self.evaluate("start", start, run.state, run.stacked)
            if not evaluate_only and not run.train():
                return False
            if run.step == stage.steps and not self.logged("perplexity", name):
                self.evaluate(name, start, run.state, run.stacked)
            if run.step < stage.steps:
                return False
            source = ModelSource(from_=str(run.checkpoints.path(run.step)))
            del run
        return True

    def evaluate(self, stage: str, start: Start, state: TrainState, stacked) -> None:
        """Log the figures of a student on all corpora."""
        wanted, began = self.plan.evaluation, time.monotonic()
        models = {
            STUDENT: model_of(start.config, self.plan.run, self.ops, stacked),
            TEACHER: self.teacher.bind(self.plan.run, self.ops, stacked),
        }
        compare = jax.jit(StageLoss(DistillConfig(cross_entropy=1.0), models))
        alone = jax.jit(StageLoss(SupervisedConfig(), {STUDENT: models[STUDENT]}))
        theirs = jax.jit(StageLoss(SupervisedConfig(), {STUDENT: models[TEACHER]}))
        held = {TEACHER: self.teacher.load(stacked, self.mesh)}

        def mean(pieces: Sequence[np.ndarray], first: int, loss, *params) -> dict[str, float]:
            """Means over rows of one piece each, from its place `first` on."""
            sums: dict[str, np.ndarray] = {}
            for piece in pieces:
                batch = put_batch(batch_of([[piece]], len(piece) - 1, first), self.mesh)
                found = loss(params[0], params[1], batch, *params[2:])
                terms = {"loss": found.loss[-1], **found.logged}
                for key, value in terms.items():
                    sums[key] = sums.get(key, 0) + np.array([value.total, value.weight], float)
            return {key: float(total / weight) for key, (total, weight) in sums.items()}

        own = state.trainable, state.frozen
        for corpus in self.corpora:
            pieces = tails(corpus.held_out, wanted.length, wanted.rows)
            if not pieces:
                continue
            both = mean(pieces, 0, compare, *own, held)
            known = mean(pieces, 0, theirs, held[TEACHER], {})
            line = {
                "perplexity": float(np.exp(both["cross_entropy"])),
                "teacher_perplexity": float(np.exp(known["loss"])),
                "kl": both["kl"],
                "agreement": both["agreement"],
            }
            line["ratio"] = line["perplexity"] / line["teacher_perplexity"]
            for multiple in wanted.multiples:
                length, last = multiple * wanted.length, wanted.length // 2
                longer = tails(corpus.held_out, length, max(1, wanted.rows // multiple))
                if longer:
                    short = [piece[-wanted.length - 1 :] for piece in longer]
                    full = mean(longer, length - last, alone, *own)["loss"]
                    near = mean(short, wanted.length - last, alone, *own)["loss"]
                    line[f"perplexity_{multiple}x"] = float(np.exp(full))
                    line[f"perplexity_{multiple}x_short_history"] = float(np.exp(near))
            unseen = corpus.name in self.plan.unseen
            self.log(
                stage=stage,
                corpus=corpus.name,
                unseen=unseen,
                tokens=len(pieces) * wanted.length,
                **line,
            )
        self.log(stage=stage, evaluation_seconds=time.monotonic() - began)


class StageRun:
    """One stage: its state, restored or new, and its steps."""

    def __init__(self, job: Linearisation, name: str, stage: Stage, start: Start):
        self.job, self.name, self.stage = job, name, stage
        plan, mesh, ops = job.plan, job.mesh, job.ops
        needs = TEACHER in objective(stage.objective.name).models
        self.stacked = stacked = common_layout(start.config, job.teacher.config)
        known = parameters(start.config, scanned=stacked)
        factors = learning_rate_factors(known, stage.trainable)
        optimizer = make_optimizer(stage.optimizer, stage.steps, known, factors)
        self.rate = schedule(stage.optimizer, stage.steps)
        layers = {name: parameter.layers for name, parameter in known.items()}
        folder = job.out / name
        self.checkpoints = Checkpoints(folder, start.files, start.manifest, 1, layers)
        options = plan.mixers.initialise
        self.state = begin_or_restore(
            self.checkpoints,
            lambda: first_params(start, options, stacked, mesh, lambda: self.batches(0), plan.seed),
            known,
            list(factors),
            optimizer,
            mesh,
            lambda place: None,
        )
        self.step = int(self.state.step)
        models, held, shared = {STUDENT: model_of(start.config, plan.run, ops, stacked)}, {}, {}
        if needs:
            models[TEACHER] = job.teacher.bind(plan.run, ops, stacked)
            held[TEACHER], shared[TEACHER] = hold_teacher(
                job.teacher, stacked, mesh, self.state.frozen, known, folder
            )
        loss = StageLoss(stage.objective, models, shared)
        self.advance = partial(
            jax.jit(partial(train_step, loss, optimizer), donate_argnums=0), held=held
        )

    def batches(self, skip: int) -> Iterator[TrainBatch]:
        texts = [text for corpus in self.job.corpora for text in corpus.train]
        rows = max(1, self.stage.step_tokens // self.stage.length)
        return training_batches(texts, rows, self.stage.length, self.job.plan.seed, skip)

    def train(self) -> bool:
        """Steps to the end, or to the end of the time; the state is saved. Returns whether the
        stage is finished."""
        plan, batches = self.job.plan, self.batches(self.step)
        saved = since = time.monotonic()
        first = self.step
        while self.step < self.stage.steps and time.monotonic() < self.job.ends:
            self.state, metrics = self.advance(self.state, put_batch(next(batches), self.job.mesh))
            self.step += 1
            if self.step % plan.log_every == 0 or self.step in (first + 1, self.stage.steps):
                metrics = jax.device_get(metrics)
                if not np.isfinite(metrics.loss):
                    raise SystemExit(f"{self.name}: the loss of step {self.step} is {metrics.loss}")
                now = time.monotonic()
                done = plan.log_every if self.step > first + 1 else 1
                self.job.log(
                    stage=self.name,
                    step=self.step,
                    tokens_seen=self.step * self.stage.step_tokens,
                    loss=float(metrics.loss),
                    grad_norm=float(metrics.grad_norm),
                    **{key: float(value) for key, value in metrics.means.items()},
                    lr=float(self.rate(self.step - 1)),
                    tokens_per_second=round(done * self.stage.step_tokens / (now - since)),
                )
                since = now
            if time.monotonic() - saved > 60 * plan.save_minutes:
                self.checkpoints.save(self.state, {})
                saved = since = time.monotonic()
        self.checkpoints.save(self.state, {})
        return self.step == self.stage.steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, help="checkpoint folder of the attention model")
    parser.add_argument("texts", type=Path, help="folder with a subfolder for each corpus")
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the plan")
    parser.add_argument("--plan", type=Path, default=CONFIG, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop and save after this time")
    parser.add_argument("--evaluate", action="store_true", help="train nothing")
    options = parser.parse_args()
    plan, stages = read_plan(options.plan, options.overrides)
    job = Linearisation(options.teacher, options.texts, options.out, plan, options.minutes)
    with jax.set_mesh(job.mesh):
        finished = job.run(stages, options.evaluate)
    print("finished" if finished else "not finished: the same command goes on")


if __name__ == "__main__":
    main()
