"""An independent float64 decoder: plain numpy loops over tokens, straight from the formulas, sharing no code with the package.

Works on Hugging Face's tensor names and (out, in) weights.
"""

import numpy as np


def rms(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def rotary(x, positions, theta, sections):
    """x [length, heads, dim], positions [3, length]."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    axis_of = np.repeat([0, 1, 2], sections)
    for i in range(half):
        angle = positions[axis_of[i]].astype(np.float64) * theta ** (-2.0 * i / x.shape[-1])
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[:, :, i], x[:, :, half + i]
        out[:, :, i], out[:, :, half + i] = a * c - b * s, b * c + a * s
    return out


def softmax_mixer(x, w, text, positions):
    length, dim = len(x), text.head_dim
    q = (x @ w["q_proj.weight"].T + w["q_proj.bias"]).reshape(length, -1, dim)
    k = (x @ w["k_proj.weight"].T + w["k_proj.bias"]).reshape(length, -1, dim)
    v = (x @ w["v_proj.weight"].T + w["v_proj.bias"]).reshape(length, -1, dim)
    q, k = (rotary(y, positions, text.rope_theta, text.mrope_section) for y in (q, k))
    share = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for t in range(length):
        first = max(0, t - text.sliding_window + 1)
        for h in range(q.shape[1]):
            score = k[first : t + 1, h // share] @ q[t, h] / np.sqrt(dim)
            p = np.exp(score - score.max())
            out[t, h] = (p / p.sum()) @ v[first : t + 1, h // share]
    return out.reshape(length, -1) @ w["o_proj.weight"].T


def convolve(x, weight):
    """Causal depthwise, weight [channels, 1, 4], last tap = current token."""
    taps = weight.shape[-1]
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    return silu(sum(padded[i : i + len(x)] * weight[:, 0, i] for i in range(taps)))


def delta_mixer(x, w, text):
    length, heads, dk, dv = len(x), text.num_linear_heads, text.linear_head_dim, text.linear_value_dim
    q = convolve(x @ w["q_proj.weight"].T, w["q_conv1d.weight"]).reshape(length, heads, dk)
    k = convolve(x @ w["k_proj.weight"].T, w["k_conv1d.weight"]).reshape(length, heads, dk)
    v = convolve(x @ w["v_proj.weight"].T, w["v_conv1d.weight"]).reshape(length, heads, dv)
    q = q / np.sqrt((q**2).sum(-1, keepdims=True) + 1e-6) / np.sqrt(dk)
    k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
    beta = 1 / (1 + np.exp(-(x @ w["b_proj.weight"].T)))
    decay = np.exp(-np.exp(w["A_log"]) * np.log1p(np.exp(x @ w["a_proj.weight"].T + w["dt_bias"])))
    state, out = np.zeros((heads, dk, dv)), np.empty((length, heads, dv))
    for t in range(length):
        for h in range(heads):
            state[h] *= decay[t, h]
            state[h] += np.outer(k[t, h], beta[t, h] * (v[t, h] - k[t, h] @ state[h]))
            out[t, h] = q[t, h] @ state[h]
    gate = silu(x @ w["g_proj.weight"].T).reshape(length, heads, dv)
    return (rms(out, w["o_norm.weight"], text.norm_eps) * gate).reshape(length, -1) @ w["o_proj.weight"].T


def decode(weights, text, embeds, positions):
    """Logits [length, vocab] of embedded tokens [length, width]; `weights` by published name, any dtype."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = np.asarray(embeds, np.float64)
    for i, kind in enumerate(text.layer_types):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("self_attn."): value for name, value in layer.items()}
        h = rms(x, layer["input_layernorm.weight"], text.rms_norm_eps)
        x = x + (delta_mixer(h, mixer, text) if kind == "linear_attention" else softmax_mixer(h, mixer, text, positions))
        h = rms(x, layer["post_attention_layernorm.weight"], text.rms_norm_eps)
        gated = silu(h @ layer["mlp.gate_proj.weight"].T) * (h @ layer["mlp.up_proj.weight"].T)
        x = x + gated @ layer["mlp.down_proj.weight"].T
    return rms(x, w["model.norm.weight"], text.rms_norm_eps) @ w["model.embed_tokens.weight"].T


def published(params, config):
    """Our unrolled parameters under Hugging Face's names and shapes (decoder only), without the package's weight table."""
    out = {}
    for name, value in params.items():
        value = np.asarray(value)
        if name.startswith("visual."):
            continue
        name = name.replace("layers.rest.", "layers.").replace("kernel", "weight").replace("embedding", "weight")
        if "conv1d" in name:
            value = value.T[:, None, :]
        elif value.ndim == 2 and "embed_tokens" not in name:
            value = value.T
        out["lm_head.weight" if name == "lm_head.weight" else f"model.{name}"] = value
    return out
