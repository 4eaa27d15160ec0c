"""InfiniteVL in plain torch for transformers, loaded with trust_remote_code=True: no fla, no
flash-attn.

Written to be read and to be right: every sequence of a batch is computed by itself, without its
  padding, token by
token in the linear layers and without a cache. For speed and constant memory use the JAX package
that wrote this file.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from .configuration_infinitevl import InfiniteVLConfig

# Live modules of the authors' code and some files have these names.
_NAMES = {r"^model\.language_model\.": "model.", r"^model\.visual\.": "visual."}


class InfiniteVLRMSNorm(nn.Module):
    """x / rms(x) in f32, cast back, times weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class InfiniteVLAttention(nn.Module):
    """Softmax attention over a causal window: a token sees itself, the sliding_window - 1 tokens
    before it and the first num_attention_sinks tokens."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.window, self.sinks = config.sliding_window, config.num_attention_sinks
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x, rotary):
        """x [length, hidden], rotary (cos, sin) [length, head_dim] -> [length, hidden]."""
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k = (_rotate(y, *rotary) for y in (q, k))
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=0) for y in (k, v))
        place = torch.arange(len(x), device=x.device)
        behind = place[:, None] - place[None, :]
        seen = (behind >= 0) & ((behind < self.window) | (place < self.sinks))
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen)[0]
        return self.o_proj(out.transpose(0, 1).flatten(1))


def _rotate(x, cos, sin):
    """x [heads, length, head_dim]: rotate the pairs (i, i + head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class InfiniteVLGatedDeltaNet(nn.Module):
    """Linear attention with a gated delta rule; the state of a head, [key, value], is f32."""

    def __init__(self, config):
        super().__init__()
        hidden, self.heads, self.key = (
            config.hidden_size,
            config.num_linear_heads,
            config.linear_head_dim,
        )
        self.value = int(self.key * config.expand_v)
        keys, values = self.heads * self.key, self.heads * self.value
        for name, width in (("q", keys), ("k", keys), ("v", values)):
            setattr(self, f"{name}_proj", nn.Linear(hidden, width, bias=False))
            setattr(
                self,
                f"{name}_conv1d",
                nn.Conv1d(width, width, config.conv_size, groups=width, bias=False),
            )
        self.a_proj = nn.Linear(hidden, self.heads, bias=False)
        self.b_proj = nn.Linear(hidden, self.heads, bias=False)
        self.g_proj = nn.Linear(hidden, values, bias=False)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.o_norm = InfiniteVLRMSNorm(self.value, config.norm_eps)

    def forward(self, x, rotary):
        """x [length, hidden] -> [length, hidden]; there are no positions here."""
        q, k, v = (
            self._mixed(name, x).unflatten(-1, (self.heads, -1)) for name in "qkv"
        )  # [length, heads, key or value]
        q, k = (y * torch.rsqrt(y.pow(2).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        q = q * self.key**-0.5
        write = self.b_proj(x).float().sigmoid()
        step = F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        keep = torch.exp(-self.A_log.float().exp() * step)  # [length, heads]

        state = q.new_zeros(self.heads, self.key, self.value)
        out = []
        for t in range(len(x)):
            state = state * keep[t, :, None, None]
            update = write[t, :, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
            state = state + k[t, :, :, None] * update[:, None, :]
            out.append(torch.einsum("hk,hkv->hv", q[t], state))
        gate = F.silu(self.g_proj(x).float()).unflatten(-1, (self.heads, -1))
        out = self.o_norm(torch.stack(out)) * gate
        return self.o_proj(out.flatten(1).to(x.dtype))

    def _mixed(self, name, x):
        """Projection, causal depthwise convolution (the last tap is the current token), SiLU;
        f32."""
        y = getattr(self, f"{name}_proj")(x).float().T
        taps = getattr(self, f"{name}_conv1d").weight.float()
        return F.silu(F.conv1d(F.pad(y, (taps.shape[-1] - 1, 0)), taps, groups=len(taps))).T


class InfiniteVLMLP(nn.Module):
    """down(silu(gate) * up)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class InfiniteVLDecoderLayer(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        linear = kind == "linear_attention"
        self.self_attn = InfiniteVLGatedDeltaNet(config) if linear else InfiniteVLAttention(config)
        self.mlp = InfiniteVLMLP(config)
        self.input_layernorm = InfiniteVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = InfiniteVLRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary):
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class InfiniteVLDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [InfiniteVLDecoderLayer(config, kind) for kind in config.layer_types]
        )
        self.norm = InfiniteVLRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, positions):
        """x [length, hidden], positions [3, length] -> [length, hidden]."""
        rotary = [part.to(x.dtype) for part in self._rotary(positions)]
        for layer in self.layers:
            x = layer(x, rotary)
        return self.norm(x)

    def _rotary(self, positions):
        """cos and sin [length, head_dim]; each frequency follows time, height or width."""
        rope, config = self.config.rope_parameters, self.config
        half = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ) // 2
        sections = rope["mrope_section"] or [half, 0, 0]
        axis = torch.arange(3).repeat_interleave(torch.tensor(sections))
        # f64: angles at position 10^6 would be off by 0.03 in f32
        frequencies = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = positions.double().cpu()[axis].T * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().float().to(positions.device), angles.sin().float().to(positions.device)


class InfiniteVLQwen2_5_VLForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = InfiniteVLConfig
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = ["InfiniteVLDecoderLayer", "Qwen2_5_VLVisionBlock"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        vision = config.vision_config
        self.visual = (
            Qwen2_5_VisionTransformerPretrainedModel._from_config(vision)
            if vision is not None
            else None
        )
        self.model = InfiniteVLDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return super().from_pretrained(*args, **{"key_mapping": _NAMES, **kwargs})

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "use_cache": False})

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        names = (
            "pixel_values",
            "image_grid_thw",
            "pixel_values_videos",
            "video_grid_thw",
            "second_per_grid_ts",
        )
        media = {name: kwargs.get(name) for name in names}
        return {"input_ids": input_ids, "attention_mask": attention_mask, **media}

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        pixel_values=None,
        image_grid_thw=None,
        pixel_values_videos=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """input_ids [batch, length], position_ids [3, batch, length] or None -> CausalLMOutput;
        logits of pads are 0."""
        x = self.model.embed_tokens(input_ids)
        media = (
            (self.config.image_token_id, pixel_values, image_grid_thw),
            (self.config.video_token_id, pixel_values_videos, video_grid_thw),
        )
        for token, pixels, grid in media:
            if pixels is not None:
                seen = self.visual(pixels.to(self.visual.dtype), grid_thw=grid)
                seen = seen if torch.is_tensor(seen) else seen.pooler_output
                x = x.masked_scatter((input_ids == token)[..., None], seen.to(x.dtype))

        merged = self._merged(image_grid_thw, 0.0), self._merged(video_grid_thw, second_per_grid_ts)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = torch.zeros_like(x)
        for row, mask in enumerate(real.bool()):
            if position_ids is None:
                positions = self._positions(input_ids[row, mask].tolist(), *merged).to(x.device)
            else:
                positions = position_ids[:, row, mask]
            hidden[row, mask] = self.model(x[row, mask], positions)
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def _merged(self, grid, seconds):
        """An iterator over (frames, rows, columns, seconds between frames) in merged tokens."""
        grid = [] if grid is None else torch.as_tensor(grid).tolist()
        seconds = 1.0 if seconds is None else seconds
        seconds = (
            [seconds] * len(grid)
            if isinstance(seconds, float)
            else torch.as_tensor(seconds).tolist()
        )
        size = self.config.vision_config.spatial_merge_size if grid else 1
        return iter(
            [(t, h // size, w // size, s) for (t, h, w), s in zip(grid, seconds, strict=True)]
        )

    def _positions(self, tokens, images, videos):
        """[3, length]: text counts up on all axes; what follows an image or a video starts after
        its largest position."""
        media = {self.config.image_token_id: images, self.config.video_token_id: videos}
        media = media if self.config.vision_config is not None else {}
        parts, at, start = [], 0, 0
        while at < len(tokens):
            if tokens[at] not in media:
                parts.append(torch.full((3, 1), start))
            else:
                t, h, w, seconds = next(media[tokens[at]])
                rate = seconds * self.config.vision_config.tokens_per_second
                axes = (
                    (torch.arange(t).double() * rate).floor().long(),
                    torch.arange(h),
                    torch.arange(w),
                )
                parts.append(start + torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1))
            at += parts[-1].shape[1]
            start = int(parts[-1].max()) + 1
        return torch.cat(parts, dim=1)
