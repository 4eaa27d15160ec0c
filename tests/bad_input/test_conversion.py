"""Bad Hugging Face folders: weights, index, torch files."""

import contextlib
import json
import os
import shutil
import struct
import sys
import time

import numpy as np
import pytest
import torch
from failing import fails
from torch_folders import BF16, hybrid_folder, hybrid_tensors, safetensors_bytes, write_folder

from infinitevl_jax.checkpoints import import_folder, load_params
from infinitevl_jax.checkpoints.safetensors_file import HEADER_BYTES

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """An intact folder to copy."""
    root = tmp_path_factory.mktemp("good")
    hybrid_folder(root / "hf")
    return root


# Each case changes a good Hugging Face folder and returns what the message has to name.


def tensors(change):
    def case(src):
        values = hybrid_tensors()
        culprit = change(values)
        (src / WEIGHTS).write_bytes(safetensors_bytes(values))
        return culprit

    return case


def missing(t):
    del t["model.layers.3.self_attn.A_log"], t["model.norm.weight"]
    return "2 missing", "model.layers.3.self_attn.A_log", "model.norm.weight"


def many_missing(t):
    for name in [name for name in t if name.startswith("visual.")]:
        del t[name]
    return "42 missing: visual.blocks.0.attn.proj.bias", ", ..."


def extra(t):
    t["model.layers.9.mlp.up_proj.weight"] = t["model.norm.weight"]
    return "1 extra", "model.layers.9.mlp.up_proj.weight"


def misshapen(t):
    t["model.layers.1.self_attn.q_conv1d.weight"] = t["model.layers.1.self_attn.q_conv1d.weight"][
        ..., :3
    ]
    return (
        "1 misshapen",
        "model.layers.1.self_attn.q_conv1d.weight",
        "[16, 1, 3] instead of [16, 1, 4]",
    )


def nan(t):
    t["model.layers.2.mlp.up_proj.weight"][3, 4] = np.nan
    return "model.layers.2.mlp.up_proj.weight", "nan at [3, 4]", WEIGHTS


def infinite(t):
    t["visual.merger.mlp.0.bias"] = t["visual.merger.mlp.0.bias"].astype(np.float32)
    t["visual.merger.mlp.0.bias"][7] = -np.inf
    return "visual.merger.mlp.0.bias", "-inf at [7]"


def quantised(t):
    t["model.norm.weight"] = t["model.norm.weight"].astype(np.int8)
    return "model.norm.weight", "I8"


def doubles(t):
    t["model.norm.weight"] = t["model.norm.weight"].astype(np.float64)
    return "model.norm.weight", "F64"


def other_head(t):
    t["lm_head.weight"] = t["model.embed_tokens.weight"].copy()
    t["lm_head.weight"][50, 3] += 1
    return "lm_head.weight", "tie_word_embeddings"


def both_spellings(t):
    t["model.language_model.norm.weight"] = t["model.norm.weight"]
    return "model.language_model.norm.weight", "twice"


def raw(change):
    def case(src):
        data = bytearray((src / WEIGHTS).read_bytes())
        (src / WEIGHTS).write_bytes(change(data))
        return (WEIGHTS,)

    return case


def header(change, *culprits):
    """Change the JSON header, leaving the data as it is."""

    def case(src):
        data = (src / WEIGHTS).read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        text = json.loads(data[8:start])
        text = change(text) or text
        text = (text if isinstance(text, str) else json.dumps(text)).encode()
        (src / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[start:])
        return WEIGHTS, *culprits

    return case


def set_entry(name, **fields):
    return lambda h: h[name].update(fields)


def overlap(h):
    names = list(h)
    for name in names[2:]:
        h[name]["data_offsets"] = [n - 2 for n in h[name]["data_offsets"]]


def hole(h):
    for name in list(h)[5:]:
        h[name]["data_offsets"] = [n + 2 for n in h[name]["data_offsets"]]


def sharded(change):
    def case(src):
        (src / WEIGHTS).unlink()
        write_folder(src, hybrid_tensors(), shards=3)
        return change(src, src / "model.safetensors.index.json")

    return case


def absent_shards(src, index):
    (src / "model-00002-of-00003.safetensors").unlink()
    return "1 absent of 3 shards", "model-00002-of-00003.safetensors"


def index_without_map(src, index):
    index.write_text('{"metadata": {}}')
    return index.name, "weight_map"


def index_disagrees(src, index):
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    return index.name, "model.norm.weight", "model-00003-of-00003.safetensors"


def index_leaves_the_folder(src, index):
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    return (index.name,)


def index_name(name, *culprits):
    def change(src, index):
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = name
        index.write_text(json.dumps(content))
        return index.name, *culprits

    return change


def shard_elsewhere(src, index):
    """A link is a name, too."""
    shard = src / "model-00002-of-00003.safetensors"
    shard.rename(src.parent / "elsewhere.safetensors")
    shard.symlink_to("../elsewhere.safetensors")
    return shard.name, "leads out"


def index_metadata(src, index):
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"metadata": [1]}))
    return index.name, "metadata"


def index_damaged_twice(src, index):
    """A wrong type, and no JSON further on."""
    index.write_text('{"metadata": [1], "weight_map": {"a": NaN}}')
    return (index.name,)


def shards_without_end(src):
    (src / WEIGHTS).rename(src / "model-00001-of-999999999.safetensors")
    return ("model-00002-of-999999999.safetensors",)


def pipe(src):
    (src / WEIGHTS).unlink()
    os.mkfifo(src / WEIGHTS)
    return WEIGHTS, "not a regular file"


def torch_pipe(src):
    (src / WEIGHTS).unlink()
    os.mkfifo(src / "pytorch_model.bin")
    return "pytorch_model.bin", "not a regular file"


def index_not_json(src, index):
    index.write_text(index.read_text()[:100])
    return index.name, "not JSON"


def tensor_in_two_shards(src, index):
    index.unlink()
    name = "model-00003-of-00003.safetensors"
    (src / name).write_bytes(
        safetensors_bytes({"visual.patch_embed.proj.weight": np.zeros((16, 3, 2, 2, 2), BF16)})
    )
    return "visual.patch_embed.proj.weight", name, "twice"


def shards_cut_short(src, index):
    index.unlink()
    (src / "model-00003-of-00003.safetensors").unlink()
    return ("model-00003-of-00003.safetensors",)


def single_and_index(src, index):
    shutil.copy(src / "model-00001-of-00003.safetensors", src / WEIGHTS)
    return WEIGHTS, index.name


def no_weights(src):
    (src / WEIGHTS).unlink()
    return "no weights", str(src)


def torch_file(state, *culprits):
    def case(src):
        (src / WEIGHTS).unlink()
        torch.save(state() if callable(state) else state, src / "pytorch_model.bin")
        return "pytorch_model.bin", *culprits

    return case


def torch_named_safetensors(src):
    torch.save({}, src / WEIGHTS)
    return WEIGHTS, "torch file"


def torch_cut(src):
    torch.save({"model.norm.weight": torch.ones(3000)}, src / "pytorch_model.bin")
    (src / WEIGHTS).unlink()
    (src / "pytorch_model.bin").write_bytes((src / "pytorch_model.bin").read_bytes()[:5000])
    return ("pytorch_model.bin",)


SOURCES = {
    "missing": tensors(missing),
    "many-missing": tensors(many_missing),
    "extra": tensors(extra),
    "misshapen": tensors(misshapen),
    "nan": tensors(nan),
    "infinity": tensors(infinite),
    "int8": tensors(quantised),
    "float64": tensors(doubles),
    "tied-head-differs": tensors(other_head),
    "both-spellings": tensors(both_spellings),
    "truncated": raw(lambda d: d[:-100]),
    "truncated-header": raw(lambda d: d[:300]),
    "empty-file": raw(lambda d: b""),
    "seven-bytes": raw(lambda d: d[:7]),
    "web-page": raw(lambda d: b"<!DOCTYPE html><html><body>404</body></html>" * 20),
    "lfs-pointer": raw(
        lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n"
    ),
    "trailing-bytes": raw(lambda d: d + b"\0" * 16),
    "header-too-long": raw(lambda d: struct.pack("<Q", 1 << 50) + d[8:]),
    "header-not-json": header(lambda h: json.dumps(h)[:-5] + "     ", "not a JSON object"),
    "header-a-list": header(lambda h: "[1, 2, 3]", "not a JSON object"),
    "header-entry-damaged": header(set_entry("model.norm.weight", shape="x"), "model.norm.weight"),
    "negative-shape": header(set_entry("model.norm.weight", shape=[-32]), "model.norm.weight"),
    "unknown-dtype": header(
        set_entry("model.norm.weight", dtype="F12"), "model.norm.weight", "F12"
    ),
    "shape-against-bytes": header(
        set_entry("model.norm.weight", shape=[33]), "model.norm.weight", "66"
    ),
    "begin-after-end": header(
        set_entry("model.norm.weight", data_offsets=[64, 0]), "model.norm.weight"
    ),
    "offset-huge": header(
        set_entry("model.norm.weight", data_offsets=[0, 2**62]), "model.norm.weight"
    ),
    "offset-beyond-64-bits": header(
        set_entry("model.norm.weight", data_offsets=[0, 10**30]), "model.norm.weight"
    ),
    "offset-a-fraction": header(
        set_entry("model.norm.weight", data_offsets=[0, 6.5]), "model.norm.weight"
    ),
    "offset-true": header(
        set_entry("model.norm.weight", data_offsets=[False, True]), "model.norm.weight"
    ),
    "three-offsets": header(
        set_entry("model.norm.weight", data_offsets=[0, 1, 2]), "model.norm.weight"
    ),
    "shape-huge": header(
        set_entry("model.norm.weight", shape=[2**40, 2**40, 0]),
        "model.norm.weight",
        "impossible shape",
    ),
    "shape-of-5000-axes": header(
        set_entry("model.norm.weight", shape=[1] * 5000), "model.norm.weight"
    ),
    "shape-true": header(set_entry("model.norm.weight", shape=[True]), "model.norm.weight"),
    "dtype-a-list": header(set_entry("model.norm.weight", dtype=["BF16"]), "model.norm.weight"),
    "entry-null": header(lambda h: h.update({"model.norm.weight": None}), "model.norm.weight"),
    "header-deep": header(lambda h: "[" * 200_000, "not a JSON object"),
    "header-half-a-surrogate": header(
        lambda h: json.dumps(h | {"\ud800": h["model.norm.weight"]}), "not a JSON object"
    ),
    "header-dtype-half-a-surrogate": header(
        set_entry("model.norm.weight", dtype="\ud800"), "not a JSON object"
    ),
    "header-nan": header(set_entry("model.norm.weight", shape=[float("nan")]), "not a JSON object"),
    "index-damaged-twice": sharded(index_damaged_twice),
    "header-null": header(lambda h: "null", "not a JSON object"),
    "header-of-5000-digits": header(lambda h: '{"a": ' + "9" * 5000 + "}"),
    "header-over-the-limit": header(
        lambda h: json.dumps(h) + " " * HEADER_BYTES, f"{HEADER_BYTES:,} that are read"
    ),
    "weights-a-pipe": pipe,
    "torch-pipe": torch_pipe,
    "overlap": header(overlap, "overlaps"),
    "hole": header(hole, "hole"),
    "twice-in-header": header(
        lambda h: json.dumps(h)[:-1] + ', "model.norm.weight": {}}', "model.norm.weight", "twice"
    ),
    "metadata-a-text": header(lambda h: h.update(__metadata__=""), "__metadata__"),
    "metadata-a-list": header(lambda h: h.update(__metadata__=[]), "__metadata__"),
    "metadata-false": header(lambda h: h.update(__metadata__=False), "__metadata__"),
    "metadata-not-strings": header(lambda h: h.update(__metadata__={"a": 1}), "__metadata__"),
    "absent-shards": sharded(absent_shards),
    "index-without-map": sharded(index_without_map),
    "index-disagrees": sharded(index_disagrees),
    "index-leaves-the-folder": sharded(index_leaves_the_folder),
    "index-not-json": sharded(index_not_json),
    "index-shard-elsewhere": sharded(shard_elsewhere),
    "index-shard-absolute": sharded(index_name("/etc/passwd", "plain file name")),
    "index-shard-hidden": sharded(index_name(".model.safetensors", "plain file name")),
    "index-shard-a-number": sharded(index_name(3, "weight_map")),
    "index-shard-with-nul": sharded(index_name("a\0b", "plain file name")),
    "index-metadata-a-list": sharded(index_metadata),
    "shards-without-end": shards_without_end,
    "tensor-in-two-shards": sharded(tensor_in_two_shards),
    "shards-cut-short": sharded(shards_cut_short),
    "single-and-index": sharded(single_and_index),
    "no-weights": no_weights,
    "torch-file-not-tensors": torch_file({"model.norm.weight": 3}, "dictionary of tensors"),
    "torch-file-runs-code": torch_file({"a": contextlib.nullcontext()}, "weights_only=True"),
    "torch-file-cut": torch_cut,
    "torch-file-numbered": torch_file({3: torch.ones(3)}, "3 is no plain tensor"),
    "torch-file-sparse": torch_file({"a": torch.eye(3).to_sparse()}, "'a' is no plain tensor"),
    "torch-file-meta": torch_file({"a": torch.ones(3, device="meta")}, "'a' is no plain tensor"),
    "torch-file-larger-than-it-is": torch_file(
        {"a": torch.ones(1).expand(1 << 40)}, "'a' is no plain tensor"
    ),
    "torch-file-int8": torch_file(
        {"model.norm.weight": torch.ones(3, dtype=torch.int8)}, "model.norm.weight"
    ),
    "torch-named-safetensors": torch_named_safetensors,
}


@pytest.mark.parametrize("name", SOURCES)
def test_source(tmp_path, good, name):
    src = tmp_path / "src"
    shutil.copytree(good / "hf", src)
    culprits = SOURCES[name](src)
    fails(tmp_path, lambda: import_folder(src, tmp_path / "ours"), *culprits)
    fails(tmp_path, lambda: load_params(src, scanned=False), *culprits)


@pytest.mark.parametrize("said, twice", [("100000 extra", []), ("t0 stands twice", [0])])
def test_long_header(tmp_path, good, said, twice):
    """A header of 100,000 tensors is read in a time that follows its length; what is twice in it is
    named."""
    src = tmp_path / "src"
    shutil.copytree(good / "hf", src)
    data = (src / WEIGHTS).read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    end = len(data) - start
    more = "".join(
        f',"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[{end},{end}]}}'
        for i in [*range(100_000), *twice]
    )
    text = data[8:start].rstrip()[:-1] + f"{more}}}".encode()
    (src / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[start:])
    began = time.monotonic()
    fails(tmp_path, lambda: load_params(src, scanned=False), said)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("metadata", ["null", "{}", '{"format": "pt"}'])
def test_metadata(tmp_path, good, metadata):
    """Some writers have null where there is nothing to say."""
    src = tmp_path / "src"
    shutil.copytree(good / "hf", src)
    header(lambda h: json.dumps(h).replace('{"format": "pt"}', metadata))(src)
    _, params = load_params(src, scanned=False)
    _, same = load_params(good / "hf", scanned=False)
    assert all(np.array_equal(params[name], same[name]) for name in same)
    import_folder(src, tmp_path / "ours")


def test_torch_file_without_torch(tmp_path, good, monkeypatch):
    src = tmp_path / "src"
    shutil.copytree(good / "hf", src)
    culprits = torch_file({"model.norm.weight": torch.ones(3)})(src)
    monkeypatch.setitem(sys.modules, "torch", None)
    fails(tmp_path, lambda: import_folder(src, tmp_path / "ours"), *culprits, "pip install torch")
