"""Hugging Face folders for the tests, written without the package: names, shapes and file format
are spelled out here again."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
SPELLED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8"}

HYBRID = {
    "architectures": ["InfiniteVLQwen2_5_VLForConditionalGeneration"],
    "auto_map": {
        "AutoConfig": "configuration_infinitevl.InfiniteVLConfig",
        "AutoModelForCausalLM": "modeling_infinitevl.InfiniteVLQwen2_5_VLForConditionalGeneration",
    },
    "model_type": "infinite_vl",
    "attn_implementation": "flash_attention_2",
    "bos_token_id": 95,
    "eos_token_id": 98,
    "image_token_id": 91,
    "video_token_id": 92,
    "vision_start_token_id": 93,
    "vision_end_token_id": 94,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_window_layers": 70,
    "num_attention_heads": 2,
    "num_hidden_layers": 9,
    "num_key_value_heads": 1,
    "num_linear_heads": 2,
    "linear_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "rope_theta": 1000000.0,
    "sliding_window": 24,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 100,
    "vision_config": {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "in_chans": 3,
        "patch_size": 2,
        "window_size": 8,
        "fullatt_block_indexes": [2],
        "out_hidden_size": 32,
        "tokens_per_second": 2,
    },
}


def hybrid_shapes() -> dict[str, tuple[int, ...]]:
    """Published torch names and shapes of the model in HYBRID."""
    d, ff, v = 32, 48, 16
    out = {"visual.patch_embed.proj.weight": (v, 3, 2, 2, 2)}
    for i in range(3):
        b = f"visual.blocks.{i}."
        out |= {
            b + "norm1.weight": (v,),
            b + "norm2.weight": (v,),
            b + "attn.qkv.weight": (3 * v, v),
            b + "attn.qkv.bias": (3 * v,),
        }
        out |= {b + "attn.proj.weight": (v, v), b + "attn.proj.bias": (v,)}
        for name in ("gate_proj", "up_proj"):
            out |= {f"{b}mlp.{name}.weight": (20, v), f"{b}mlp.{name}.bias": (20,)}
        out |= {b + "mlp.down_proj.weight": (v, 20), b + "mlp.down_proj.bias": (v,)}
    m = "visual.merger."
    out |= {m + "ln_q.weight": (v,), m + "mlp.0.weight": (4 * v, 4 * v), m + "mlp.0.bias": (4 * v,)}
    out |= {
        m + "mlp.2.weight": (d, 4 * v),
        m + "mlp.2.bias": (d,),
        "model.embed_tokens.weight": (100, d),
    }
    for i in range(9):
        b = f"model.layers.{i}."
        out |= {b + "input_layernorm.weight": (d,), b + "post_attention_layernorm.weight": (d,)}
        out |= {
            b + "mlp.gate_proj.weight": (ff, d),
            b + "mlp.up_proj.weight": (ff, d),
            b + "mlp.down_proj.weight": (d, ff),
        }
        a = b + "self_attn."
        if i % 4 == 0:
            out |= {
                a + "q_proj.weight": (32, d),
                a + "q_proj.bias": (32,),
                a + "o_proj.weight": (d, 32),
            }
            for name in "kv":
                out |= {f"{a}{name}_proj.weight": (16, d), f"{a}{name}_proj.bias": (16,)}
            continue
        for name, width in (("q", 16), ("k", 16), ("v", 32)):
            out |= {f"{a}{name}_proj.weight": (width, d), f"{a}{name}_conv1d.weight": (width, 1, 4)}
        out |= {
            a + "g_proj.weight": (32, d),
            a + "a_proj.weight": (2, d),
            a + "b_proj.weight": (2, d),
            a + "o_proj.weight": (d, 32),
        }
        out |= {a + "A_log": (2,), a + "dt_bias": (2,), a + "o_norm.weight": (16,)}
    return out | {"model.norm.weight": (d,)}


def spell_live(name: str) -> str:
    if name.startswith("visual."):
        return "model." + name
    return (
        "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name
    )


def hybrid_tensors(
    *, seed=0, live=False, head=False, dtype=BF16, mixed=False
) -> dict[str, np.ndarray]:
    """Random tensors of the hybrid; `mixed` makes some matrices and a few single layers f32."""
    rng, out = np.random.default_rng(seed), {}
    for i, (name, shape) in enumerate(hybrid_shapes().items()):
        kind = np.dtype(np.float32) if mixed and i % 3 == 0 else dtype
        out[spell_live(name) if live else name] = rng.normal(size=shape).astype(kind)
    if head:
        out["lm_head.weight"] = next(v for k, v in out.items() if k.endswith("embed_tokens.weight"))
    return out


def safetensors_bytes(tensors: dict[str, np.ndarray], metadata=None) -> bytes:
    header, place, data = {"__metadata__": metadata} if metadata else {}, 0, []
    for name, value in tensors.items():
        raw = value.tobytes()
        header[name] = {
            "dtype": SPELLED[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [place, place + len(raw)],
        }
        place += len(raw)
        data.append(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data)


def write_folder(folder: Path, tensors, *, config=HYBRID, shards=1, side=True) -> Path:
    """A Hugging Face folder as it is published: config, code, tokenizer files and weights in
    `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if side:
        (folder / "generation_config.json").write_text(
            '{"eos_token_id": [98, 97], "pad_token_id": 96}'
        )
        (folder / "tokenizer.json").write_bytes(b'{"not really": "a tokenizer \xc3\xa9"}\r\n')
        (folder / "modeling_infinitevl.py").write_text("# the authors' code\n")
        (folder / "preprocessor_config.json").write_text("{}")
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ 1 }}")
    names, weight_map = list(tensors), {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        )
        (folder / file).write_bytes(
            safetensors_bytes({n: tensors[n] for n in part}, {"format": "pt"})
        )
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(v.nbytes for v in tensors.values())
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        )
    return folder


def hybrid_folder(folder: Path, *, config=None, shards=1, **kind) -> Path:
    return write_folder(
        folder, hybrid_tensors(**kind), config=HYBRID | (config or {}), shards=shards
    )


def read_folder(folder: Path) -> dict[str, tuple[str, tuple, bytes]]:
    """Every tensor of a folder: name -> (dtype, shape, bytes)."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8:start])
        for name, entry in header.items():
            if name != "__metadata__":
                assert name not in out
                begin, end = entry["data_offsets"]
                out[name] = (
                    entry["dtype"],
                    tuple(entry["shape"]),
                    raw[start + begin : start + end],
                )
    return out


def side_bytes(folder: Path) -> dict[str, bytes]:
    files = [
        p
        for p in folder.rglob("*")
        if p.is_file()
        and ".safetensors" not in p.name
        and "params" not in p.relative_to(folder).parts
    ]
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != "infinitevl_jax.json"
    }
