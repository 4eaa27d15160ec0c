"""The linearisation program on a tiny teacher and a few text files."""

import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_folder import full_attention_config, tiny_model, write_folder

from benchmarks.training import curves, linearise
from benchmarks.training.corpora import find_corpora
from benchmarks.training.figures import FigureLog
from benchmarks.training.recall import needles
from infinitevl_jax import InfiniteVL, Processor, compilation
from infinitevl_jax.checkpoints import read_config
from infinitevl_jax.checkpoints.checksums import read_checksums
from infinitevl_jax.checkpoints.newest import checkpoint_folder
from infinitevl_jax.config.model import FULL, SLIDING
from infinitevl_jax.config.student import PaperConfig
from infinitevl_jax.train import saving

CHANGES = [
    "model.mixers.layer_types=['sliding_attention']",
    "model.mixers.sliding_window=8",
    "run.fsdp=1",
    "run.dtype=float32",
    "train.data.batch=2",
    "train.data.length=192",
    "long.train.data.length=256",
    "layerwise.train.steps=4",
    "distill.train.steps=2",
    "distill.train.evaluate_every=0",
    "supervised.train.steps=2",
    "long.train.steps=2",
    "long.train.lora.rank=2",
    "figures.rows=4",
    "figures.multiples=[2]",
    "figures.long_rows=1",
    "figures.prompts=2",
    "figures.prompt_tokens=8",
    "figures.new_tokens=6",
    "figures.free_tokens=4",
    "figures.distances=[10]",
    "figures.needles=2",
]
STAGES = ["start", "layerwise", "distill", "supervised", "long"]


class Work:
    """A folder with a teacher and texts, and the program run in it."""

    def __init__(self, folder):
        self.folder = folder
        config = full_attention_config()  # of one layer, whose steps compile in little time
        text = dataclasses.replace(config.text, layer_types=(FULL,))
        write_folder(folder / "teacher", tiny_model(dataclasses.replace(config, text=text)))
        rng = np.random.default_rng(0)
        for corpus in ("one", "other"):
            (folder / "texts" / corpus).mkdir(parents=True)
            for i in range(20):
                words = rng.integers(97, 123, 300).astype(np.uint8).tobytes()
                (folder / "texts" / corpus / f"{i}.txt").write_bytes(words)
        rows = [
            [{"role": role, "content": f"{role[:1]}{i}"} for role in ("user", "assistant")]
            for i in range(40)
        ]
        lines = [json.dumps({"number": i, "messages": row}) for i, row in enumerate(rows)]
        (folder / "texts" / "sampled.jsonl").write_text("\n".join(lines) + "\n")

    def run(self, out, *more, texts=None):
        places = [self.folder / "teacher", texts or self.folder / "texts", self.folder / out]
        words = [*map(str, places), *CHANGES, "--unseen=other", *more]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["linearise", *words])
            linearise.main()
        return FigureLog(self.folder / out / "figures.jsonl").lines()

    def line(self, part, **key):
        """The line of the last stage."""
        wanted = {"stage": "long", "part": part, **key}
        (found,) = [line for line in self.lines if wanted.items() <= line.items()]
        return found

    def documents(self, corpus):
        """Tokens of a corpus by document, in the order in which they are held out."""
        files = (self.folder / "texts" / corpus).iterdir()
        ordered = sorted(files, key=lambda f: hashlib.sha256(f.name.encode()).digest())
        return [self.processor.encode_document(file.read_text()) for file in ordered]

    def log_probabilities(self, model, tokens):
        """Of the token after each but the last, [tokens - 1, vocabulary] float64."""
        logits = np.asarray(model(tokens[None, :-1]).logits[0], np.float64)
        return logits - np.logaddexp.reduce(logits, -1, keepdims=True)

    def bits(self, out, stage, step):
        """Checksums of a checkpoint's arrays, moments included."""
        folder = self.folder / out / stage / "checkpoints" / str(step)
        return [read_checksums(folder, name) for name in ("params", "optimizer")]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    with compilation.kept(True):
        work = Work(tmp_path_factory.mktemp("linearise"))
        work.lines = work.run("whole")
        work.teacher = InfiniteVL.from_pretrained(work.folder / "teacher")
        work.student = InfiniteVL.from_pretrained(checkpoint_folder(work.folder / "whole" / "long"))
        work.processor = Processor.from_pretrained(work.folder / "teacher")
        yield work


def test_all_stages_and_their_figures(done):
    found = {(line["stage"], line["part"], line.get("corpus")) for line in done.lines}
    corpora = [("text", name) for name in ("one", "other", "sampled")]
    corpora += [("greedy", name) for name in ("one", "other", "chat")]
    corpora += [("recall", None), ("long", "other")]
    assert found == {(stage, part, corpus) for stage in STAGES for part, corpus in corpora}
    assert all(
        line["unseen"] == (line["corpus"] == "other")
        for line in done.lines
        if line["part"] == "text"
    )
    for stage, steps in zip(STAGES[1:], (4, 2, 2, 2), strict=True):
        checkpoint = checkpoint_folder(done.folder / "whole" / stage)
        assert checkpoint.name == str(steps)
        assert read_config(checkpoint).text.layer_types == (SLIDING,)
    assert done.run("whole") == done.lines  # nothing is left to do


def test_stopped_by_the_time_it_goes_on_to_the_same_bits(done, monkeypatch, capsys):
    """Before the first step, and after two."""
    measured = []

    def evaluate(self, stage, checkpoint):
        measured.append((stage, checkpoint_folder(checkpoint).name))
        return self.ends > time.monotonic()

    monkeypatch.setattr(linearise.Linearisation, "evaluate", evaluate)
    only = ("--stages", "layerwise")
    done.run("parts", *only, "--minutes", "0")
    assert measured == [("start", "0")]
    late, advance = [], saving.Saver.advance

    def two_steps(self, *args):
        advance(self, *args)
        late.extend([1e9] * (self.step == 2))

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(late))
    with monkeypatch.context() as patch:
        patch.setattr(saving.Saver, "advance", two_steps)
        patch.setattr(saving, "time", clock)
        done.run("parts", *only, "--minutes", "60")
    assert checkpoint_folder(done.folder / "parts" / "layerwise").name == "2"
    assert capsys.readouterr().out.count("not finished: the same command goes on") == 2
    done.run("parts", *only)
    assert measured == [("start", "0")] * 2 + [("layerwise", "4")]
    assert done.bits("parts", "layerwise", 4) == done.bits("whole", "layerwise", 4)


def test_figures_of_text_equal_plain_computations(done):
    """The corpus `other`: two documents, each in two rows that do not see each other."""
    pieces = [part for text in done.documents("other")[:2] for part in (text[:193], text[192:])]
    sums = np.zeros(5)
    for piece in pieces:
        theirs, own = (done.log_probabilities(m, piece) for m in (done.teacher, done.student))
        at, places = np.arange(len(piece) - 1), piece[1:]
        kl = (np.exp(theirs) * (theirs - own)).sum(-1)
        same = theirs.argmax(-1) == own.argmax(-1)
        sums += [-theirs[at, places].sum(), -own[at, places].sum(), kl.sum(), same.sum(), len(at)]
    teacher, student, kl, agreed = sums[:4] / sums[4]
    line = done.line("text", corpus="other")
    expected = {
        "tokens": sums[4],
        "teacher_perplexity": np.exp(teacher),
        "perplexity": np.exp(student),
        "ratio": np.exp(student - teacher),
        "kl": kl,
        "agreement": agreed,
    }
    assert {key: line[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_figures_of_long_rows_equal_plain_computations(done):
    joined = np.concatenate(done.documents("other")[:2])[: 2 * 192 + 1]
    expected = {}
    for name, model in (("", done.student), ("teacher_", done.teacher)):
        for history, tokens in (("", joined), ("_near", joined[-193:])):
            found = done.log_probabilities(model, tokens)[-96:]
            loss = -found[np.arange(96), tokens[-96:]].mean()
            expected[f"{name}perplexity{history}"] = np.exp(loss)
    line = done.line("long", corpus="other")
    assert line["tokens"] == 96
    assert {key: line[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_agreement_of_continuations_equals_plain_computations(done):
    prompts = [text[:8] for text in done.documents("other")[:2]]
    right, free, before, count = [], [], [], 0
    for prompt in prompts:
        theirs, own = (
            model.generate(prompt[None], max_new_tokens=6)[0]
            for model in (done.teacher, done.student)
        )
        ends = np.flatnonzero(np.isin(theirs, done.teacher.config.eos_token_ids))
        theirs = theirs[: ends[0] + 1] if len(ends) else theirs
        whole = np.concatenate([prompt, theirs])
        predicted = done.log_probabilities(done.student, whole).argmax(-1)[len(prompt) - 1 :]
        right += list(predicted == theirs)
        same = (theirs == own[: len(theirs)])[:4]
        free += list(same)
        before.append(int(np.cumprod(same).sum()))
        count += len(theirs)
    line = done.line("greedy", corpus="other")
    expected = {
        "tokens": count,
        "agreement": np.mean(right),
        "free_agreement": np.mean(free),
        "free_tokens": np.mean(before),
    }
    assert {key: line[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    answers = done.line("greedy", corpus="chat")["answers"]
    asked = done.processor([{"role": "user", "content": answers[0]["question"]}])["input_ids"]
    said = done.teacher.generate(asked, max_new_tokens=6)[0]
    assert answers[0]["teacher"] == done.processor.decode(said)


def test_a_number_is_asked_for_at_its_distance(done):
    texts = [text[:210] for text in done.documents("other")[:2]]
    sequences = needles(done.processor, texts, distance=80, count=2)
    exact = {"teacher": [], "student": []}
    for sequence in sequences:
        tokens, answer = sequence.branch.tokens, sequence.branch.answer
        (places,) = np.nonzero(answer)
        number = tokens[places]
        assert len(tokens) == places[-1] + 1 and len(number) == 6  # a space and five digits
        told = places - 80 - (len(number) - 1)
        np.testing.assert_array_equal(tokens[told], number)
        for name, found in exact.items():
            model = getattr(done, name)
            predicted = done.log_probabilities(model, tokens).argmax(-1)[places - 1]
            found.append(bool((predicted == number).all()))
    line = done.line("recall")
    assert (line["distance"], line["numbers"]) == (80, 2)
    assert line["exact"] == np.mean(exact["student"])
    assert line["teacher_exact"] == np.mean(exact["teacher"])


def test_tables_and_curves(done, tmp_path, monkeypatch):
    files = [f"--tables={tmp_path / 'tables.md'}", f"--picture={tmp_path / 'curves.png'}"]
    monkeypatch.setattr(sys, "argv", ["curves", str(done.folder / "whole"), *files])
    curves.main()
    line = done.line("text", corpus="other")
    text = (tmp_path / "tables.md").read_text()
    assert f"| whole | long | other | {line['perplexity']:.4g} |" in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    job = curves.read_job(done.folder / "whole")
    assert job.ends == dict(zip(STAGES, np.cumsum([0, 4 * 384, 768, 768, 1024]), strict=True))


def test_changes_reach_their_stages(done):
    corpora = find_corpora(done.folder / "texts", ["other"])
    changes = [
        "model.mixers.initialise.name=paper",
        "run.remat=full",
        "distill.train.steps=7",
        "train.data.sources.one.weight=3",
        "figures.rows=5",
    ]
    job = linearise.Linearisation(Path("teacher"), corpora, Path("out"), changes, ends=0)
    presets = {stage: job.preset(stage, Path("before")) for stage in linearise.STAGES}
    assert presets["layerwise"].model.mixers.initialise == PaperConfig()
    assert presets["distill"].model.mixers is None and job.wanted.rows == 5
    assert [preset.train.steps for preset in presets.values()] == [1200, 7, 600, 300]
    assert {preset.run.remat for preset in presets.values()} == {"full"}
    assert {preset.model.from_ for preset in presets.values()} == {"before"}
    assert [preset.teacher and preset.teacher.from_ for preset in presets.values()] == [
        *["teacher"] * 2,
        *[None] * 2,
    ]
    read = {stage: preset.train.data.sources for stage, preset in presets.items()}
    assert [list(sources) for sources in read.values()] == [
        *[["one", "sampled"]] * 2,
        ["sampled"],
        ["one"],
    ]
    one = read["distill"]["one"]  # no corpus of the preset: as the first in it, but for the weight
    assert (one.weight, one.options, one.held_out) == (3, {"whole": True}, "train[95%:]")
    assert read["distill"]["sampled"].options == {}


def test_what_cannot_be_run_is_refused(done, tmp_path):
    with pytest.raises(SystemExit, match="holds no corpora"):
        done.run("none", texts=tmp_path)
    (tmp_path / "one").symlink_to(done.folder / "texts" / "one")
    with pytest.raises(SystemExit, match="no corpus of conversations\n.*training.sample"):
        done.run("none", texts=tmp_path)
    with pytest.raises(SystemExit, match="none has no stage that distill could go on from"):
        done.run("none", "--stages=distill")
    assert not (done.folder / "none").exists()
