"""InfiniteVL: the class people use. Inputs are named as in Hugging Face, so a batch from its
Qwen2.5-VL processor passes unchanged.

    model = InfiniteVL.from_pretrained(folder, dtype=jnp.bfloat16)
    out = model(**batch)                                   # out.logits
    tokens = model.generate(**batch, max_new_tokens=64)    # [batch, new]
"""

import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.dtypes import compute_dtype, floating
from infinitevl_jax.errors import InfiniteVLError, InfiniteVLWarning
from infinitevl_jax.extras import says_which_extra
from infinitevl_jax.inputs.arrays import as_numpy, whole_number
from infinitevl_jax.inputs.model_inputs import ModelInputs, build_inputs
from infinitevl_jax.inputs.patches import bucket
from infinitevl_jax.nn.cache import Cache, empty
from infinitevl_jax.nn.fuse import FusedParams, fuse
from infinitevl_jax.nn.ops import Ops, resolve_ops
from infinitevl_jax.nn.params import Params, functional, initialize, parameters
from infinitevl_jax.serve import decoding
from infinitevl_jax.serve.arguments import CALL, refuse
from infinitevl_jax.serve.cache_checks import CacheChecks
from infinitevl_jax.serve.encoding import group_encoder
from infinitevl_jax.serve.generation import Defaults, Request, StopStrings, read_defaults, resolve
from infinitevl_jax.serve.output import Output
from infinitevl_jax.serve.programs import STEPS, Programs, on_mesh
from infinitevl_jax.sharding import check_mesh, parameter_shardings

VISION_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)


class InfiniteVL:
    """A configuration, its parameters, and the compiled functions that run them. Holds no
    conversation: that is the cache's. `params` has the names of checkpoints; on the device some of
    them are fused (`infinitevl_jax.nn.fuse`), and looking such a one up copies it."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params | FusedParams,
        *,
        dtype: Any = None,
        mesh: Mesh | None = None,
        ops: Ops | None = None,
        defaults: Defaults = Defaults(),  # noqa: B008  frozen
    ):
        """
        Args:
          params: by dotted name, unrolled layout. They are laid out for decoding: a second copy
            while the caller keeps his. Those of another model are shared with it.
          dtype: what activations are computed in (f32 or bf16); by default what the last norm is
            stored in, as the bulk of a checkpoint is. Weights in float16 stay so and are computed
            with in float32; an InfiniteVLWarning says it.
          mesh: where the parameters live (axes as `infinitevl_jax.sharding.make_mesh` names them),
            or None for one device.
          ops: the operators, by default the first implementation of each that takes a case
            (`ops.report()` tells which did).
          defaults: what the checkpoint says of generation.
        """
        if mesh is not None:
            check_mesh(mesh)
        params = params if isinstance(params, FusedParams) else fuse(config, dict(params), mesh)
        self.config, self.params, self.mesh, self.defaults = config, params, mesh, defaults
        stored = params["norm.weight"].dtype
        self.dtype = floating(dtype) or compute_dtype(stored)
        if floating(dtype) is None and self.dtype != stored:
            warnings.warn(
                f"the weights are {stored}, whose range activations leave: computing in"
                f" {self.dtype} (dtype='bfloat16' takes less)",
                InfiniteVLWarning,
                stacklevel=2,
            )
        self.ops = ops or resolve_ops(mesh)
        model = functional(config, scanned=False, dtype=self.dtype, ops=self.ops)
        self.programs = Programs(model)  # compiled once, for calls and engines alike
        self._module = model(jax.eval_shape(lambda p: p, params))
        self._cache_spec = lru_cache(self._module.cache_spec)
        self._checks = CacheChecks(self._module, self._cache_spec)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: Any = None,
        mesh: Mesh | None = None,
        ops: Ops | None = None,
        progress: bool = False,
    ) -> "InfiniteVL":
        """Load a Hugging Face folder (config.json and safetensors are enough) or one of ours.

        Args:
          dtype: cast floating-point weights to this (f32 or bf16) and compute in it; None or "auto"
            keeps each tensor's own.
          mesh: place the weights on it; each device reads only its shard.
          ops: as for the class itself, from `infinitevl_jax.nn.ops.resolve_ops`.
          progress: show a bar while the weights are read.
        """
        with says_which_extra():
            from infinitevl_jax.checkpoints import load_params, read_config

        dtype, defaults = floating(dtype), read_defaults(folder)
        shardings = None
        if mesh is not None:
            check_mesh(mesh)
            shardings = parameter_shardings(parameters(read_config(folder), scanned=False), mesh)
        with says_which_extra():  # some files need packages of their own
            config, params = load_params(
                folder, scanned=False, dtype=dtype, shardings=shardings, progress=progress
            )
        fused = fuse(config, params, mesh)
        return cls(config, fused, dtype=dtype, mesh=mesh, ops=ops, defaults=defaults)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        seed: int = 0,
        *,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        ops: Ops | None = None,
    ) -> "InfiniteVL":
        """A model with fresh random weights."""
        shardings = None
        if mesh is not None:
            check_mesh(mesh)  # before anything is made
            shardings = parameter_shardings(parameters(config, scanned=False), mesh)
        params = initialize(
            config, jax.random.key(seed), scanned=False, dtype=dtype, shardings=shardings
        )
        return cls(config, fuse(config, params, mesh), mesh=mesh, ops=ops)

    @property
    def parameter_count(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.size for p in parameters(self.config, scanned=False).values())

    @cached_property
    def keeps_everything(self) -> bool:
        """Whether some layer attends to the whole past, so that the cache must be sized to the
        longest sequence."""
        return self._module.keeps_everything

    def init_cache(self, batch: int, max_length: int | None = None) -> Cache:
        """An empty cache for `batch` sequences. `max_length` sizes full-attention layers; the
        others stay as small as they are."""
        batch = whole_number(batch, "batch", 1)
        max_length = None if max_length is None else whole_number(max_length, "max_length", 1)
        if self.keeps_everything and max_length is None:
            raise InfiniteVLError(
                "this model has full-attention layers, whose cache grows with the text",
                "pass max_length in tokens",
            )
        with on_mesh(self.mesh):
            spec = self._cache_spec(batch, max_length if self.keeps_everything else None)
            return empty(spec) if self.mesh is None else jax.jit(lambda: empty(spec))()

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        pixel_values: ArrayLike | None = None,
        image_grid_thw: ArrayLike | None = None,
        pixel_values_videos: ArrayLike | None = None,
        video_grid_thw: ArrayLike | None = None,
        second_per_grid_ts: ArrayLike | None = None,
        mm_token_type_ids: ArrayLike | None = None,
        *,
        cache: Cache | None = None,
        use_cache: bool = False,
        max_length: int | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> Output:
        """Logits of every token (rows of padding hold nothing of meaning).

        Args:
          input_ids ... second_per_grid_ts: as Hugging Face's Qwen2.5-VL processor returns them:
            numpy, jax or torch, on any device.
            mm_token_type_ids is accepted and ignored: placeholders say the same.
          cache: what these tokens follow. It is not changed; the output carries the new one.
          use_cache: start and return a cache. Where the model has full-attention layers it holds
            `max_length` tokens, by default about twice the ones given.
          logits_to_keep: compute logits of the last so many columns of input_ids alone; 0 computes
            all.
          others: Hugging Face's other arguments, where they ask for what is done anyway.

        Raises InfiniteVLError for arguments that do not fit the model or each other.
        """
        refuse(others, (), CALL, "a call")
        vision: dict[str, Any] = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        vision |= {"pixel_values_videos": pixel_values_videos, "video_grid_thw": video_grid_thw}
        self._checks.check_cache(cache)
        start = None
        if cache is not None and any(v is not None for v in vision.values()):
            start = np.asarray(cache.next_position)
        input_ids = as_numpy(input_ids, "input_ids")
        width = input_ids.shape[-1] if input_ids.ndim else 0
        length = width if width == 1 else bucket(width)
        inputs = build_inputs(
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
            cache = self.init_cache(
                len(inputs.left_padding), 2 * bucket(width) if max_length is None else max_length
            )
        self._checks.check_call(cache, inputs)
        columns = min(whole_number(logits_to_keep, "logits_to_keep", 0), width) or None
        keep = None
        if columns is not None:
            keep = np.maximum(
                np.arange(width - columns, width) - inputs.left_padding[:, None], 0
            ).astype(np.int32)
        with on_mesh(self.mesh):
            embeds = (
                None
                if inputs.patches is None
                else self.programs.encode(self.params, inputs.patches)
            )
            logits, cache, hidden = self.programs.forward(
                self.params,
                inputs.decoder,
                embeds,
                cache,
                keep,
                collect=bool(output_hidden_states),
            )
        return Output(
            logits,
            cache,
            tuple(hidden) if output_hidden_states else None,
            inputs.left_padding,
            width,
            columns,
        )

    def generate(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        mm_token_type_ids: ArrayLike | None = None,
        **arguments: Any,
    ) -> np.ndarray:
        """The new token ids [batch, new], greedy by default; a sequence that has ended is filled up
        with the pad token.

        arguments: vision inputs as for a call of the model, and

          max_new_tokens: at most so many (256); or max_length, which counts the prompt's columns as
            well.
          do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in transformers; what
            is not given is as the checkpoint's generation_config.json says. do_sample=True, or one
            of the four after it, draws tokens; else the likeliest is taken. sampling=Sampling(...)
            says all of it at once, the checkpoint's penalty included.
          seed: of what is drawn; each row draws its own.
          eos_token_ids (or eos_token_id): what ends a sequence; by default as the checkpoint says.
          pad_token_id: what ended sequences are filled up with.
          stop_strings: texts that end a sequence, which keeps them; needs tokenizer=, the processor
            or a tokenizer.
          streamer: gets the prompt, then each step's ids, by put(ids), then end(): transformers'
            TextStreamer.

        Hugging Face's other arguments are taken where they ask for what is done anyway
        (num_beams=1, use_cache=True). Raises InfiniteVLError for others, naming the argument and
        what to do instead.
        """
        tokens = list(self._stream(STEPS, input_ids, attention_mask, position_ids, arguments))
        rows = len(as_numpy(input_ids, "input_ids"))
        return np.stack(tokens, 1) if tokens else np.zeros((rows, 0), np.int32)

    def stream(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        mm_token_type_ids: ArrayLike | None = None,
        **arguments: Any,
    ) -> Iterator[np.ndarray]:
        """Yield [batch] token ids as they are made, until every sequence has ended or
        `max_new_tokens` have come.

        arguments: as for `generate`. What cannot work is an error of this call, not of the first
          token.
        """
        return self._stream(1, input_ids, attention_mask, position_ids, arguments)

    def _stream(self, steps: int, input_ids, attention_mask, position_ids, arguments: dict):
        """`stream`, with tokens in groups of `steps`."""
        vision = {name: arguments.pop(name) for name in VISION_INPUTS if name in arguments}
        inputs = build_inputs(self.config, input_ids, attention_mask, position_ids, **vision)
        request = resolve(arguments, self.defaults, self.config, inputs.decoder.tokens.shape[1])
        if request.streamer is not None:  # hears each token as it is made
            steps = 1
        return self._answer(inputs, request, as_numpy(input_ids, "input_ids"), steps)

    def _answer(
        self, inputs: ModelInputs, request: Request, prompt: np.ndarray, steps: int
    ) -> Iterator[np.ndarray]:
        batch, width = inputs.decoder.tokens.shape
        if request.streamer is not None:
            request.streamer.put(prompt)
        if request.max_new_tokens:
            logits, cache = self.prefill(
                inputs, self.init_cache(batch, bucket(width + request.max_new_tokens))
            )
            occurred = None
            if request.sampling.repetition_penalty != 1:
                occurred = inputs.occurred(self.config.text.vocab_size)
            stopped = StopStrings(request, batch) if request.stop_strings else None
            for tokens, _ in self._decode(logits, cache, request, occurred, stopped, steps):
                if request.streamer is not None:
                    request.streamer.put(tokens)
                yield tokens
        if request.streamer is not None:
            request.streamer.end()

    def decode(
        self, logits: Array, cache: Cache, *, occurred: np.ndarray | None = None, **arguments: Any
    ) -> Iterator[tuple[np.ndarray, Cache]]:
        """Go on from a prompt: yield [batch] token ids as they are made, each with the cache of
        that moment.

        The cache has taken in every token so far, except those that end a sequence and, at
        `max_new_tokens`, the last. Asking for the next token uses it up, as it does `cache`.

        Args:
          logits, cache: as `prefill` returns them.
          occurred: [batch, vocab] bool, the tokens of the sequences so far, which
            repetition_penalty counts; None for none.
          arguments: as for `generate`; max_length, stop_strings and streamer are `generate`'s
            alone.
        """
        self._checks.check_cache(cache)
        if alone := [
            name
            for name in ("max_length", "stop_strings", "streamer")
            if arguments.get(name) is not None
        ]:
            raise InfiniteVLError(
                f"decode has no argument {alone[0]!r}",
                "use generate or stream, or say max_new_tokens",
            )
        request = resolve(arguments, self.defaults, self.config, 0)
        return self._decode(logits, cache, request, occurred, None, steps=1)

    def _decode(
        self,
        logits: Array,
        cache: Cache,
        request: Request,
        occurred: np.ndarray | None,
        stopped: Callable[[np.ndarray], list[bool]] | None,
        steps: int,
    ) -> Iterator[tuple[np.ndarray, Cache]]:
        self._checks.check_room(cache, max(request.max_new_tokens - 1, 0))
        run, mesh = (self.programs, self.params), self.mesh
        return decoding.decode(*run, logits, cache, request, occurred, stopped, mesh, steps)

    def prefill(self, inputs: ModelInputs, cache: Cache) -> tuple[Array, Cache]:
        """Chunked prefill of inputs (`build_inputs`).

        Returns the logits [batch, vocab] of every row's last token, and the new cache.
        """
        self._checks.check_cache(cache)
        self._checks.check_call(cache, inputs)
        with on_mesh(self.mesh):
            encoder = group_encoder(self.programs, self.params, self.config)
            return decoding.prefill(self.programs, self.params, inputs, cache, encoder)
