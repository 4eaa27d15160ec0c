"""The Qwen2.5-VL vision tower.

Images and videos of any number and size are packed into one sequence of patches. Patches are in
window order (`infinitevl_jax.inputs.patches`), so an attention window is contiguous. Most blocks
attend within windows, a few within temporal slices; segment ids express both.
"""

from functools import partial

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from infinitevl_jax.config.model import VisionConfig
from infinitevl_jax.inputs.patches import Patches
from infinitevl_jax.nn.layers import GatedMLP, Linear, RMSNorm
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.rope import rotate, vision_angles
from infinitevl_jax.nn.stack import Stack
from infinitevl_jax.nn.token_info import PatchInfo
from infinitevl_jax.nn.towers.registry import register_tower
from infinitevl_jax.sharding import constrain
from pallas_kernels.attention import Mask

WINDOW, SLICE = "window", "slice"


def block_kinds(config: VisionConfig) -> tuple[str, ...]:
    """Attention segment of each block: WINDOW or SLICE."""
    return tuple(
        SLICE if i in config.fullatt_block_indexes else WINDOW for i in range(config.depth)
    )


class VisionAttention(nnx.Module):
    """Bidirectional attention within windows or temporal slices."""

    def __init__(self, config: VisionConfig, ops: Ops, kind: str):
        self.kind, self.ops, self.head_dim = kind, ops, config.head_dim
        width = config.hidden_size
        self.window_patches = config.window_tokens**2 * config.merge_unit
        self.qkv = Linear(width, 3 * width, ("width", "heads"), bias=True)
        self.proj = Linear(width, width, ("heads", "width"), bias=True)

    def __call__(self, x: Array, info: PatchInfo) -> Array:
        q, k, v = rearrange(
            self.qkv(x), "r n (three h d) -> three r n h d", three=3, d=self.head_dim
        )
        q, k, v = (constrain(y, "batch", None, "heads", None) for y in (q, k, v))
        q, k = rotate(q, info.cos, info.sin), rotate(k, info.cos, info.sin)
        # a segment spans at most `reach` patches, so keys farther away can be skipped
        segment, reach = (
            (info.window_ids, self.window_patches)
            if self.kind == WINDOW
            else (info.slice_ids, info.slice_reach)
        )
        mask = Mask(causal=False, window=reach, aligned=True)
        out, _ = self.ops.attention(
            q,
            k,
            v,
            info.patch_index,
            info.patch_index,
            segment,
            segment,
            mask=mask,
            scale=self.head_dim**-0.5,
        )
        return self.proj(rearrange(out, "r n h d -> r n (h d)"))


class VisionBlock(nnx.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: VisionConfig, ops: Ops, kind: str):
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = VisionAttention(config, ops, kind)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def __call__(self, x: Array, state: None, info: PatchInfo) -> tuple[Array, None]:
        x = x + self.attn(self.norm1(x), info)
        return constrain(x + self.mlp(self.norm2(x)), "batch", None, None), None


class PatchMerger(nnx.Module):
    """Merge each group of neighbouring patches into one token of the decoder's width."""

    def __init__(self, config: VisionConfig):
        self.merge_unit = config.merge_unit
        merged = config.hidden_size * config.merge_unit
        self.ln_q = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc1 = Linear(merged, merged, ("width", "hidden"), bias=True)
        out = config.out_hidden_size
        self.fc2 = Linear(merged, out, ("hidden", "width"), bias=True)

    def __call__(self, x: Array) -> Array:
        x = rearrange(self.ln_q(x), "r (n unit) d -> r n (unit d)", unit=self.merge_unit)
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Patches [rows, patches, features] -> tokens [rows, patches / merge_unit, decoder width].

    Patches and tokens are in window order.
    """

    def __init__(self, config: VisionConfig, ops: Ops, *, scanned: bool, remat):
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        patch = (config.in_channels, config.temporal_patch_size, *[config.patch_size] * 2)
        self.patch_embed = Linear(
            config.patch_features,
            config.hidden_size,
            ("hidden", "width"),
            torch_shape=(config.hidden_size, *patch),
        )
        make = partial(VisionBlock, config, ops)
        self.blocks = Stack(make, block_kinds(config), scanned=scanned, remat=remat)
        self.merger = PatchMerger(config)

    def __call__(self, patches: Patches, dtype) -> Array:
        angles = vision_angles(patches.row_column, self.head_dim, self.theta)
        info = PatchInfo(
            patches.patch_index,
            patches.window_ids,
            patches.slice_ids,
            jnp.cos(angles),
            jnp.sin(angles),
            patches.slice_reach,
        )
        x, _, _ = self.blocks(self.patch_embed(patches.pixels.astype(dtype)), info)
        return self.merger(x)


register_tower(VisionConfig, VisionTower)
