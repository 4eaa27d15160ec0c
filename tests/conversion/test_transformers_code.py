"""An exported hybrid opens in transformers with the code that export writes, and computes the same logits."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from tiny_folder import full_attention_config, tiny_model
from torch_folders import hybrid_folder, side_bytes
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, dynamic_module_utils

from infinitevl_jax import InfiniteVL
from infinitevl_jax.conversion import export_folder, import_folder, read_config, save_params
from infinitevl_jax.conversion.transformers_code import AUTO_MAP

from tiny import conversation, hybrid  # isort: skip  (tiny_folder says where it lies)

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


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_logits(tmp_path, auto):
    """Text far past the window, an image and a video, from a folder without a past."""
    model = hybrid()
    folder = export(model, tmp_path)
    theirs, report = auto.from_pretrained(folder, output_loading_info=True, **TRUST)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__module__.startswith("transformers_modules")
    batch = conversation(model.config, text=60)
    near(logits(theirs, batch), model(**batch).logits)


@pytest.mark.parametrize("kind", ["own head", "live names", "nested", "text only", "flash-attn"])
def test_kinds_of_checkpoints(tmp_path, kind):
    model = hybrid(tie_word_embeddings=kind != "own head")
    if kind == "text only":
        text = dataclasses.replace(model.config.text, mrope_section=None)
        config = dataclasses.replace(model.config, vision=None, text=text)
        params = {name: p for name, p in model.params.items() if not name.startswith("visual.")}
        model = InfiniteVL(config, params)
    folder = export(model, tmp_path)
    content = json.loads((folder / "config.json").read_text())
    if kind == "live names":  # as the authors' training code writes
        from safetensors.numpy import load_file, save_file

        old = load_file(folder / "model.safetensors")
        new = {f"model.{n}" if n.startswith("visual.") else n.replace("model.", "model.language_model.", 1): v for n, v in old.items()}
        assert new.keys() != old.keys()
        save_file(new, folder / "model.safetensors")
    if kind == "nested":
        top = ("model_type", "auto_map", "architectures", "vision_config", "tie_word_embeddings", "image_token_id", "video_token_id")
        rope = {"rope_type": "default", "rope_theta": content.pop("rope_theta"), **content.pop("rope_scaling")}
        inner = {key: value for key, value in content.items() if key not in top} | {"rope_parameters": rope}
        content = {key: content[key] for key in top} | {"text_config": inner}
    if kind == "flash-attn":
        content["attn_implementation"] = "flash_attention_2"
    (folder / "config.json").write_text(json.dumps(content))
    theirs = AutoModelForCausalLM.from_pretrained(folder, **TRUST)
    batch = {"input_ids": np.random.default_rng(1).integers(1, 90, (1, 40))} if kind == "text only" else conversation(model.config)
    near(logits(theirs, batch), model(**batch).logits)


def test_batches_with_padding(tmp_path):
    """Left and right pads change nothing for the tokens beside them."""
    model = hybrid()
    theirs = AutoModel.from_pretrained(export(model, tmp_path), **TRUST)
    ids = np.random.default_rng(2).integers(1, 90, (3, 12))
    mask = np.ones_like(ids)
    mask[0, :5], mask[1, 8:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found, ours = logits(theirs, batch), np.asarray(model(**batch).logits)
    near(found[mask == 1], ours[mask == 1])
    near(found[0, 5:], model(input_ids=ids[:1, 5:]).logits[0])


def test_generates_what_we_generate(tmp_path):
    model = hybrid()
    theirs = AutoModelForImageTextToText.from_pretrained(export(model, tmp_path), **TRUST)
    batch = conversation(model.config, text=6)
    found = theirs.generate(**tensors(batch), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = batch["input_ids"]
    for _ in range(8):  # by the definition
        step = model(**batch | {"input_ids": ids}).logits[0, -1]
        ids = np.append(ids, [[int(step.argmax())]], axis=1)
    assert found.tolist() == ids.tolist()


def test_saved_again_by_transformers(tmp_path):
    """save_pretrained of the opened model is a checkpoint that we read back, bit for bit."""
    model = hybrid()
    theirs = AutoModel.from_pretrained(export(model, tmp_path), **TRUST)
    theirs.save_pretrained(tmp_path / "saved")
    again = InfiniteVL.from_pretrained(tmp_path / "saved")
    assert again.config.text == model.config.text and again.config.vision == model.config.vision
    assert all(np.array_equal(again.params[name], value) for name, value in model.params.items())


def test_head_that_no_file_holds(tmp_path):
    """InfiniteVL's files may come without a head though config.json says it is not tied."""
    model = hybrid()
    folder = export(model, tmp_path)
    for path in folder.glob("*.py"):
        path.unlink()
    content = json.loads((folder / "config.json").read_text())
    del content["auto_map"]
    (folder / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": False}))
    import_folder(folder, tmp_path / "imported")
    export_folder(tmp_path / "imported", tmp_path / "back")
    theirs = AutoModel.from_pretrained(tmp_path / "back", **TRUST)
    batch = {"input_ids": np.arange(1, 20)[None]}
    near(logits(theirs, batch), model(**batch).logits)


def test_whose_code(tmp_path):
    """Code that the source brought stays, byte for byte; so does a config.json that names code elsewhere."""
    own = hybrid_folder(tmp_path / "own")
    elsewhere = hybrid_folder(tmp_path / "elsewhere", config={"auto_map": {"AutoModel": "someone/repository--modeling.Model"}})
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
        assert after.keys() - before.keys() == {"configuration_infinitevl.py", "modeling_infinitevl.py"}
        assert json.loads(after["config.json"]) == json.loads(before["config.json"]) | {"auto_map": AUTO_MAP}
        assert read_config(tmp_path / "missing-back") == read_config(src)
        assert AutoConfig.from_pretrained(tmp_path / "missing-back", trust_remote_code=True).num_linear_heads == 2


def test_families_that_transformers_knows_need_no_code(tmp_path):
    folder = export(tiny_model(full_attention_config()), tmp_path)
    assert not list(folder.glob("*.py")) and "auto_map" not in json.loads((folder / "config.json").read_text())
