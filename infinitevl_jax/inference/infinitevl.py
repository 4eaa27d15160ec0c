"""InfiniteVL: the class people use. Inputs are named as in Hugging Face, so a batch from its Qwen2.5-VL processor passes unchanged.

    model = InfiniteVL.from_pretrained(folder, dtype=jnp.bfloat16)
    out = model(**batch)                                   # out.logits
    tokens = model.generate(**batch, max_new_tokens=64)    # [batch, new]
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from infinitevl_jax.config.model import FULL, ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inference.sampling import Sampling, choose
from infinitevl_jax.model.cache import Cache, empty
from infinitevl_jax.model.inputs import Inputs, Prepared, prepare, text_inputs
from infinitevl_jax.model.ops import Ops, resolve_ops
from infinitevl_jax.model.params import Params, abstract, bind, initialize
from infinitevl_jax.model.patches import bucket
from infinitevl_jax.sharding import check_mesh, parameter_shardings

VISION_INPUTS = {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"}
PREFILL_CHUNK = 8192  # tokens of a prompt that go through the decoder at once


@dataclass
class Output:
    """What a call returns: logits [batch, length, vocab] (f32), and, where asked for, the cache and every layer's hidden states."""

    logits: Array
    cache: Cache | None = None
    hidden_states: tuple[Array, ...] | None = None


class InfiniteVL:
    """A configuration, its parameters, and the compiled functions that run them. Holds no conversation: that is the cache's."""

    def __init__(self, config: ModelConfig, params: Params, *, dtype=None, mesh: Mesh | None = None, ops: Ops | None = None):
        """
        Args:
          params: by dotted name, unrolled layout.
          dtype: what activations are computed in; by default what the last norm is stored in, as the bulk of a checkpoint is.
          mesh: where the parameters live (axes as `infinitevl_jax.sharding.make_mesh` names them), or None for one device.
          ops: the operators, by default the first implementation of each that takes a case (`ops.report()` tells which did).
        """
        if mesh is not None:
            check_mesh(mesh)
        self.config, self.params, self.mesh = config, params, mesh
        self.dtype = jnp.dtype(dtype or params["norm.weight"].dtype)
        self.ops = ops or resolve_ops(mesh)
        graphdef, _ = abstract(config, scanned=False, dtype=self.dtype, ops=self.ops)
        model = partial(bind, graphdef)
        self._encode = jax.jit(lambda params, patches: model(params).encode(patches))
        self._forward = jax.jit(partial(_forward, model), static_argnames=("collect", "last_only"))
        self._step = jax.jit(partial(_step, model), static_argnames="sampling", donate_argnames="cache")
        self._choose = jax.jit(choose, static_argnames="sampling")
        self._cache_spec = lambda batch, max_length: model(jax.eval_shape(lambda p: p, params)).cache_spec(batch, max_length)

    @classmethod
    def from_pretrained(
        cls, folder, *, dtype=None, mesh: Mesh | None = None, ops: Ops | None = None, progress: bool = False
    ) -> "InfiniteVL":
        """Load a Hugging Face folder (config.json and safetensors are enough) or one of ours.

        Args:
          dtype: cast floating-point weights to this (f32 or bf16) and compute in it; None or "auto" keeps each tensor's own.
          mesh: place the weights on it; each device reads only its shard.
          ops: as for the class itself, from `infinitevl_jax.model.ops.resolve_ops`.
          progress: show a bar while the weights are read.
        """
        from infinitevl_jax.conversion import load_params, read_config

        dtype = floating(dtype)
        shardings = None
        if mesh is not None:
            check_mesh(mesh)
            shardings = parameter_shardings(abstract(read_config(folder), scanned=False)[1], mesh)
        config, params = load_params(folder, scanned=False, dtype=dtype, shardings=shardings, progress=progress)
        return cls(config, params, dtype=dtype, mesh=mesh, ops=ops)

    @classmethod
    def random(
        cls, config: ModelConfig, seed: int = 0, *, dtype=jnp.float32, mesh: Mesh | None = None, ops: Ops | None = None
    ) -> "InfiniteVL":
        """A model with fresh random weights."""
        shardings = None if mesh is None else parameter_shardings(abstract(config, scanned=True)[1], mesh)
        return cls(config, initialize(config, jax.random.key(seed), scanned=False, dtype=dtype, shardings=shardings), mesh=mesh, ops=ops)

    @property
    def parameter_count(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.size for p in self.params.values())

    @cached_property
    def keeps_everything(self) -> bool:
        """Whether some layer attends to the whole past, so that the cache must be sized to the longest sequence."""
        return FULL in self.config.text.layer_types

    def init_cache(self, batch: int, max_length: int | None = None) -> Cache:
        """An empty cache for `batch` sequences. `max_length` sizes full-attention layers; the others stay as small as they are."""
        if self.keeps_everything and max_length is None:
            raise InfiniteVLError("this model has full-attention layers, whose cache grows with the text", "pass max_length in tokens")
        with self._on_mesh():
            spec = self._cache_spec(batch, max_length if self.keeps_everything else None)
            return empty(spec) if self.mesh is None else jax.jit(lambda: empty(spec))()

    def __call__(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        pixel_values=None,
        image_grid_thw=None,
        pixel_values_videos=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        mm_token_type_ids=None,
        *,
        cache: Cache | None = None,
        use_cache: bool = False,
        max_length: int | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """Logits of every token (rows of padding hold nothing of meaning).

        Args:
          input_ids ... second_per_grid_ts: as Hugging Face's Qwen2.5-VL processor returns them, numpy or jax. mm_token_type_ids is
            accepted and ignored: placeholders say the same.
          cache: what these tokens follow. It is not changed; the output carries the new one.
          use_cache: start and return a cache. Where the model has full-attention layers it holds `max_length` tokens, by default
            about twice the ones given.
        """
        vision = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        vision |= {"pixel_values_videos": pixel_values_videos, "video_grid_thw": video_grid_thw}
        start = None
        if cache is not None and any(v is not None for v in vision.values()):
            start = np.asarray(cache.next_position)
        width = np.shape(input_ids)[-1] if np.ndim(input_ids) else 0
        length = width if width == 1 else bucket(width)
        prepared = prepare(
            self.config,
            input_ids,
            attention_mask,
            position_ids,
            **vision,
            second_per_grid_ts=second_per_grid_ts,
            start=start,
            length=length,
        )
        if cache is None and use_cache:
            cache = self.init_cache(len(prepared.shift), max_length or 2 * bucket(width))
        self._check_room(cache, prepared)
        with self._on_mesh():
            embeds = None if prepared.patches is None else self._encode(self.params, prepared.patches)
            logits, cache, hidden = self._forward(self.params, prepared.inputs, embeds, cache, collect=output_hidden_states)
            back = partial(_unroll, shift=prepared.shift, width=width)
            return Output(back(logits), cache, tuple(back(h) for h in hidden) if output_hidden_states else None)

    def generate(
        self,
        input_ids,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008  frozen
        seed: int = 0,
        eos_token_ids=None,
        **batch,
    ) -> np.ndarray:
        """The new token ids [batch, new], greedy by default; a sequence that has ended is filled up with the pad token."""
        settings = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed, "eos_token_ids": eos_token_ids}
        tokens = list(self.stream(input_ids, **settings, **batch))
        return np.stack(tokens, 1) if tokens else np.zeros((len(input_ids), 0), np.int32)

    def stream(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        mm_token_type_ids=None,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008  frozen
        seed: int = 0,
        eos_token_ids=None,
        **vision,
    ) -> Iterator[np.ndarray]:
        """Yield [batch] token ids as they are made, until every sequence has ended or `max_new_tokens` have come.

        vision: pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, second_per_grid_ts.
        """
        if unknown := sorted(set(vision) - VISION_INPUTS):
            raise InfiniteVLError(
                f"generate has no argument {unknown[0]!r}",
                "say sampling=Sampling(temperature=..., top_k=..., top_p=...), max_new_tokens, seed or eos_token_ids",
            )
        prepared = prepare(self.config, input_ids, attention_mask, position_ids, **vision)
        if max_new_tokens < 1:
            return
        batch, width = prepared.inputs.tokens.shape
        logits, cache = self.prefill(prepared, self.init_cache(batch, bucket(width + max_new_tokens)))
        settings = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed, "eos_token_ids": eos_token_ids}
        for tokens, _ in self.decode(logits, cache, **settings):
            yield tokens

    def decode(
        self,
        logits: Array,
        cache: Cache,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008  frozen
        seed: int = 0,
        eos_token_ids=None,
    ) -> Iterator[tuple[np.ndarray, Cache]]:
        """Go on from a prompt: yield [batch] token ids as they are made, each with the cache of that moment.

        The cache has taken in every token so far, except those that end a sequence and, at `max_new_tokens`, the last: what a
        conversation goes on from. Asking for the next token uses it up, as it does the `cache` passed in.

        Args:
          logits, cache: as `prefill` returns them.
          eos_token_ids: what ends a sequence; by default as the checkpoint's generation_config.json or config.json says.
        """
        ends = np.asarray(self.config.eos_token_ids if eos_token_ids is None else eos_token_ids, np.int32).reshape(-1)
        key = jax.random.key(seed)
        with self._on_mesh():
            token, device_ends = self._choose(logits, key, sampling=sampling), jnp.asarray(ends)
        done = np.zeros(token.shape, bool)
        for i in range(1, max_new_tokens + 1):
            following = None
            if i < max_new_tokens:  # the device works on the next token while this one is looked at
                with self._on_mesh():
                    step = jax.random.fold_in(key, i)
                    following, cache = self._step(self.params, token, cache, step, sampling=sampling, ends=device_ends)
            now = np.asarray(token)
            yield np.where(done, self.config.pad_token_id, now).astype(np.int32), cache
            done |= np.isin(now, ends)
            if done.all():
                return
            token = following

    def prefill(self, prepared: Prepared, cache: Cache) -> tuple[Array, Cache]:
        """Take prepared inputs into a cache, in chunks: logits [batch, vocab] of every row's last token, and the new cache."""
        self._check_room(cache, prepared)
        with self._on_mesh():
            embeds = None if prepared.patches is None else self._encode(self.params, prepared.patches)
            last = None
            for part in _chunks(prepared.inputs):
                logits, cache, _ = self._forward(self.params, part, embeds, cache, last_only=True)
                # a row that ended in an earlier chunk keeps the logits it had
                last = logits if last is None else jnp.where(part.index[:, :1] >= 0, logits, last)
        return last, cache

    def _check_room(self, cache: Cache | None, prepared: Prepared) -> None:
        """A cache takes the sequences it was made for, and a full-attention one no more tokens than that."""
        if cache is None:
            return
        if len(cache.length) != len(prepared.shift):
            raise InfiniteVLError(
                f"the cache holds {len(cache.length)} sequences, input_ids {len(prepared.shift)}",
                "pass one row a sequence, or cache.select(rows) to branch or leave some out",
            )
        if prepared.inputs.segment.any():
            raise InfiniteVLError(
                "position_ids start anew inside a row: several sequences are packed there, and a cache holds one sequence a row",
                "pass one row a sequence, padded with attention_mask, where a cache or new tokens are wanted",
            )
        if not self.keeps_everything:
            return
        capacity = min(s.k.shape[1] for kind, s in zip(self.config.text.layer_types, cache.layers, strict=True) if kind == FULL)
        needed = np.asarray(cache.length) + (prepared.inputs.index >= 0).sum(1)
        if needed.max() > capacity:
            raise InfiniteVLError(
                f"the cache was made for {capacity} tokens, this call brings it to {needed.max()}", "make it with a larger max_length"
            )

    def _on_mesh(self):
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def floating(dtype) -> np.dtype | None:
    """f32 or bf16 as a numpy dtype, from a name or a dtype of numpy, jax or torch; None for None and "auto"."""
    name = str(dtype).removeprefix("torch.") if not isinstance(dtype, type) else np.dtype(dtype).name
    if name in ("None", "auto"):
        return None
    if name not in ("float32", "bfloat16"):
        raise InfiniteVLError(f"dtype is {dtype!r}", "compute in float32 or bfloat16, or leave it out to keep the checkpoint's own")
    return jnp.dtype(name)


def _chunks(inputs: Inputs) -> Iterator[Inputs]:
    """Pieces of at most PREFILL_CHUNK tokens, the last one padded to a bucket: few shapes, few compilations."""
    for at in range(0, inputs.tokens.shape[1], PREFILL_CHUNK):
        width = min(PREFILL_CHUNK, inputs.tokens.shape[1] - at)
        more = min(bucket(width), PREFILL_CHUNK) - width

        def cut(x, fill, at=at, width=width, more=more):
            if x is None:
                return None
            return np.pad(x[..., at : at + width], [(0, 0)] * (x.ndim - 1) + [(0, more)], constant_values=fill)

        index = cut(inputs.index, -1)
        yield Inputs(
            cut(inputs.tokens, 0),
            np.where(index >= 0, index - at, -1),
            cut(inputs.segment, 0),
            cut(inputs.positions, 0),
            cut(inputs.vision_index, -1),
        )


def _unroll(x: Array, shift: np.ndarray, width: int) -> Array:
    """Put left padding back: [batch, length, ...] -> [batch, width, ...]."""
    if not shift.any():
        return x[:, :width]
    place = np.maximum(np.arange(width) - shift[:, None], 0)
    return jax.vmap(lambda row, place: row[place])(x, place)


def _forward(model, params: Mapping[str, Array], inputs: Inputs, embeds, cache, collect: bool = False, last_only: bool = False):
    """One decoder call: logits [batch, length, vocab] f32 (or [batch, vocab] of each row's last token), cache, hidden states."""
    vlm = model(params)
    hidden, cache, states = vlm.decode(vlm.embed(inputs, embeds), inputs, cache, collect)
    if last_only:
        last = jnp.maximum((inputs.index >= 0).sum(1) - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], 1)
    logits = vlm.logits(hidden).astype(jnp.float32)
    return logits[:, 0] if last_only else logits, cache, states


def _step(model, params, token: Array, cache: Cache, key: Array, sampling: Sampling, ends=None) -> tuple[Array, Cache]:
    """Append one token to every sequence and choose the next. A sequence whose token is one of `ends` stays as it is."""
    inputs = text_inputs(token[:, None])
    ended = jnp.zeros(token.shape, bool) if ends is None else jnp.isin(token, ends)
    if ends is not None:
        inputs = inputs._replace(index=jnp.where(ended[:, None], -1, inputs.index))
    logits, cache, _ = _forward(model, params, inputs, None, cache, last_only=True)
    return jnp.where(ended, token, choose(logits, key, sampling)), cache
