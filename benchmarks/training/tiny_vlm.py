"""infinitevl-tiny and its rivals through all stages, and what each can do.

Examples:

    # all variants of seed 0, as far as 25 minutes go; the same command goes on
    python -m benchmarks.training.tiny_vlm runs/tiny --minutes 25 --fonts fonts --words words.txt

    # three seeds of two variants, with half of the steps
    python -m benchmarks.training.tiny_vlm runs/half --seeds 0 1 2 --variants teacher hybrid \\
        --scale 0.5

    # changes to the presets of all stages, and to that of one
    python -m benchmarks.training.tiny_vlm runs/slow train.data.workers=4 \\
        teacher:train.optimizer.peak_lr=1e-3

The stages are the presets infinitevl_tiny_teacher, layerwise, distill, supervised and long. The
teacher has full attention; hybrid, linear and window differ in the mixers that replace it. A stage
that was stopped goes on where it was, and what was evaluated is not evaluated again.

OUT/seed_S/VARIANT/STAGE are the runs, OUT/seed_S/VARIANT/figures the answers in numbers and as a
picture, OUT/results.jsonl a line for each variant and seed, OUT/table.md all of them. The questions
are those of tiny_vlm.toml.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from infinitevl_jax import InfiniteVL, Processor
from infinitevl_jax.cli import logs
from infinitevl_jax.config.model import LINEAR, SLIDING
from infinitevl_jax.config.presets import Preset, load_preset
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.eval.report import write_results
from infinitevl_jax.eval.tasks import Task, evaluate, open_tasks
from infinitevl_jax.train.loop import Outcome, train
from infinitevl_jax.writing import write_text

QUESTIONS = Path(__file__).with_suffix(".toml")
TEACHER, QUESTIONING = "teacher", "questions"
STAGES = ("layerwise", "distill", "supervised", "long")
MIXERS: dict[str, list[str]] = {
    "hybrid": [SLIDING, LINEAR, LINEAR, LINEAR],
    "linear": [LINEAR],
    "window": [SLIDING],
}
VARIANTS = (TEACHER, *MIXERS)


@dataclass(frozen=True)
class Changes:
    """Changes to the presets.

    Attributes:
      given: KEY=VALUE for all stages, STAGE:KEY=VALUE for one; STAGE "questions" is tiny_vlm.toml.
      scale: factor of the steps. fonts, words: of all drawn pictures; "" is the presets'.
    """

    given: Sequence[str] = ()
    scale: float = 1.0
    fonts: str = ""
    words: str = ""

    def load(self, stage: str, own: Sequence[str] = ()) -> Preset:
        """The preset of a stage, or the questions, with all changes."""
        path = QUESTIONS if stage == QUESTIONING else f"infinitevl_tiny_{stage}"
        changes = [*own, *self._of(stage)]
        preset = load_preset(path, changes)
        supplies = [
            f"train.data.sources.{name}.options.{option}={json.dumps(value)}"
            for name, source in preset.train.data.sources.items()
            for option, value in (("fonts", self.fonts), ("words", self.words))
            if source.kind == "drawn" and value
        ]
        steps = max(1, round(self.scale * preset.train.steps))
        return load_preset(path, [*changes, *supplies, f"train.steps={steps}"])

    def _of(self, stage: str) -> list[str]:
        """Changes to one stage; those to all of them do not concern the questions."""
        found = []
        for change in self.given:
            name, colon, rest = change.partition("=")[0].partition(":")
            if colon and name not in (TEACHER, *STAGES, QUESTIONING):
                raise InfiniteVLError(
                    f"{change!r} names no stage",
                    f"stages: {', '.join((TEACHER, *STAGES, QUESTIONING))}",
                )
            if colon and name == stage:
                found.append(change[len(name) + 1 :])
            elif not colon and stage != QUESTIONING:
                found.append(change)
        return found


@dataclass
class Job:
    """All runs below a folder.

    Attributes:
      ends: time.monotonic() at which the running stage is saved and left.
    """

    out: Path
    changes: Changes
    ends: float
    tasks: dict[str, Task] = field(default_factory=dict)

    def run(self, seeds: Sequence[int], variants: Sequence[str]) -> bool:
        """Train and evaluate. Returns whether all is finished."""
        for seed in seeds:
            teacher = self.stage(seed, TEACHER, TEACHER, [])
            if teacher is None:
                return False
            for variant in variants:
                last = teacher if variant == TEACHER else self.student(seed, variant, teacher)
                if last is None or not self.measure(seed, variant, last):
                    return False
        return True

    def student(self, seed: int, variant: str, teacher: Outcome) -> Outcome | None:
        """All stages of a variant; None if the time is over."""
        last = teacher
        for stage in STAGES:
            own = [f"model.from={last.checkpoint}"]
            if stage == "layerwise":
                own.append(f"model.mixers.layer_types={json.dumps(MIXERS[variant])}")
            if stage in ("layerwise", "distill"):
                own.append(f"teacher.from={teacher.checkpoint}")
            found = self.stage(seed, variant, stage, own)
            if found is None:
                return None
            last = found
        return last

    def stage(self, seed: int, variant: str, stage: str, own: list[str]) -> Outcome | None:
        """One run, to its end; None if the time is over."""
        output = self.folder(seed, variant) / stage
        own = [*own, f"train.seed={seed}", f"train.output={output}"]
        preset = self.changes.load(stage, own)
        done = output / "checkpoints" / str(preset.train.steps)
        if done.exists() and (output / "loss.png").exists():
            return Outcome(output, done, preset.train.steps, True)
        left = (self.ends - time.monotonic()) / 60
        if left <= 0:
            return None
        print(f"seed {seed}, {variant}: {stage}", flush=True)
        outcome = train(self.changes.load(stage, [*own, f"train.minutes={left}"]))
        return outcome if outcome.finished else None

    def measure(self, seed: int, variant: str, outcome: Outcome) -> bool:
        """Answer all questions, unless that is done. Returns False if the time is over."""
        if any((line["seed"], line["variant"]) == (seed, variant) for line in self.results()):
            return True
        if time.monotonic() >= self.ends:
            return False
        began = time.monotonic()
        self.tasks = self.tasks or open_tasks(self.changes.load(QUESTIONING).train.data)
        dtype = self.changes.load(TEACHER).run.dtype
        model = InfiniteVL.from_pretrained(outcome.checkpoint, dtype=dtype)
        processor = Processor.from_pretrained(outcome.checkpoint)
        results = evaluate(model, processor, self.tasks)
        write_results(self.folder(seed, variant) / "figures", self.tasks, results)
        line: dict[str, Any] = {
            "seed": seed,
            "variant": variant,
            "parameters": model.parameter_count,
            "device": jax.devices()[0].device_kind,
            "seconds": round(time.monotonic() - began, 1),
            "tasks": {name: found.as_json() for name, found in results.items()},
        }
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        write_text(self.out / "table.md", "\n".join(table(self.results())) + "\n")
        print(f"seed {seed}, {variant}: evaluated in {line['seconds']:.0f} s", flush=True)
        return True

    def results(self) -> list[dict[str, Any]]:
        """Lines of OUT/results.jsonl."""
        path = self.out / "results.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def folder(self, seed: int, variant: str) -> Path:
        return self.out / f"seed_{seed}" / variant


def table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy of each task and variant in Markdown: the mean of the seeds, and their range."""
    variants = [v for v in VARIANTS if any(line["variant"] == v for line in lines)]
    tasks = list(lines[0]["tasks"]) if lines else []
    seeds = {v: sorted(x["seed"] for x in lines if x["variant"] == v) for v in variants}
    heads = [f"{v} ({len(seeds[v])} seed{'s' * (len(seeds[v]) > 1)})" for v in variants]
    rows = [
        f"| task | tokens of a prompt | blind | {' | '.join(heads)} |",
        "|---" * (3 + len(heads)) + "|",
    ]
    for task in tasks:
        first = lines[0]["tasks"][task]
        cells = [task, f"{first['tokens']:,.0f}", f"{first['blind_accuracy']:.1%}"]
        for variant in variants:
            found = [x["tasks"][task]["accuracy"] for x in lines if x["variant"] == variant]
            text = f"{sum(found) / len(found):.1%}"
            if len(found) > 1:
                text += f" ({min(found):.1%} to {max(found):.1%})"
            cells.append(text)
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of all runs")
    parser.add_argument("overrides", nargs="*", metavar="[STAGE:]KEY=VALUE", help="changes")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop and save after this time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all steps")
    parser.add_argument("--fonts", default="", help="folder of fonts; default: matplotlib's")
    parser.add_argument("--words", default="", help="file of words; default: invented")
    options = parser.parse_args()
    changes = Changes(options.overrides, options.scale, options.fonts, options.words)
    options.out.mkdir(parents=True, exist_ok=True)
    job = Job(options.out, changes, time.monotonic() + 60 * options.minutes)
    with logs.shown(sys.stdout):
        finished = job.run(options.seeds, options.variants)
    print("\n".join(table(job.results())))
    print("finished" if finished else "not finished: the same command goes on")


if __name__ == "__main__":
    from infinitevl_jax.command import run

    run(main)
