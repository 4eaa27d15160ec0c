"""Options of the mixers against a plain float64 computation in torch: value and gradients of a
layer's mixer.

Softmax attention: a partial rotary embedding, query and key norms, an output gate, heads of 256
channels. Gated DeltaNet: fewer key heads than value heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn.functional import silu, softplus

from infinitevl_jax.config.model import FULL, LINEAR, SLIDING, TextConfig
from infinitevl_jax.nn.mixers import layer_type
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.rope import decoder_angles
from infinitevl_jax.nn.token_info import TokenInfo
from pallas_kernels.testing.parity import rel_rms

LENGTH, WIDTH, EPS, THETA, WINDOW = 40, 24, 1e-6, 1e4, 12


def config(**options) -> TextConfig:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    delta = {"num_linear_heads": 4, "linear_head_dim": 8, "expand_v": 1.5}
    return TextConfig(
        (FULL,),
        **{"hidden_size": WIDTH, "sliding_window": WINDOW, "rope_theta": THETA},
        **{"rms_norm_eps": EPS, "mrope_section": None},
        **sizes | delta | options,
    )


def token_info(text: TextConfig) -> TokenInfo:
    """One sequence from its start."""
    index = jnp.arange(LENGTH)[None]
    positions = jnp.broadcast_to(index, (3, 1, LENGTH))
    angles = decoder_angles(positions, text.rotary_dim, THETA, None)
    zeros = jnp.zeros_like(index)
    return TokenInfo(index, zeros, jnp.zeros(1, jnp.int32), jnp.cos(angles), jnp.sin(angles))


def rms(x, weight, eps=EPS):
    return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def turned(x, share):
    """x [length, heads, dim]: the first `share` of the channels of a head are pairs (i, i + half)
    that turn by position x THETA^(-i / half)."""
    count = int(x.shape[-1] * share)
    half = count // 2
    angle = torch.arange(LENGTH)[:, None, None] * THETA ** -(torch.arange(half).double() / half)
    a, b, rest = x[..., :half], x[..., half:count], x[..., count:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def softmax_mixer(x, w, text: TextConfig, window: int):
    def project(name, heads):
        out = x @ w[f"{name}_proj.kernel"] + w[f"{name}_proj.bias"]
        return out.view(LENGTH, heads, -1)

    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    q, gate = project("q", heads), None
    if text.attention_output_gate:
        q, gate = q[..., : text.head_dim], q[..., text.head_dim :]
    k, v = project("k", kv_heads), project("v", kv_heads)
    if text.query_key_norm:
        q, k = rms(q, w["q_norm.weight"]), rms(k, w["k_norm.weight"])
    q, k = turned(q, text.partial_rotary_factor), turned(k, text.partial_rotary_factor)
    k, v = (y.repeat_interleave(heads // kv_heads, 1) for y in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * text.head_dim**-0.5
    back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = (back >= 0) & (back < window)
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    out = out if gate is None else out * gate.sigmoid()
    return out.reshape(LENGTH, -1) @ w["o_proj.kernel"]


def delta_mixer(x, w, text: TextConfig):
    def convolved(name, heads):
        padded = torch.cat([x.new_zeros(3, WIDTH), x]) @ w[f"{name}_proj.kernel"]
        taps = w[f"{name}_conv1d.weight"]
        out = silu(sum(padded[i : i + LENGTH] * taps[i] for i in range(4)))
        return out.view(LENGTH, heads, -1)

    def unit(y):
        return y * torch.rsqrt((y**2).sum(-1, keepdim=True) + 1e-6)

    heads, key_heads = text.num_linear_heads, text.linear_key_heads
    q, k = (
        unit(convolved(name, key_heads)).repeat_interleave(heads // key_heads, 1) for name in "qk"
    )
    q, v = q * text.linear_head_dim**-0.5, convolved("v", heads)
    beta = (x @ w["b_proj.kernel"]).sigmoid()
    decay = (-w["A_log"].exp() * softplus(x @ w["a_proj.kernel"] + w["dt_bias"])).exp()
    state, out = x.new_zeros(heads, text.linear_head_dim, text.linear_value_dim), []
    for t in range(LENGTH):
        state = state * decay[t, :, None, None]
        found = torch.einsum("hk,hkv->hv", k[t], state)
        state = state + torch.einsum("hk,hv->hkv", k[t], beta[t, :, None] * (v[t] - found))
        out.append(torch.einsum("hk,hkv->hv", q[t], state))
    gate = silu(x @ w["g_proj.kernel"]).view(LENGTH, heads, -1)
    out = rms(torch.stack(out), w["o_norm.weight"], text.norm_eps) * gate
    return out.reshape(LENGTH, -1) @ w["o_proj.kernel"]


def check(kind: str, text: TextConfig, plain) -> None:
    """The mixer's output, and the gradients of a weighted sum of it, against `plain(x, weights)`
    in float64."""
    rng = np.random.default_rng(0)
    mixer = layer_type(kind).make(text, Ops())
    graph, state = nnx.split(mixer, nnx.Param)
    shapes = {path: leaf.get_value().shape for path, leaf in nnx.to_flat_state(state)}
    loud = {p: rng.normal(size=s).astype(np.float32) * 0.4 + 0.2 for p, s in shapes.items()}
    x, weight = (rng.normal(size=(LENGTH, WIDTH)).astype(np.float32) for _ in range(2))

    def run(x, params):
        tree = nnx.from_flat_state([(path, nnx.Param(value)) for path, value in params.items()])
        return nnx.merge(graph, tree)(x[None], None, token_info(text))[0][0]

    def total(x, params):
        out = run(x, params)
        return (out * weight).sum(), out

    (_, found), (dx, dw) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, loud)

    exact_x = torch.tensor(x.astype(np.float64), requires_grad=True)
    exact = {
        ".".join(path): torch.tensor(value.astype(np.float64), requires_grad=True)
        for path, value in loud.items()
    }
    out = plain(exact_x, exact)
    (out * torch.tensor(weight)).sum().backward()
    assert rel_rms(found, out.detach().numpy()) <= 1e-5
    assert rel_rms(dx, exact_x.grad.numpy()) <= 1e-5
    for path, gradient in dw.items():
        assert rel_rms(gradient, exact[".".join(path)].grad.numpy()) <= 1e-5, path


@pytest.mark.parametrize("kind", [FULL, SLIDING])
@pytest.mark.parametrize(
    "options",
    [
        {"partial_rotary_factor": 0.25},
        {"query_key_norm": True},
        {"attention_output_gate": True},
        {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
        {
            "head_dim": 256,
            "partial_rotary_factor": 0.25,
            "query_key_norm": True,
            "attention_output_gate": True,
        },
    ],
    ids=["partial-rotary", "norms", "gate", "wide", "all"],
)
def test_softmax_attention(kind, options):
    text = config(**options)
    window = LENGTH if kind == FULL else WINDOW
    check(kind, text, lambda x, w: softmax_mixer(x, w, text, window))


@pytest.mark.parametrize("key_heads", [None, 2, 1])
def test_gated_delta_net(key_heads):
    text = config(num_linear_key_heads=key_heads)
    check(LINEAR, text, lambda x, w: delta_mixer(x, w, text))
