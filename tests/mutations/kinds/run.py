"""The folder of a finished run: preset.json, log.jsonl and the steps' files.

Started again, or opened as a checkpoint.
"""

import json
import shutil
from pathlib import Path
from random import Random

from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.train.log import read_log
from infinitevl_jax.train.loop import train

from ..case import Case, Place
from ..content import encode, mutate_bytes, mutate_file, mutate_text
from ..values import mutate
from . import runs
from .folders import different, parameters

LINES = [
    "3",
    "null",
    "[]",
    "{}",
    '{"step": null}',
    '{"step": "1"}',
    '{"loss": 1}',
    '{"step": 1e400}',
    '{"step": NaN}',
    "\ufeff{}",
    '{"step": 2, "loss": "x"}',
]


def make(rng: Random, place: Place) -> Case:
    # A link out of the folder is how people put checkpoints on another disk: written to as well.
    source, elsewhere = runs.finished(place), place.work / "outside"
    run = Path(shutil.copytree(source, place.work / "run"))
    path = place.work / "run.toml"
    path.write_text(runs.preset(place, run))
    label = mutated(rng, run, elsewhere)

    def again():
        outcome = train(load_preset(path))
        return outcome.step, parameters(outcome.checkpoint)[1]

    def check(found):
        step, params = found
        if step != 2:
            return f"ended at step {step}"
        return different(params, parameters(source / "checkpoints" / "2")[1])

    def check_with_log(found):
        lines = read_log(run / "log.jsonl")
        return check(found) or (
            ""
            if all(isinstance(line, dict) and "step" in line for line in lines)
            else "a log that is no log"
        )

    if rng.random() < 0.7:
        return Case(f"started again; {label}", again, check_with_log, writes=(run, elsewhere))
    step = run / "checkpoints" / "2"
    return Case(f"opened; {label}", lambda: (2, parameters(step)[1]), check)


def mutated(rng: Random, run: Path, outside: Path) -> str:
    """One change to a run's folder."""
    kind = rng.choice(
        [
            "preset",
            "preset",
            "log",
            "log",
            "stored",
            "stored",
            "stored",
            "file",
            "file",
            "step",
            "side",
        ]
    )
    if kind == "preset":
        path = run / "preset.json"
        changed = mutate(rng, json.loads(path.read_text()))
        path.write_bytes(changed.data)
        return f"preset.json: {changed.label}"
    if kind == "log":
        path = run / "log.jsonl"
        text = path.read_text()
        if rng.random() < 0.5:
            line = rng.choice(LINES)
            text, label = rng.choice([text + line + "\n", line + "\n" + text]), f"a line {line!r}"
        else:
            text, label = mutate_text(rng, text)
        path.write_bytes(encode(text))
        return f"log.jsonl: {label}"
    last = run / "checkpoints" / "2"
    if kind == "side":
        path = rng.choice(
            [
                last / "infinitevl_jax.json",
                last / "config.json",
                run / "model" / "config.json",
                run / "model" / "tokenizer.json",
            ]
        )
        data, label = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return f"{path.relative_to(run)}: {label}"
    if kind == "step":
        name = rng.choice(
            ["3", "9999999999", "2.orbax-checkpoint-tmp-1", "02", "x", "-1", "1e3", "٣"]
        )
        path = run / "checkpoints" / name
        path.mkdir() if rng.random() < 0.5 else path.write_text("x")
        return f"checkpoints/{name} appears"
    files = sorted(p for p in last.rglob("*") if p.is_file())
    path = rng.choice(
        [*files, *[p for p in files if p.name == "metadata" or p.name.startswith("_")]]
    )
    if kind == "file":
        path = rng.choice(
            [
                path,
                run / "preset.json",
                run / "log.jsonl",
                last,
                last / "params",
                last / "data",
                run / "checkpoints",
                run / "model",
            ]
        )
        return mutate_file(rng, path, outside)
    data = path.read_bytes()
    place = rng.randrange(len(data) + 1)
    ways = {
        "cut": data[:place],
        "empty": b"",
    }
    label = rng.choice(list(ways))
    path.write_bytes(ways[label])
    name = str(path.relative_to(last))
    return f"{name if len(name) < 40 else name[:20] + '...'}: {label} at {place} of {len(data)}"
