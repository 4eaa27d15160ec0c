"""LoRA adapters merged on import, against the sum computed directly."""

import json

import numpy as np
import pytest
import torch
import transformers
from torch_folders import (
    BF16,
    hybrid_folder,
    hybrid_tensors,
    read_folder,
    safetensors_bytes,
    spell_live,
)

from infinitevl_jax.checkpoints import export_folder, import_folder, inspect_folder, load_params

TARGETS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.5.self_attn.g_proj",
    "model.layers.8.mlp.down_proj",
    "visual.blocks.1.attn.qkv",
)


def adapter(folder, *, seed=1, live=False, dtype=np.float32, default="", **config):
    """A PEFT folder over TARGETS, and published weight name -> (A, B) in f32."""
    rng, pairs, tensors = np.random.default_rng(seed), {}, {}
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "bias": "none",
        "fan_in_fan_out": False,
        "base_model_name_or_path": "x",
    } | config
    shapes = {name: v.shape for name, v in hybrid_tensors().items()}
    for name in TARGETS:
        rank = config.get("rank_pattern", {}).get(name.rsplit(".", 1)[1], config["r"])
        out, width = shapes[name + ".weight"]
        a, b = (
            rng.normal(size=(rank, width)).astype(dtype),
            rng.normal(size=(out, rank)).astype(dtype),
        )
        module = "base_model.model." + (spell_live(name) if live else name)
        tensors |= {f"{module}.lora_A{default}.weight": a, f"{module}.lora_B{default}.weight": b}
        pairs[name + ".weight"] = a.astype(np.float32), b.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    return pairs


def expected(*merges):
    """Torch tensors after adding scale * B A of every (pairs, scale of a name)."""
    out = hybrid_tensors()
    for name in {name for pairs, _ in merges for name in pairs}:
        total = out[name].astype(np.float64)
        for pairs, scale in merges:
            a, b = pairs[name]
            total = total + scale(name) * (b.astype(np.float64) @ a.astype(np.float64))
        out[name] = total
    return out


def check(src, tmp_path, want, adapters=()):
    import_folder(src, tmp_path / "ours", adapters=adapters, overwrite=True)
    export_folder(tmp_path / "ours", tmp_path / "back", overwrite=True)
    back, plain = read_folder(tmp_path / "back"), hybrid_tensors()
    for name, value in want.items():
        dtype, shape, raw = back[name]
        found = np.frombuffer(raw, BF16).reshape(shape).astype(np.float64)
        assert dtype == "BF16"
        if value.dtype == BF16:
            assert raw == plain[name].tobytes(), name  # untouched
        else:
            assert np.abs(found - value).max() <= np.abs(value).max() * 2**-8, (
                name
            )  # half a bf16 step, at most
            assert not np.array_equal(found, plain[name].astype(np.float64))
    assert not list((tmp_path / "back").glob("adapter*"))


@pytest.mark.parametrize("live", [False, True])
def test_merge(tmp_path, live):
    src = hybrid_folder(tmp_path / "src")
    pairs = adapter(
        tmp_path / "lora",
        live=live,
        dtype=BF16 if live else np.float32,
        default=".default" if live else "",
    )
    check(src, tmp_path, expected((pairs, lambda _: 6 / 4)), [tmp_path / "lora"])
    assert "lora" in str(inspect_folder(tmp_path / "ours"))


def test_rslora_and_patterns(tmp_path):
    src = hybrid_folder(tmp_path / "src")
    pairs = adapter(
        tmp_path / "a",
        use_rslora=True,
        rank_pattern={"qkv": 2},
        alpha_pattern={"layers.5.self_attn.g_proj": 20},
    )

    def scale(name):
        return (20 if "layers.5" in name else 6) / (2 if "qkv" in name else 4) ** 0.5

    check(src, tmp_path, expected((pairs, scale)), [tmp_path / "a"])


def test_several_and_beside_the_weights(tmp_path):
    """One adapter lies beside the weights, a second one is given; both are summed before the one
    cast."""
    src = hybrid_folder(tmp_path / "src")
    first, second = adapter(src), adapter(tmp_path / "b", seed=2, lora_alpha=1)
    want = expected((first, lambda _: 1.5), (second, lambda _: 0.25))
    check(src, tmp_path, want, [tmp_path / "b"])
    _, params = load_params(src, scanned=False, adapters=[tmp_path / "b"])
    name = "model.layers.5.self_attn.g_proj"
    found = np.asarray(params["layers.5.self_attn.g_proj.kernel"], np.float64).T
    assert np.abs(found - want[name + ".weight"]).max() <= np.abs(found).max() * 2**-8


def test_merge_of_a_shard_is_the_shard_of_the_merge(tmp_path):
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    src = hybrid_folder(tmp_path / "src")
    adapter(src)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    _, whole = load_params(src, scanned=False)
    shardings = {
        n: NamedSharding(mesh, PartitionSpec("a" if p.ndim == 2 and p.shape[0] % 4 == 0 else None))
        for n, p in whole.items()
    }
    _, spread = load_params(src, scanned=False, shardings=shardings)
    for name in ("layers.0.self_attn.q_proj.kernel", "layers.8.mlp.down_proj.kernel"):
        near = np.asarray(spread[name], np.float32), np.asarray(whole[name], np.float32)
        np.testing.assert_allclose(*near, rtol=2**-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {
            "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 6},
            "alpha_pattern": {r"layers\.[01]\..*up_proj": 5},
        },
        {
            "rank_pattern": {"model.layers.(0|2).self_attn.q_proj": 3, "q_proj": 1},
            "use_rslora": True,
        },
        {"init_lora_weights": "gaussian", "lora_dropout": 0.3, "exclude_modules": "down_proj"},
        {"init_lora_weights": "orthogonal", "layers_to_transform": [1]},
        {"init_lora_weights": "eva"},
    ],
    ids=["plain", "rslora", "patterns", "first pattern wins", "gaussian", "orthogonal", "eva"],
)
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_as_peft_merges(tmp_path, options):
    """The weights of peft's own merge_and_unload of the same folder."""
    import peft  # 6 seconds, which every worker would spend on collecting this file

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**sizes, vocab_size=64, tie_word_embeddings=True)
    )
    model.save_pretrained(tmp_path / "base")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]} | options
    if options.get("init_lora_weights") == "eva":
        options["eva_config"] = peft.tuners.lora.EvaConfig()
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "lora")
    base = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload().state_dict()
    _, params = load_params(tmp_path / "base", scanned=False, adapters=[tmp_path / "lora"])
    _, plain = load_params(tmp_path / "base", scanned=False)
    changed = 0
    for layer in range(3):
        for weight in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"layers.{layer}.{weight}.kernel"
            want = merged[f"model.layers.{layer}.{weight}.weight"].numpy().T
            np.testing.assert_allclose(np.asarray(params[name]), want, rtol=1e-5, atol=1e-5)
            changed += not np.array_equal(params[name], plain[name])
    assert changed == (2 if "layers_to_transform" in options else 6)
