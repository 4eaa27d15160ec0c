"""An attention language model becomes a hybrid, stage by stage, with figures after each.

Examples:

    # stages I-1, I-2, II and III; the same command goes on where it was stopped
    python -m benchmarks.training.linearise SmolLM2 texts runs/linearise --minutes 25

    # variants, each in a folder of its own: from the authors' initialisation; with fewer softmax
    # layers; without linear ones; with attention sinks
    python -m benchmarks.training.linearise SmolLM2 texts runs/paper model.mixers.initialise.name=paper
    python -m benchmarks.training.linearise SmolLM2 texts runs/linear 'model.mixers.layer_types=["linear_attention"]'
    python -m benchmarks.training.linearise SmolLM2 texts runs/window 'model.mixers.layer_types=["sliding_attention"]'
    python -m benchmarks.training.linearise SmolLM2 texts runs/sinks model.mixers.num_attention_sinks=4

    # a probe: shorter stages, another rate, fewer figures
    python -m benchmarks.training.linearise SmolLM2 texts runs/probe layerwise.train.steps=250 \\
        distill.train.steps=250 distill.train.optimizer.peak_lr=6e-4 figures.rows=8 --stages layerwise,distill

    # only the figures of a checkpoint
    python -m benchmarks.training.linearise SmolLM2 texts runs/figures --evaluate runs/linearise/distill

The teacher is a checkpoint folder with tokenizer. TEXTS has a subfolder for each corpus, with one
document in each file (plain or .xz), and files of conversations (JSONL), such as
`python -m benchmarks.training.sample` writes. Stages I-1 and I-2 train on all of it, II on the
conversations, III on the documents; 5 % of the documents of each corpus are held out, and all of
the corpora that --unseen names.

The stages are the presets configs/smollm2_*.toml. KEY=VALUE changes all of them (model.mixers: the
first), layerwise.KEY=VALUE and so on one of them, and figures.NAME=VALUE what is measured.
OUT/STAGE is the folder of an ordinary run. OUT/figures.jsonl has the figures of the student at the
start and after each stage (`benchmarks.training.figures`);
`python -m benchmarks.training.curves OUT` makes tables and curves of them.
"""  # noqa: E501

import argparse
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.training.corpora import Corpus, find_corpora, stage_sources
from benchmarks.training.figures import FigureConfig, FigureLog, Figures
from benchmarks.training.pair import Pair
from infinitevl_jax import compilation
from infinitevl_jax.checkpoints.newest import checkpoint_folder
from infinitevl_jax.cli import logs
from infinitevl_jax.config.presets import Preset, override, parse
from infinitevl_jax.config.shipped import find_preset
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.train import loop

DOCUMENTS, CONVERSATIONS = False, True
# what each stage trains on, by `Corpus.conversations`
STAGES = {
    "layerwise": (DOCUMENTS, CONVERSATIONS),
    "distill": (DOCUMENTS, CONVERSATIONS),
    "supervised": (CONVERSATIONS,),
    "long": (DOCUMENTS,),
}
FIRST, START = "layerwise", "start"


class Linearisation:
    """Stages that follow one another, and the figures of the student after each."""

    def __init__(
        self,
        teacher: Path,
        corpora: Mapping[str, Corpus],
        out: Path,
        changes: Sequence[str],
        ends: float,
    ):
        """
        Args:
          changes: overrides, of all stages or of one.
          ends: when to stop, by `time.monotonic`.
        """
        self.teacher, self.corpora, self.out, self.ends = teacher, corpora, out, ends
        self.changes = changes
        tree: dict[str, Any] = {}
        for change in changes:
            override(tree, change)
        first = self.preset(FIRST, teacher)
        usual = {"length": first.train.data.length, "batch": first.train.data.batch}
        if first.model.mixers and first.model.mixers.sliding_window:
            usual["window"] = first.model.mixers.sliding_window
        own = usual | tree.get("figures", {})
        self.wanted = parse(FigureConfig, own, "figures", "the overrides")
        self.log = FigureLog(out / "figures.jsonl")
        self._figures: Figures | None = None

    def preset(self, stage: str, source: Path, minutes: float | None = None) -> Preset:
        """The preset of a stage that goes on from the checkpoint `source`."""
        path = find_preset(f"smollm2_{stage}")
        tree = tomllib.loads(path.read_text("utf-8"))
        for change in self.changes:
            name, _, rest = change.partition(".")
            if name in STAGES:
                if name == stage:
                    override(tree, rest)
            elif name != "figures" and (stage == FIRST or not change.startswith("model.mixers.")):
                override(tree, change)
        data = tree["train"]["data"]
        data["sources"] = stage_sources(data["sources"], self.corpora, STAGES[stage])
        tree["model"]["from"], tree["train"]["output"] = str(source), str(self.out / stage)
        if "teacher" in tree:
            tree["teacher"]["from"] = str(self.teacher)
        if minutes is not None:
            tree["train"]["minutes"] = minutes
        return parse(Preset, tree, "", str(path))

    def run(self, stages: Sequence[str]) -> bool:
        """The stages, as far as the time goes. Returns whether they are finished.

        Raises:
          InfiniteVLError: a preset is refused, or a stage has nothing to go on from.
        """
        for stage in stages:  # before there is any work
            self.preset(stage, self.teacher)
        for stage in stages:
            source = self._source(stage)
            if stage == FIRST and not self._start():
                return False
            run = self.out / stage
            last = str(self.preset(stage, source).train.steps)
            if checkpoint_folder(run).name != last or not self.log.has({"stage": stage}):
                minutes = max(0.0, self.ends - time.monotonic()) / 60
                if not loop.train(self.preset(stage, source, minutes)).finished:
                    return False
            if not self.evaluate(stage, run):
                return False
        return True

    def _source(self, stage: str) -> Path:
        """What a stage goes on from: the newest one before it, or the teacher."""
        if stage == FIRST:
            return self.teacher
        order = list(STAGES)
        before = [self.out / name for name in order[: order.index(stage)]]
        found = [run for run in before if any(run.glob("checkpoints/*"))]
        if not found:
            raise InfiniteVLError(
                f"{self.out} has no stage that {stage} could go on from",
                f"begin with --stages {FIRST},{stage}",
            )
        return found[-1]

    def _start(self) -> bool:
        """The student before its first step, and its figures."""
        run = self.out / FIRST
        if not any(run.glob("checkpoints/*")):
            loop.train(self.preset(FIRST, self.teacher, minutes=0.0))
        if checkpoint_folder(run).name != "0":
            return True
        return self.evaluate(START, run)

    def evaluate(self, stage: str, checkpoint: Path) -> bool:
        """The missing figures of a checkpoint. Returns whether all are there."""
        if self._figures is None:
            first = self.preset(FIRST, self.teacher)
            sources = {
                name: {"held_out": source.held_out}
                for name, source in first.train.data.sources.items()
            }
            pair = Pair(self.teacher, checkpoint, first.run)
            self._figures = Figures(pair, self.corpora, sources, self.wanted)
        return self._figures.measure(stage, checkpoint, self.log, self.ends)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, help="checkpoint folder of the attention model")
    parser.add_argument("texts", type=Path, help="folder of corpora")
    parser.add_argument("out", type=Path, help="folder of the runs and figures")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the presets")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop and save after this time")
    stages, unseen = ",".join(STAGES), "austen,debian-handbook"
    parser.add_argument(
        "--stages", default=stages, help="in this order, without spaces (default: %(default)s)"
    )
    parser.add_argument(
        "--unseen", default=unseen, help="corpora that no stage trains on (default: %(default)s)"
    )
    parser.add_argument(
        "--evaluate",
        type=Path,
        metavar="CHECKPOINT",
        help="train nothing; the figures of this checkpoint or run",
    )
    options = parser.parse_args()
    stages = options.stages.split(",")
    if unknown := sorted(set(stages) - set(STAGES)):
        parser.error(f"no stage is called {unknown[0]}: {', '.join(STAGES)}")
    ends = time.monotonic() + 60 * options.minutes
    try:
        corpora = find_corpora(options.texts, options.unseen.split(","))
        job = Linearisation(options.teacher, corpora, options.out, options.overrides, ends)
        with logs.shown(sys.stdout), compilation.kept(True):
            if options.evaluate is not None:
                done = job.evaluate(str(options.evaluate), options.evaluate)
            else:
                done = job.run(stages)
    except InfiniteVLError as error:
        raise SystemExit(f"error: {error}") from error
    print("finished" if done else "not finished: the same command goes on")


if __name__ == "__main__":
    main()
