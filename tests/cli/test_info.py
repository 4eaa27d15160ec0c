"""`infinitevl info`: all figures against the truth, from headers only."""

import json
import re
import shutil

import numpy as np
import pytest
from tiny_folder import full_attention_config
from torch_folders import hybrid_folder, hybrid_shapes

from infinitevl_jax.checkpoints import export_folder, inspect
from infinitevl_jax.checkpoints.source import Source
from infinitevl_jax.checkpoints.weights import leaves
from infinitevl_jax.config.model import infinitevl_4b
from infinitevl_jax.nn.params import cache_spec


def test_parts_of_the_published_model():
    config, bf16 = infinitevl_4b(), np.dtype("bfloat16")
    dtypes = {name: bf16 for leaf in leaves(config, scanned=False) for name in leaf.torch}
    parts = inspect.parts(config, dtypes)
    assert {name: sizes[bf16] for name, sizes in parts.items()} == {
        "vision tower": 631_975_680,
        "vision merger": 36_708_608,
        "embeddings": 311_164_928,
        "softmax mixers": 84_957_696,
        "Gated DeltaNet mixers": 908_631_648,
        "MLPs": 2_434_793_472,
        "norms": 149_504,
    }
    assert sum(sum(sizes.values()) for sizes in parts.values()) == 4_408_381_536


def by_hand(formula: str, length: int) -> int:
    words = (
        re.sub(r"layers|bytes|\b\w*(?:state|[kv])\b", "", formula)
        .replace("length", str(length))
        .replace("x", "*")
    )
    assert re.fullmatch(r"[\d *+()]+", words)
    return eval(words)


@pytest.mark.parametrize(
    "config", [infinitevl_4b(), full_attention_config()], ids=["hybrid", "full"]
)
def test_the_printed_formula_gives_the_bytes(config):
    for length in inspect.LENGTHS:
        formula = inspect.cache_formula(config, np.dtype("bfloat16"))
        spec = cache_spec(config, 1, length, "bfloat16")
        assert by_hand(formula, length) == spec.nbytes


def test_ours_as_json_and_as_a_table(run, folder, model):
    facts = json.loads(run("info", folder, "--json").stdout)
    assert facts["family"] == "infinite_vl" and facts["kind"] == "ours"
    assert facts["layers"] == {"window attention": 1, "Gated DeltaNet": 1} and facts["window"] == 16
    assert (
        facts["parameters"] == model.parameter_count and facts["bytes"] == 4 * model.parameter_count
    )
    assert (
        facts["cache"]["bytes"]["1000"]
        == facts["cache"]["bytes"]["100000"]
        == model.init_cache(1).nbytes
    )
    assert "vocab.json" in facts["tokenizer"] and facts["template"].startswith("built-in")
    assert facts["ids"] == {
        "pad": 256,
        "end": [256, 258],
        "image": 268,
        "video": 269,
        "vision_start": 265,
        "vision_end": 266,
    }
    table = run("info", folder).stdout
    for figure in (
        f"{model.parameter_count:,}",
        *re.findall(r"\d+ layers x \(.*?\)", facts["cache"]["formula"]),
        "100,000 tokens",
        "softmax mixers",
        "float32",
        "built-in",
    ):
        assert figure in table
    assert max(map(len, table.splitlines())) < 200
    assert run("convert", "inspect", folder).stdout == table  # one question, one answer


def test_hugging_face_folders_read_from_headers_alone(run, tmp_path, monkeypatch):
    """Mixed dtypes, a stored tied head, an invalid tokenizer."""
    hybrid_folder(tmp_path / "hf", mixed=True, head=True)
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("a weight was read"))
    facts = json.loads(run("info", tmp_path / "hf", "--json").stdout)
    assert facts["kind"] == "Hugging Face" and facts["tokenizer"].startswith("none that fits: ")
    assert (
        facts["layers"] == {"window attention": 3, "Gated DeltaNet": 6}
        and facts["head"] == "tied to the embeddings"
    )
    sizes = [int(np.prod(shape)) for shape in hybrid_shapes().values()]
    assert facts["parameters"] == sum(sizes)
    assert facts["bytes"] == sum(size * (4 if i % 3 == 0 else 2) for i, size in enumerate(sizes))
    assert set(facts["parts"]["MLPs"]["dtypes"]) == {"float32", "bfloat16"}
    assert facts["ids"]["end"] == [98, 97]  # generation_config.json's


def test_both_kinds_of_folder_say_the_same(run, folder, tmp_path):
    export_folder(folder, tmp_path / "hf")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "hf" / name)
    ours, theirs = (
        json.loads(run("info", path, "--json").stdout) for path in (folder, tmp_path / "hf")
    )
    for facts in (ours, theirs):
        del facts["folder"], facts["kind"], facts["names"], facts["tokenizer"]
    assert ours == theirs


def test_a_run_stands_for_its_newest_whole_step(run, folder, tmp_path):
    for step in ("9", "10", "11"):
        shutil.copytree(folder, tmp_path / "checkpoints" / step)
    (tmp_path / "checkpoints" / "11" / "infinitevl_jax.json").unlink()  # killed on its way
    facts = json.loads(run("info", tmp_path, "--json").stdout)
    assert facts["folder"] == str(tmp_path / "checkpoints" / "10")
    asked = run("ask", tmp_path, "Hi", "--max-new-tokens", 2)
    assert (
        asked.exit_code == 0
        and f"its newest step, {tmp_path / 'checkpoints' / '10'}" in asked.stderr
    )
