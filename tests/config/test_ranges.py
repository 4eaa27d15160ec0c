"""Every key of a preset accepts its declared range and refuses everything else by name."""

import json
import math
import tomllib

import pytest
from tiny_run import PRESET

from infinitevl_jax.config.data import DataConfig, SourceConfig
from infinitevl_jax.config.model import ModelConfig, TextConfig, VisionConfig
from infinitevl_jax.config.presets import ModelSource, Preset, _everywhere, load_preset, parse
from infinitevl_jax.config.ranges import describe, hints
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.train import OptimizerConfig, TrainConfig
from infinitevl_jax.errors import InfiniteVLError

BAD = [
    True,
    -1,
    0,
    1,
    2**31,
    2**64,
    10**30,
    1e308,
    -0.5,
    0.5,
    math.nan,
    math.inf,
    "",
    "x",
    "1",
    [],
    [1],
    [[1]],
    ["a"],
    [-1],
    {},
]
BAD += [
    {"a": 1},
    [{}],
    "a" * 5000,
    "\0",
    "\ud800",
    "(",
    [32, 32],
    ["sliding_attention"] * 10**5,
    [0.5],
    [math.nan],
    None,
]


@pytest.mark.parametrize("key", _everywhere())
def test_whatever_a_key_holds_is_taken_or_refused_by_name(key):
    for value in BAD:
        tree = table = json.loads(json.dumps(tomllib.loads(PRESET)))
        *path, last = key.split(".")
        for name in path:
            table = table.setdefault(name, {})
        table[last] = value
        try:
            assert isinstance(parse(Preset, tree, "", "x.toml"), Preset)
        except InfiniteVLError as error:
            assert error.culprit.startswith("x.toml: ") and len(str(error)) < 1600, error


# refused value, and the message's cure
RANGES = {
    (TrainConfig, "seed", -1): "give a whole number, 0 or more, at most 4,294,967,295",
    (TrainConfig, "seed", 2**32): "give a whole number, 0 or more, at most 4,294,967,295",
    (TrainConfig, "steps", 2**31): "give a whole number, 0 or more, at most 2,147,483,647",
    (TrainConfig, "epochs", math.nan): "give a number, 0 or more, at most 1,000,000,000",
    (
        TrainConfig,
        "output",
        "",
    ): "give a text, 1 characters or more, at most 4,096 characters, without a NUL character",
    (
        TrainConfig,
        "output",
        "a\0b",
    ): "give a text, 1 characters or more, at most 4,096 characters, without a NUL character",
    (TrainConfig, "keep", 0): "give a whole number, 1 or more, at most 2,147,483,647",
    (TrainConfig, "checkpoint_minutes", -1): "give a number, 0 or more, at most 2,147,483,647",
    (DataConfig, "weight", math.nan): "give a number, more than 0, at most 1,000",
    (SourceConfig, "weight", 0): "give a number, more than 0, at most 1,000",
    (DataConfig, "too_long", "drop"): "give one of skip, cut",
    (DataConfig, "lookahead", 0): "give a whole number, 1 or more, at most 4,096",
    (DataConfig, "length", 2**31): "give a whole number, 2 or more, at most 16,777,216",
    (DataConfig, "max_skipped", 1.5): "give a number, 0 or more, at most 1",
    (OptimizerConfig, "peak_lr", math.inf): "give a number, 0 or more, at most 1,000,000",
    (OptimizerConfig, "beta2", math.nan): "give a number, 0 or more, at most 1",
    (RunConfig, "fsdp", -2): "give a whole number, -1 or more, at most 1,048,576",
    (RunConfig, "dtype", "float8"): "give one of float32, bfloat16",
    (RunConfig, "remat", "some" * 2000): "give one of none, dots, full",
    (RunConfig, "scan", 1): "give true or false",
    (VisionConfig, "depth", 10**6): "give a whole number, 1 or more, at most 1,024",
    (VisionConfig, "num_heads", 0): "give a whole number, 1 or more, at most 4,096",
    (VisionConfig, "patch_size", 10**9): "give a whole number, 1 or more, at most 512",
    (VisionConfig, "rope_theta", 0.0): "give a number, more than 0, at most 1e+15",
    (TextConfig, "num_key_value_heads", 0): "give a whole number, 1 or more, at most 4,096",
    (TextConfig, "intermediate_size", 0): "give a whole number, 1 or more, at most 1,048,576",
    (TextConfig, "expand_v", math.nan): "give a number, more than 0, at most 64",
    (TextConfig, "layer_types", ("full_attention",) * 10**6): "give a list, at most 1,024 items",
    (TextConfig, "mrope_section", (64,)): "give a list of 3",
    (ModelConfig, "image_token_id", -1): "give a whole number, 0 or more, at most 2,147,483,647",
    (ModelSource, "max_pixels", 0): "give a whole number, 1 or more, at most 2,147,483,647",
}


@pytest.mark.parametrize("case", RANGES, ids=lambda c: f"{c[0].__name__}.{c[1]}={str(c[2])[:20]}")
def test_ranges_hold_however_a_configuration_is_built(case):
    kind, name, value = case
    needed = {
        TextConfig: {"layer_types": ("full_attention",)},
        ModelConfig: {"text": TextConfig(("full_attention",))},
    }.get(kind, {})
    needed = needed or ({"from_": "x"} if kind is ModelSource else {})
    with pytest.raises(InfiniteVLError) as caught:
        kind(**(needed | {name: value}))
    assert caught.value.culprit.startswith(f"{name} is ") and caught.value.cure == RANGES[case]
    assert f"give {describe(hints(kind)[name])}" == RANGES[case]


def test_an_item_of_a_list_is_named():
    with pytest.raises(InfiniteVLError, match=r"fullatt_block_indexes\[1\] is -3"):
        VisionConfig(fullatt_block_indexes=(1, -3))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("x = " + "[" * 5000 + "]" * 5000, "nests too deep"),
        ("x = " + "{a=" * 5000 + "1" + "}" * 5000, "nests too deep"),
        ("x = " + "1" * 5000, "4300 digits"),
        ("x = \ud800", "utf-8"),
        ("# " + "x" * (1 << 20), "1,048,576"),
    ],
    ids=["lists", "tables", "digits", "bytes", "size"],
)
def test_files_that_are_no_preset(tmp_path, text, reason):
    path = tmp_path / "p.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InfiniteVLError, match=reason) as caught:
        load_preset(path)
    assert "p.toml" in caught.value.culprit


@pytest.mark.parametrize("value", ["[" * 5000 + "]" * 5000, "1" * 5000], ids=["lists", "digits"])
def test_changes_that_cannot_be_read(tmp_path, value):
    (tmp_path / "p.toml").write_text('[model]\nfrom = "somewhere"\n')
    with pytest.raises(InfiniteVLError, match="train.steps: its value cannot be read"):
        load_preset(tmp_path / "p.toml", [f"train.steps={value}"])


LARGE = [
    {"batch": 1024, "length": 2**17},
    {"batch": 2**20, "questions": 64},
    {"batch": 2**10, "patches": 2**14},
]


@pytest.mark.parametrize("changes", LARGE)
def test_batches_that_no_machine_holds(changes):
    with pytest.raises(InfiniteVLError, match="train.data: a batch of [0-9,]+ (tokens|patches)"):
        DataConfig(**changes)
