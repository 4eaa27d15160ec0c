"""Presets: TOML text, the values in it, and key=value changes, up to the first batch."""

import copy
import math
import re
import tomllib
from pathlib import Path
from random import Random
from typing import Any

import jax

from infinitevl_jax.config.presets import Preset, load_preset, to_tree
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.mixture import open_mixture
from infinitevl_jax.data.pipeline import train_batches
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.sharding import make_mesh
from infinitevl_jax.train.optimizer import make_optimizer, schedule, split_trainable
from infinitevl_jax.train.setup import prepare_start

from ..case import Case, Place
from ..content import encode, mutate_bytes, mutate_file, mutate_text
from ..values import NUMBERS, at, bad, near, paths, put
from .runs import data as dataset
from .runs import preset

KEYS = [
    "model.from",
    "model.tokenizer",
    "run.dtype",
    "run.remat",
    "run.data",
    "run.tensor",
    "run.ops.attention",
    "run.scan",
    "train.epochs",
    "train.seed",
]
KEYS += [
    "train.trainable",
    "train.keep",
    "train.log_every",
    "train.evaluate_every",
    "train.data.options.balance",
    "train.data.options.opening",
    "train.data.patches",
]
KEYS += [
    "train.data.lookahead",
    "train.data.name",
    "train.data.train",
    "train.data.held_out",
    "train.data.folder",
    "train.optimizer.beta1",
]
KEYS += [
    "train.optimizer.warmup",
    "train.optimizer.final",
    "train.optimizer.clip",
    "train.optimizer.weight_decay",
    "model.text.vocab_size",
]
KEYS += [
    "model.text.rope_theta",
    "model.text.rms_norm_eps",
    "model.text.expand_v",
    "model.text.conv_size",
    "model.text.norm_eps",
    "zzz",
    "train.zzz",
]
KEYS += [
    "model.vision.temporal_patch_size",
    "model.vision.spatial_merge_size",
    "model.vision.in_channels",
    "model.vision.tokens_per_second",
]
SPLITS = [
    "train[5:3]",
    "train[:0]",
    "test",
    "train[",
    "train+train",
    "all",
    "train[:200%]",
    "train[-3:]",
    "",
    "train[:10%]",
    "../train",
]
NAMES = [
    "huggingface:x/y",
    "mnist",
    "../x",
    "/etc",
    "tiny_vqa:9.9.9",
    "tiny_vqa/x",
    "",
    "tiny_vqa",
    "kubric:x",
    "http://127.0.0.1:9/x",
]
VALUES = [
    "1979-05-27T07:32:00",
    "0x10",
    "0b1",
    "'''a\nb'''",
    "[1, 'a']",
    "{a = 1}",
    "inf",
    "-nan",
    "1_000",
    "+5",
    "\\x00",
    "=",
    "[",
    '"',
    "#",
    "",
]


def toml(value: Any) -> str:
    """A value as TOML; what TOML lacks (null) as an empty text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(repr(value), repr(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
    text = "" if value is None else value
    return (
        '"'
        + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
        + '"'
    )


def document(tree: dict) -> str:
    return "".join(f"{toml(key)} = {toml(value)}\n" for key, value in tree.items())


def make(rng: Random, place: Place) -> Case:
    path, out = place.work / "tiny.toml", place.out
    text = preset(place, out)
    tree = tomllib.loads(text)
    places = [
        p for p in paths(tree) if p and p not in (("train", "output"), ("train", "data", "folder"))
    ]
    changes: list[str] = []
    kind = rng.choice(
        ["value"] * 5
        + ["key"] * 3
        + ["change"] * 4
        + ["special", "special", "text", "text", "bytes", "file", "deep", "drop"]
    )
    key = rng.choice(places)
    value = bad(rng, at(tree, key)) if rng.random() < 0.6 else near(rng, at(tree, key))
    name = ".".join(map(str, key))
    label = f"{kind}: {name} = {value!r:.80}"
    data = encode(text)
    if kind == "value":
        data = encode(document(put(copy.deepcopy(tree), key, value)))
    elif kind == "drop":
        changed = copy.deepcopy(tree)
        del at(changed, key[:-1])[key[-1]]
        data = encode(document(changed))
    elif kind == "key":
        name = rng.choice(KEYS)
        *where, last = name.split(".")
        changed = copy.deepcopy(tree)
        inside = changed
        for table in where:
            inside = inside.setdefault(table, {})
        inside[last] = value
        value = value if rng.random() < 0.3 else rng.choice(NUMBERS)
        label, data = f"key: {name} = {value!r:.80}", encode(document(changed))
    elif kind == "special":
        name, values = rng.choice(
            [
                ("train.data.train", SPLITS),
                ("train.data.name", NAMES),
                ("train.data.held_out", SPLITS),
            ]
        )
        changes = [f"{name}={toml(rng.choice(values))}"]
        label = changes[0]
    elif kind == "change":
        name = rng.choice(
            [
                ".".join(k for k in key if isinstance(k, str)),
                *rng.sample(KEYS, 2),
                "",
                "a..b",
                ".",
                "model",
                "train.steps.x",
                "\0",
            ]
        )
        changes = [
            name
            + rng.choice(["=", "=", "=", " = ", ""])
            + rng.choice([toml(value), *rng.sample(VALUES, 2)])
        ]
        label = f"change {changes[0]!r:.100}"
    elif kind == "text":
        text, label = mutate_text(rng, text)
        data = encode(text)
    elif kind == "deep":
        deep = rng.choice([500, 100_000])
        more = rng.choice(
            [
                f"a = {'[' * deep}{']' * deep}",
                f"{'a.' * deep}b = 1",
                f"seed = {'9' * 5000}",
                f"a = {'{b=' * deep}1{'}' * deep}",
            ]
        )
        data, label = encode(text.replace("[train]\n", f"[train]\n{more}\n")), f"{more[:12]}..."
    elif kind == "bytes":
        data, label = mutate_bytes(rng, data)
    path.write_bytes(data)
    if kind == "file":
        label = mutate_file(rng, path, place.work / "outside")

    def action():
        loaded = load_preset(path, changes)
        if (loaded.train.output, loaded.train.data.folder) == (str(out), str(dataset(place))):
            begin(loaded, out)
        return loaded

    return Case(label, action, lambda found: _check(found, path, changes))


def begin(preset: Preset, out: Path) -> None:
    """Everything of a run up to its first batch."""
    config = preset.train
    mesh = make_mesh(preset.run)
    resolve_ops(mesh, preset.run.ops)
    source = open_mixture(config.data)
    start = prepare_start(preset.model, source, out, config.seed)
    batches = train_batches(
        Encoder(source, start.processor, start.config), start.config, config.data, config.seed
    )
    steps = config.steps or max(1, round(config.epochs * len(source) / config.data.batch))
    known = parameters(start.config, scanned=True)
    split_trainable(known, config.trainable)
    make_optimizer(config.optimizer, steps, known)
    rate = float(schedule(config.optimizer, steps)(0))
    batch = next(batches)
    if not math.isfinite(rate) or not all(
        jax.tree.leaves(jax.tree.map(lambda x: x.size > 0, batch))
    ):
        raise AssertionError(f"a learning rate of {rate}, or an empty batch")


def _check(found: Preset, path: Path, changes: list[str]) -> str:
    """The preset holds what the TOML says, within what can be computed."""
    tree = tomllib.loads(path.read_bytes().decode())
    for change in changes:
        key, _, text = change.partition("=")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = text
        at(tree, tuple(key.strip().split(".")[:-1]))[key.strip().split(".")[-1]] = value
    read = to_tree(found)
    for key in [p for p in paths(tree) if p]:
        said = at(tree, key)
        if isinstance(said, dict):
            continue
        try:
            have = at(read, key)
        except (KeyError, IndexError, TypeError):
            return f"dropped: {'.'.join(map(str, key))} = {said!r:.60}"
        if have != said or isinstance(have, bool) != isinstance(said, bool):
            return f"read as something else: {'.'.join(map(str, key))} = {said!r:.60}, {have!r:.60}"
        if isinstance(said, float) and not math.isfinite(said):
            return f"no finite number: {'.'.join(map(str, key))} = {said}"
        if (
            key[0] == "model"
            and isinstance(said, int | float)
            and said
            < (
                0
                if key[-2] == "mrope_section" or isinstance(key[-1], int) or key[-1].endswith("eps")
                else 1e-12
            )
        ):
            return f"a size out of range: {'.'.join(map(str, key))} = {said}"
    if bad := [p for p in found.train.trainable if not _compiles(p)]:
        return f"no regular expression: {bad[0]!r:.60}"
    return ""


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True
