"""An exported hybrid opens in transformers with the code that export writes, and computes the same
logits."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import conversation, hybrid
from tiny_folder import full_attention_config, tiny_model
from torch_folders import hybrid_folder, side_bytes
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    dynamic_module_utils,
)

from infinitevl_jax import InfiniteVL
from infinitevl_jax.checkpoints import (
    export_folder,
    import_folder,
    load_params,
    read_config,
    save_params,
)
from infinitevl_jax.families import family

TRUST = {"trust_remote_code": True, "dtype": torch.float32}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """transformers copies the code that it runs: into a folder of this test."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def export(model, folder):
    save_params(folder / "ours", model.params, model.config)
    export_folder(folder / "ours", folder / "hf")
    return folder / "hf"


def tensors(batch):
    return {name: torch.tensor(np.asarray(value)) for name, value in batch.items()}


@torch.no_grad()
def logits(model, batch):
    return model(**tensors(batch)).logits.numpy()


def near(found, ours):
    np.testing.assert_allclose(found, np.asarray(ours), rtol=0, atol=1e-4)
    assert np.abs(ours).max() > 1  # loud enough that 1e-4 means something


class Exported:
    """A hybrid without a past, its exported folder, and what we compute: text far past the window,
    an image and a video."""

    def __init__(self, root):
        self.model = hybrid()
        self.folder = export(self.model, root)
        self.batch = conversation(self.model.config, text=40)
        self.logits = np.asarray(self.model(**self.batch).logits)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return Exported(tmp_path_factory.mktemp("hybrid"))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_logits(exported, auto):
    theirs, report = auto.from_pretrained(exported.folder, output_loading_info=True, **TRUST)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__module__.startswith("transformers_modules")
    near(logits(theirs, exported.batch), exported.logits)


@pytest.mark.parametrize("kind", ["live names", "nested", "flash-attn"])
def test_kinds_of_checkpoints(exported, tmp_path, kind):
    """What the same code has to open: the authors' spelling, newer writers' config.json, the
    trainer's attention."""
    folder = shutil.copytree(exported.folder, tmp_path / "hf")
    content = json.loads((folder / "config.json").read_text())
    if kind == "live names":
        old = load_file(folder / "model.safetensors")
        new = {
            f"model.{n}"
            if n.startswith("visual.")
            else n.replace("model.", "model.language_model.", 1): v
            for n, v in old.items()
        }
        assert new.keys() != old.keys()
        save_file(new, folder / "model.safetensors")
    if kind == "nested":
        top = (
            "model_type",
            "auto_map",
            "architectures",
            "vision_config",
            "tie_word_embeddings",
            "image_token_id",
            "video_token_id",
        )
        rope = {
            "rope_type": "default",
            "rope_theta": content.pop("rope_theta"),
            **content.pop("rope_scaling"),
        }
        inner = {key: value for key, value in content.items() if key not in top} | {
            "rope_parameters": rope
        }
        content = {key: content[key] for key in top} | {"text_config": inner}
    if kind == "flash-attn":
        content["attn_implementation"] = "flash_attention_2"
    (folder / "config.json").write_text(json.dumps(content))
    near(
        logits(AutoModelForCausalLM.from_pretrained(folder, **TRUST), exported.batch),
        exported.logits,
    )


@pytest.mark.parametrize("kind", ["own head", "text only", "sinks"])
def test_kinds_of_models(exported, tmp_path, kind):
    config, params = exported.model.config, dict(exported.model.params)
    if kind == "own head":
        text = dataclasses.replace(config.text, tie_word_embeddings=False)
        config, params["lm_head.kernel"] = (
            dataclasses.replace(config, text=text),
            params["embed_tokens.embedding"][::-1].T,
        )
    elif kind == "sinks":
        text = dataclasses.replace(config.text, num_attention_sinks=5, sliding_window=8)
        config = dataclasses.replace(config, text=text)
    else:
        text = dataclasses.replace(config.text, mrope_section=None)
        config = dataclasses.replace(config, vision=None, text=text)
        params = {name: p for name, p in params.items() if not name.startswith("visual.")}
    model = InfiniteVL(config, params)
    batch = {"input_ids": np.random.default_rng(1).integers(1, 90, (1, 40))}
    near(
        logits(AutoModel.from_pretrained(export(model, tmp_path), **TRUST), batch),
        model(**batch).logits,
    )


def test_batches_with_padding(exported):
    """Left and right pads change nothing for the tokens beside them."""
    theirs = AutoModel.from_pretrained(exported.folder, **TRUST)
    ids = np.random.default_rng(2).integers(1, 90, (3, 12))
    mask = np.ones_like(ids)
    mask[0, :5], mask[1, 8:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found, ours = logits(theirs, batch), np.asarray(exported.model(**batch).logits)
    near(found[mask == 1], ours[mask == 1])
    near(found[0, 5:], logits(theirs, {"input_ids": ids[:1, 5:]})[0])


def test_generates_what_we_would(exported):
    """Greedy: each new token is the one with our largest logit."""
    theirs = AutoModelForImageTextToText.from_pretrained(exported.folder, **TRUST)
    old = exported.batch["input_ids"].shape[1]
    found = theirs.generate(
        **tensors(exported.batch),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    assert found.shape == (1, old + 8) and np.array_equal(
        found[:, :old], exported.batch["input_ids"]
    )
    ours = np.asarray(exported.model(**exported.batch | {"input_ids": found}).logits)[0]
    assert found[0, old:].tolist() == ours[old - 1 : -1].argmax(-1).tolist()


def test_saved_again_by_transformers(exported, tmp_path):
    """save_pretrained of the opened model is a checkpoint that we read back, bit for bit."""
    AutoModel.from_pretrained(exported.folder, **TRUST).save_pretrained(tmp_path / "saved")
    config, params = load_params(tmp_path / "saved", scanned=False)
    assert (
        config.text == exported.model.config.text and config.vision == exported.model.config.vision
    )
    assert all(np.array_equal(params[name], value) for name, value in exported.model.params.items())


def test_head_that_no_file_holds(exported, tmp_path):
    """InfiniteVL's files may come without a head though config.json says it is not tied."""
    folder = shutil.copytree(
        exported.folder, tmp_path / "hf", ignore=shutil.ignore_patterns("*.py")
    )
    content = json.loads((folder / "config.json").read_text())
    del content["auto_map"]
    (folder / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": False}))
    import_folder(folder, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    near(
        logits(AutoModel.from_pretrained(tmp_path / "back", **TRUST), exported.batch),
        exported.logits,
    )


def test_whose_code(tmp_path):
    """Code that the source brought stays, byte for byte; so does a config.json that names code
    elsewhere."""
    own = hybrid_folder(tmp_path / "own")
    elsewhere = hybrid_folder(
        tmp_path / "elsewhere",
        config={"auto_map": {"AutoModel": "someone/repository--modeling.Model"}},
    )
    (elsewhere / "modeling_infinitevl.py").unlink()
    missing = hybrid_folder(tmp_path / "missing")
    (missing / "modeling_infinitevl.py").unlink()
    for src in (own, elsewhere, missing):
        import_folder(src, tmp_path / f"{src.name}-ours")
        export_folder(tmp_path / f"{src.name}-ours", tmp_path / f"{src.name}-back")
        before, after = side_bytes(src), side_bytes(tmp_path / f"{src.name}-back")
        if src is not missing:
            assert before == after
            continue
        assert after.keys() - before.keys() == {
            "configuration_infinitevl.py",
            "modeling_infinitevl.py",
        }
        assert json.loads(after["config.json"]) == json.loads(before["config.json"]) | {
            "auto_map": family("infinite_vl").transformers_code.auto_map
        }
        assert read_config(tmp_path / "missing-back") == read_config(src)
        assert (
            AutoConfig.from_pretrained(
                tmp_path / "missing-back", trust_remote_code=True
            ).num_linear_heads
            == 2
        )


def test_families_that_transformers_knows_need_no_code(tmp_path):
    folder = export(tiny_model(full_attention_config()), tmp_path)
    assert not list(folder.glob("*.py")) and "auto_map" not in json.loads(
        (folder / "config.json").read_text()
    )
