"""An independent torch implementation of the hybrid: formulas, token by token, no shared code.

float64 is the reference. bfloat16 uses float32 where Hugging Face's models do: norms, softmax,
gates, the recurrent state. Weights have Hugging Face's names and [out, in] shapes. The vision tower
is transformers' own.
"""

import numpy as np
import torch
from torch.nn.functional import silu, softplus
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def rms(x, weight, eps):
    h = wide(x)
    return (h * torch.rsqrt((h**2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotary(x, positions, theta, sections):
    """x [length, heads, dim], positions [3, length]."""
    half = x.shape[-1] // 2
    axis_of = np.repeat([0, 1, 2], sections)
    frequency = theta ** (-2.0 * np.arange(half) / x.shape[-1])
    angle = torch.tensor(positions[axis_of].T * frequency)[:, None]  # [length, 1, half]
    c, s = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def softmax_mixer(x, w, text, positions):
    length, dim = len(x), text.head_dim
    q, k, v = (
        (x @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"]).view(length, -1, dim) for n in "qkv"
    )
    q, k = (rotary(y, positions, text.rope_theta, text.mrope_section) for y in (q, k))
    share = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for t in range(length):
        first = max(0, t - text.sliding_window + 1)
        for h in range(q.shape[1]):
            score = k[first : t + 1, h // share] @ q[t, h] * dim**-0.5
            out[t, h] = wide(score).softmax(0).to(x.dtype) @ v[first : t + 1, h // share]
    return out.reshape(length, -1) @ w["o_proj.weight"].T


def convolve(x, weight):
    """Causal depthwise convolution, weight [channels, 1, 4], last tap = current token; float32."""
    taps = weight.shape[-1]
    padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    return silu(sum(wide(padded[i : i + len(x)]) * wide(weight[:, 0, i]) for i in range(taps))).to(
        x.dtype
    )


def unit(x):
    return (wide(x) / ((wide(x) ** 2).sum(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype)


def delta_mixer(x, w, text):
    length, heads, dk, dv = (
        len(x),
        text.num_linear_heads,
        text.linear_head_dim,
        text.linear_value_dim,
    )
    q, k, v = (
        convolve(x @ w[f"{n}_proj.weight"].T, w[f"{n}_conv1d.weight"]).view(length, heads, -1)
        for n in "qkv"
    )
    q, k, v = wide((unit(q) * dk**-0.5).to(x.dtype)), wide(unit(k)), wide(v)
    beta = wide(x @ w["b_proj.weight"].T).sigmoid()
    decay = (
        -wide(w["A_log"]).exp() * softplus(wide(x @ w["a_proj.weight"].T) + wide(w["dt_bias"]))
    ).exp()
    state, out = q.new_zeros(heads, dk, dv), v.new_zeros(length, heads, dv)
    for t in range(length):
        state = state * decay[t, :, None, None]
        update = beta[t, :, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t, :, :, None] * update[:, None, :]
        out[t] = torch.einsum("hk,hkv->hv", q[t], state)
    gate = silu(wide(x @ w["g_proj.weight"].T)).view(length, heads, dv)
    out = out.to(x.dtype)
    normed = (
        wide(out)
        * torch.rsqrt((wide(out) ** 2).mean(-1, keepdim=True) + text.norm_eps)
        * wide(w["o_norm.weight"])
    )
    return (normed * gate).to(x.dtype).reshape(length, -1) @ w["o_proj.weight"].T


def decode(weights, text, embeds, positions):
    """Logits [length, vocab] of embeddings [length, width], in their dtype.

    `weights` have Hugging Face's names.
    """
    x = embeds
    w = {name: value.to(x.dtype) for name, value in weights.items()}
    for i, kind in enumerate(text.layer_types):
        prefix = f"model.layers.{i}."
        layer = {
            name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)
        }
        mixer = {name.removeprefix("self_attn."): value for name, value in layer.items()}
        h = rms(x, layer["input_layernorm.weight"], text.rms_norm_eps)
        x = x + (
            delta_mixer(h, mixer, text)
            if kind == "linear_attention"
            else softmax_mixer(h, mixer, text, positions)
        )
        h = rms(x, layer["post_attention_layernorm.weight"], text.rms_norm_eps)
        gated = silu(h @ layer["mlp.gate_proj.weight"].T) * (h @ layer["mlp.up_proj.weight"].T)
        x = x + gated @ layer["mlp.down_proj.weight"].T
    return rms(x, w["model.norm.weight"], text.rms_norm_eps) @ w["model.embed_tokens.weight"].T


def vision_tokens(weights, vision, pixels, grids, dtype):
    """Output of transformers' tower for patches [patches, features] with grids [items, 3]."""
    names = (
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "patch_size",
        "window_size",
        "out_hidden_size",
    )
    config = Qwen2_5_VLVisionConfig(
        **{name: getattr(vision, name) for name in names},
        fullatt_block_indexes=list(vision.fullatt_block_indexes),
    )
    config._attn_implementation = "eager"
    tower = Qwen2_5_VisionTransformerPretrainedModel(config).to(dtype)
    tower.load_state_dict(
        {n.removeprefix("visual."): x for n, x in weights.items() if n.startswith("visual.")},
        strict=True,
    )
    with torch.no_grad():
        return tower(torch.tensor(pixels, dtype=dtype), grid_thw=torch.tensor(grids)).pooler_output


def positions_of(ids, image_grids, video_grids, seconds, config):
    """M-RoPE positions [3, length]: text counts up; a segment starts at the maximum + 1."""
    items = {config.image_token_id: [(g, 0) for g in image_grids]}
    items[config.video_token_id] = list(zip(video_grids, seconds, strict=True))
    out, next_one, i = [], 0, 0
    while i < len(ids):
        if ids[i] not in items:
            out.append((next_one,) * 3)
            next_one, i = next_one + 1, i + 1
            continue
        (t, h, w), step = items[ids[i]].pop(0)
        segment = [
            (next_one + int(a * step * 2), next_one + b, next_one + c)
            for a in range(t)
            for b in range(h // 2)
            for c in range(w // 2)
        ]
        out += segment
        next_one, i = max(map(max, segment)) + 1, i + len(segment)
    return np.array(out).T


def logits(params, config, batch, dtype):
    """Float64 logits of one sequence with an image and a video, computed in `dtype`."""
    weights = published(params)
    ids = batch["input_ids"][0]
    x = weights["model.embed_tokens.weight"].to(dtype)[torch.tensor(ids)]
    for token, pixels, grid in (
        (config.image_token_id, "pixel_values", "image_grid_thw"),
        (config.video_token_id, "pixel_values_videos", "video_grid_thw"),
    ):
        x[torch.tensor(ids == token)] = vision_tokens(
            weights, config.vision, batch[pixels], batch[grid], dtype
        )
    grids = batch["image_grid_thw"].tolist(), batch["video_grid_thw"].tolist()
    positions = positions_of(ids.tolist(), *grids, batch["second_per_grid_ts"], config)
    return decode(weights, config.text, x, positions).double().numpy()


def published(params):
    """Unrolled parameters as torch tensors with Hugging Face's names, without the weight table."""
    out = {}
    for name, value in params.items():
        value = np.asarray(value, np.float32)
        name = name.replace("patch_embed.", "patch_embed.proj.")
        name = name.replace("merger.fc1", "merger.mlp.0").replace("merger.fc2", "merger.mlp.2")
        name = name.replace("kernel", "weight").replace("embedding", "weight")
        if "conv1d" in name:
            value = value.T[:, None, :]
        elif "patch_embed" in name:
            side = round((value.shape[0] / 6) ** 0.5)
            value = value.T.reshape(-1, 3, 2, side, side)
        elif value.ndim == 2 and "embed_tokens" not in name:
            value = value.T
        out[name if name.startswith("visual.") else f"model.{name}"] = torch.tensor(
            np.ascontiguousarray(value)
        )
    return out
