"""The vision-language model: vision tower, embedding, decoder and head.

It takes arrays only. `infinitevl_jax.inputs` builds them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from infinitevl_jax.config.model import ModelConfig, TextConfig
from infinitevl_jax.inputs.frame import Frame
from infinitevl_jax.inputs.model_inputs import DecoderInputs
from infinitevl_jax.inputs.patches import Patches
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.nn.frames import frame_patches
from infinitevl_jax.nn.layers import Embedding, GatedMLP, Linear, RMSNorm
from infinitevl_jax.nn.mixers import Mixer, layer_type
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.rope import decoder_angles
from infinitevl_jax.nn.stack import Scanned, Stack
from infinitevl_jax.nn.token_info import TokenInfo, inside_layer
from infinitevl_jax.nn.towers import make_tower
from infinitevl_jax.sharding import constrain


class DecoderLayer(nnx.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)).

    The mixer is named `self_attn` for every layer type, as in Hugging Face checkpoints.
    """

    def __init__(self, config: TextConfig, ops: Ops, kind: str):
        self.ops = ops
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = layer_type(kind).make(config, ops)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def __call__(self, x: Array, state, info: TokenInfo):
        mixed, state = self.mix(x, state, info)
        return self.add(x, mixed), state

    def mix(self, x: Array, state, info: TokenInfo):
        """Output of the mixer for the layer's input x, and the new state."""
        if state is None:  # training scans the layers
            info = inside_layer(info, x)
        with jax.named_scope("mixer"):
            return self.self_attn(self.input_layernorm(x), state, info)

    def add(self, x: Array, mixed: Array) -> Array:
        """Output of the layer for its input and its mixer's output."""
        x = x + mixed
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, "batch", "length", None)

    @property
    def first_matrix(self) -> Array | None:
        """What a step reads first, if the mixer says so."""
        joint = self.self_attn.first_joint
        return None if joint is None else getattr(self.self_attn, joint).first

    def step(self, x: Array, state, info: TokenInfo, prefetch: Array | None = None):
        """The same for one token of each sequence, x [batch, 1, width]. prefetch: the matrix that
        is read after it."""
        with jax.named_scope("mixer"):
            following = self.mlp.gate_up_proj.first
            mixer, norm = self.self_attn, self.input_layernorm
            x, state = mixer.step(x, norm, state, info, prefetch=following)
        with jax.named_scope("mlp"):
            x = self.mlp.step(self.ops, x, self.post_attention_layernorm, prefetch)
        return constrain(x, "batch", "length", None), state


class VLM(nnx.Module):
    """Vision tower and decoder. `dtype` is the activation dtype; parameters keep their own.

    A new one has no values. `infinitevl_jax.nn.params.functional` binds it to some.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype=jnp.float32,
        ops: Ops | None = None,
        scanned: Scanned = True,
        remat: Callable = lambda layer: layer,
    ):
        text, ops = config.text, ops or Ops()
        self.config, self.dtype, self.ops = config, jnp.dtype(dtype), ops
        tower = (
            None
            if config.vision is None
            else make_tower(config.vision, ops, scanned=bool(scanned), remat=remat)
        )
        self.visual = tower
        self.embed_tokens = Embedding(
            text.vocab_size, text.hidden_size, std=config.initializer_range
        )
        make = partial(DecoderLayer, text, ops)
        self.layers = Stack(make, text.layer_types, scanned=scanned, remat=remat)
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.lm_head = (
            None
            if text.tie_word_embeddings
            else Linear(text.hidden_size, text.vocab_size, ("width", "vocab"))
        )

    def encode(self, patches: Patches | Frame) -> Array:
        """Image and video tokens [rows, tokens, width], indexed by `DecoderInputs.vision_index`."""
        with jax.named_scope("vision"):
            if isinstance(patches, Frame):
                patches = frame_patches(patches)
            return self.visual(patches, self.dtype)

    def embed(self, inputs: DecoderInputs, vision: Array | None) -> Array:
        """Embeddings [batch, length, width], with image and video tokens taken from `vision`.

        Args:
          vision: [rows, tokens, width]. One row serves the whole batch. With one row per sequence,
            each sequence reads its own row and needs no other device.
        """
        x = self.embed_tokens(inputs.tokens, self.dtype)
        if vision is not None:
            place = jnp.maximum(inputs.vision_index, 0)
            seen = (
                vision[0][place] if len(vision) == 1 else jax.vmap(lambda v, i: v[i])(vision, place)
            )
            x = jnp.where(inputs.vision_index[..., None] >= 0, seen.astype(x.dtype), x)
        return constrain(x, "batch", "length", None)

    def decode(
        self,
        x: Array,
        inputs: DecoderInputs,
        cache: Cache | None = None,
        collect: bool = False,
        fresh: bool = False,
    ):
        """Run the decoder over embedded tokens.

        fresh: whether the cache is known to be empty.

        Returns:
          hidden: [batch, length, width] after the final norm.
          cache: the new cache; None without one.
          hidden_states: the input of every layer, then the final hidden state, as in Hugging Face;
            empty unless `collect`.
        """
        run = DecoderLayer.__call__
        y, cache, outputs = self._decode(x, inputs, cache, run, collect, fresh=fresh)
        hidden = self.norm(y)
        return hidden, cache, [x, *outputs[:-1], hidden] if collect else []

    def step(self, x: Array, inputs: DecoderInputs, cache: Cache) -> tuple[Array, Cache]:
        """The logits [batch, 1, vocab] of one embedded token of each sequence, x [batch, 1, width],
        and the new cache: `decode` and `logits` by the layers' own steps."""
        given = list(zip(cache.layers, self._following(), strict=True))

        def step(layer: DecoderLayer, x: Array, state: tuple, info: TokenInfo):
            return layer.step(x, state[0], info, prefetch=state[1])

        y, cache, _ = self._decode(x, inputs, cache, step, False, given)
        with jax.named_scope("head"):
            head = self.embed_tokens.attend_step if self.lm_head is None else self.lm_head.step
            out = head(self.ops, y, norm=self.norm)
        return constrain(out, "batch", "length", "vocab"), cache

    def _decode(
        self,
        x: Array,
        inputs: DecoderInputs,
        cache: Cache | None,
        method: Callable,
        collect: bool,
        states: Sequence | None = None,
        fresh: bool = False,
    ):
        """The output of the last layer, the new cache, and the outputs of all layers if `collect`.

        method, states: what `Stack` runs with. None: the cache's states.
        """
        positions = self.positions(inputs, cache)
        info = self.token_info(inputs, positions, cache)._replace(fresh=fresh)
        if states is None and cache is not None:
            states = cache.layers
        with jax.named_scope("decoder"):
            y, states, outputs = self.layers(x, info, states, collect, method)
        if cache is not None:
            cache = cache.after(states, inputs.token_index, positions)
        return y, cache, outputs

    def _following(self) -> list[Array | None]:
        """For each layer what the next one reads first, where layers are not scanned."""
        if self.layers.layout.repeats:
            return [None] * self.layers.layout.depth
        return [layer.first_matrix for layer in self.layers.rest[1:]] + [None]

    def positions(self, inputs: DecoderInputs, cache: Cache | None = None) -> Array:
        """Rotary positions [3, batch, length] of tokens that follow the cached ones."""
        if inputs.positions is not None:
            return jnp.asarray(inputs.positions)
        shape = inputs.token_index.shape
        start = jnp.zeros(shape[0], jnp.int32) if cache is None else cache.next_position
        text = start[:, None] + jnp.maximum(inputs.token_index, 0)
        return jnp.broadcast_to(text, (3, *shape))

    def token_info(
        self, inputs: DecoderInputs, positions: Array, cache: Cache | None = None
    ) -> TokenInfo:
        """What the layers need to know of the tokens; positions as of `positions`."""
        rows, text = inputs.token_index.shape[0], self.config.text
        length = jnp.zeros(rows, jnp.int32) if cache is None else cache.length
        angles = decoder_angles(positions, text.rotary_dim, text.rope_theta, text.mrope_section)
        index = jnp.where(inputs.token_index >= 0, inputs.token_index + length[:, None], -1)
        return TokenInfo(index, inputs.segment_ids, length, jnp.cos(angles), jnp.sin(angles))

    def logits(self, hidden: Array) -> Array:
        """Hidden states [batch, length, width] -> logits [batch, length, vocab]."""
        with jax.named_scope("head"):
            out = self.embed_tokens.attend(hidden) if self.lm_head is None else self.lm_head(hidden)
        return constrain(out, "batch", "length", "vocab")

    def cache_spec(self, batch: int, max_length: int | None) -> Cache:
        """Shapes and dtypes of a cache for `batch` sequences.

        Args:
          max_length: largest number of tokens per sequence; None is unlimited, which a model that
            `keeps_everything` cannot have.
        """
        layers = tuple(mixer.state_spec(batch, max_length, self.dtype) for mixer in self._mixers())
        counter = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return Cache(layers, counter, counter)

    @property
    def keeps_everything(self) -> bool:
        """Whether some layer's state grows with the sequence, as in full attention."""
        return any(
            mixer.max_length(mixer.state_spec(1, 1, self.dtype)) is not None
            for mixer in self._mixers()
        )

    def max_length(self, cache: Cache) -> int | None:
        """Largest number of tokens per sequence that the cache can hold; None is unlimited."""
        found = [
            mixer.max_length(state)
            for mixer, state in zip(self._mixers(), cache.layers, strict=True)
        ]
        return min((length for length in found if length is not None), default=None)

    def _mixers(self) -> list[Mixer]:
        return [layer.self_attn for layer in self.layers.layers()]
