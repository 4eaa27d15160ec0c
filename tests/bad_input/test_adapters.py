"""Bad LoRA adapters."""

import json

import numpy as np
import pytest
from failing import fails
from torch_folders import HYBRID, hybrid_folder, safetensors_bytes

from infinitevl_jax.conversion import import_folder, load_params


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Intact folders to copy: Hugging Face's and ours."""
    root = tmp_path_factory.mktemp("good")
    import_folder(hybrid_folder(root / "hf"), root / "ours")
    return root


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def lora(*culprits, weights=None, drop_weights=False, **keys):
    def case(folder):
        folder.mkdir()
        content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | keys
        (folder / "adapter_config.json").write_text(json.dumps(content))
        values = {f"{Q}.lora_A.weight": np.ones((4, 32), np.float32), f"{Q}.lora_B.weight": np.ones((32, 4), np.float32)}
        values = {n: v for n, v in (values | (weights or {})).items() if v is not None}
        if not drop_weights:
            (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(values))
        return culprits

    return case


LONE = "base_model.model.model.layers.1.self_attn.q_proj.bias"
LOST = "base_model.model.model.layers.77.mlp.up_proj"
ADAPTERS = {
    "no-weights": lora("adapter_model.safetensors", drop_weights=True),
    "other-kind": lora("adapter_config.json", "IA3", peft_type="IA3"),
    "dora": lora("adapter_config.json", "use_dora", use_dora=True),
    "fan-in-fan-out": lora("adapter_config.json", "fan_in_fan_out", fan_in_fan_out=True),
    "biases": lora("adapter_config.json", "bias", bias="all"),
    "rank": lora("layers.0.self_attn.q_proj", "r = 8", r=8),
    "no-rank": lora("layers.0.self_attn.q_proj", "r = None", r=None),
    "one-side": lora("layers.0.self_attn.q_proj", "lora_B", weights={f"{Q}.lora_B.weight": None}),
    "width": lora("layers.0.self_attn.q_proj", "[48, 32]", weights={f"{Q}.lora_B.weight": np.ones((48, 4), np.float32)}),
    "whole-tensor": lora(LONE, weights={LONE: np.ones(16, np.float32)}),
    "embedding": lora("lora_embedding_A", weights={"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 100), np.float32)}),
    "nan": lora(f"{Q}.lora_A.weight", "nan", weights={f"{Q}.lora_A.weight": np.full((4, 32), np.nan, np.float32)}),
    "target-not-there": lora(
        "model.layers.77.mlp.up_proj.weight",
        weights={f"{LOST}.lora_A.weight": np.ones((4, 32), np.float32), f"{LOST}.lora_B.weight": np.ones((48, 4), np.float32)},
    ),
    "empty": lora("adapter_model.safetensors", "empty", weights={f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}),
    "not-a-folder": lambda folder: ("adapter_config.json",),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(tmp_path, good, name):
    culprits = ADAPTERS[name](tmp_path / "lora")
    fails(tmp_path, lambda: import_folder(good / "hf", tmp_path / "ours", adapters=[tmp_path / "lora"]), *culprits)


def test_adapter_alone_is_no_model(tmp_path):
    lora(base_model_name_or_path="hustvl/InfiniteVL")(tmp_path / "lora")
    (tmp_path / "lora" / "config.json").write_text(json.dumps(HYBRID))
    fails(tmp_path, lambda: import_folder(tmp_path / "lora", tmp_path / "ours"), "adapter", "hustvl/InfiniteVL", "--adapter")


def test_adapter_on_ours(tmp_path, good):
    lora()(tmp_path / "lora")
    fails(tmp_path, lambda: load_params(good / "ours", scanned=True, adapters=[tmp_path / "lora"]), "merged on import")
