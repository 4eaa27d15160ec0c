"""A decoding engine: many requests on one device, each with the tokens that it would get alone.

    engine = Engine(model, slots=8)
    request = engine.submit(**processor(messages), max_new_tokens=64)
    for token in request: ...

Requests join and leave at any step. Prompts are read in chunks between launches of several decoding
steps, so that a long prompt does not stop the others. Programs have one shape each: after the first
requests nothing is compiled.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.arrays import whole_number
from infinitevl_jax.inputs.model_inputs import ModelInputs, build_inputs
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.nn.params import cache_spec
from infinitevl_jax.serve.cache_checks import same_shapes
from infinitevl_jax.serve.encoding import group_encoder
from infinitevl_jax.serve.generation import resolve
from infinitevl_jax.serve.infinitevl import VISION_INPUTS, InfiniteVL
from infinitevl_jax.serve.programs import STEPS, on_mesh
from infinitevl_jax.serve.prompt import PromptReader
from infinitevl_jax.serve.requests import OpenSequence, Reader, Request
from infinitevl_jax.serve.slots import ENDS, Piece, Slots, join_pieces
from infinitevl_jax.serve.staging import Staging

if TYPE_CHECKING:
    from infinitevl_jax.processing import Processor
    from infinitevl_jax.serve.video_stream import VideoStream


class Engine:
    """Slots for sequences on the device, and the requests that wait for one.

    Attributes:
      launches, chunks: decoding launches and prefill chunks so far.
    """

    def __init__(
        self,
        model: InfiniteVL,
        *,
        slots: int = 8,
        max_length: int | None = None,
        chunk: int = 512,
        steps: int = STEPS,
        patches: int = 4096,
        rows: int = 1,
        waiting: int | None = None,
    ):
        """
        Args:
          slots: sequences at once.
          max_length: tokens of a sequence, prompt included, where some layer keeps all of them.
          chunk: tokens of a prompt that are read at once.
          steps: decoding steps a launch. Tokens come in such groups.
          patches: image and video patches that are encoded at once.
          rows: prompts that are read at once, a chunk of each. More than one pays where many short
            prompts or frames come together.
          waiting: requests that may wait for a slot; None: any number.
        """
        self.model = model
        self.slots = whole_number(slots, "slots", 1)
        self.chunk, self.steps = whole_number(chunk, "chunk", 1), whole_number(steps, "steps", 1)
        self.patches = whole_number(patches, "patches", 1)
        self.rows = whole_number(rows, "rows", 1, self.slots)
        self.waiting = None if waiting is None else whole_number(waiting, "waiting", 0)
        vocab = model.config.text.vocab_size
        self.max_length = max_length if model.keeps_everything else None
        self._cache = model.init_cache(self.slots, max_length)
        self._spec = cache_spec(model.config, 1, self.max_length, model.dtype)
        self._slots = jax.device_put(Slots.idle(self.slots, vocab))
        self._run = model.programs
        if model.mesh is None:
            self._stage = Staging(*model.params["norm.weight"].devices())
        else:  # inputs go to each device as they come
            self._stage = lambda inputs: inputs
        self._reader = PromptReader(
            self.chunk,
            group_encoder(self._run, model.params, model.config, self.patches, self._stage),
        )
        self._held: list[Reader | None] = [None] * self.slots
        self._queue: collections.deque[Reader] = collections.deque()
        self._reading: collections.deque[Reader] = collections.deque()
        # tokens [steps, columns] under way, and whose each column is
        self._flying: list[tuple[jax.Array, list[Request | None]]] = []
        self._lock = threading.RLock()
        self.launches = self.chunks = 0

    @property
    def busy(self) -> int:
        """Slots that are taken."""
        return sum(held is not None for held in self._held)

    def submit(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        mm_token_type_ids=None,
        *,
        cache: Cache | None = None,
        keep_cache: bool = False,
        **arguments: Any,
    ) -> Request:
        """Let one sequence join; it waits where no slot is free.

        Args:
          input_ids ... second_per_grid_ts: one row, as for `InfiniteVL.generate`.
          cache: of one sequence, that this one goes on from; it is not changed.
          keep_cache: whether `Request.cache` is wanted.
          arguments: as for `InfiniteVL.generate`, without streamer.

        Raises InfiniteVLError for arguments that do not fit the model or each other, for a sequence
        longer than the engine's max_length, where as many requests wait as may, and where open
        sequences hold all slots.
        """
        model, vision = self.model, {}
        for name in VISION_INPUTS:
            if name in arguments:
                vision[name] = arguments.pop(name)
        self._check(cache)
        start = None if cache is None else np.asarray(cache.next_position)
        before = 0 if cache is None else int(np.asarray(cache.length)[0])
        inputs = build_inputs(
            model.config, input_ids, attention_mask, position_ids, **vision, start=start
        )
        if len(inputs.counts) != 1:
            raise InfiniteVLError(
                f"input_ids has {len(inputs.counts)} rows, a request is one sequence",
                "submit each row by itself",
            )
        if inputs.decoder.segment_ids.any():
            raise InfiniteVLError(
                "position_ids start anew inside the row: several sequences are packed there",
                "submit each sequence by itself",
            )
        request = resolve(arguments, model.defaults, model.config, inputs.decoder.tokens.shape[1])
        if request.streamer is not None:
            raise InfiniteVLError("submit takes no streamer", "iterate over the request")
        if len(request.ends) > ENDS:
            raise InfiniteVLError(
                f"{len(request.ends)} ids end the sequence", f"give at most {ENDS}"
            )
        if keep_cache and request.stop_strings:
            raise InfiniteVLError(
                "keep_cache came with stop_strings: the cache would hold more than the text",
                "leave one of them out",
            )
        total = before + int(inputs.counts[0]) + request.max_new_tokens
        if self.max_length is not None and total > self.max_length:
            raise InfiniteVLError(
                f"the sequence may come to {total:,} tokens, the engine's slots hold"
                f" {self.max_length:,}",
                "make the engine with a larger max_length, or ask for fewer max_new_tokens",
            )
        out = Request(self, request, cache, keep_cache)
        with self._lock:
            if not request.max_new_tokens:
                out.done = True
                return out
            if all(isinstance(held, OpenSequence) for held in self._held):
                raise InfiniteVLError(
                    f"open sequences hold all {self.slots} slots, and none leaves by itself",
                    "close one, or make the engine with more slots",
                )
            ahead = len(self._queue) - (self.slots - self.busy)  # who wait for a slot to be free
            if self.waiting is not None and ahead >= self.waiting:
                raise InfiniteVLError(
                    f"all {self.slots} slots are taken and {max(ahead, 0)} requests wait",
                    "read or cancel some of them, or make the engine with more slots",
                )
            occurred = inputs.occurred(model.config.text.vocab_size)
            out.begin = Slots.beginning(request, 1, occurred)
            out.pieces = self._reader.pieces(inputs, 0 if start is None else int(start[0]))
            self._queue.append(out)
        return out

    def open_stream(self, processor: Processor, **options: Any) -> VideoStream:
        """A video that is watched as it comes. It keeps a slot; each question takes another.

        options: as for `VideoStream`.
        """
        from infinitevl_jax.serve.video_stream import VideoStream  # it is built on the engine

        return VideoStream(self, processor, **options)

    def open(self, cache: Cache | None = None) -> OpenSequence:
        """Keep a slot for a sequence that grows by `OpenSequence.extend`.

        cache: of one sequence, that this one goes on from; it is not changed.

        Raises InfiniteVLError where no slot is free.
        """
        self._check(cache)
        with self._lock, on_mesh(self.model.mesh):
            slot = self._free()
            if slot is None or self._queue:
                raise InfiniteVLError(
                    f"none of the {self.slots} slots is free",
                    "close a sequence or wait for a request, or make the engine with more slots",
                )
            out = OpenSequence(self, cache)
            self._seat(out, slot)
        return out

    def extend(self, sequence: OpenSequence, inputs: Iterable[tuple[ModelInputs, int]]) -> None:
        """`OpenSequence.extend`."""
        with self._lock:
            if sequence.done:
                raise InfiniteVLError("the sequence was closed", "open another")
            more = itertools.chain.from_iterable(
                self._reader.pieces(part, start) for part, start in inputs
            )
            if sequence.pieces is None:
                sequence.pieces = more
                self._reading.append(sequence)
            else:
                sequence.pieces = itertools.chain(sequence.pieces, more)

    def copy_cache(self, sequence: OpenSequence) -> Cache:
        """`OpenSequence.cache`."""
        with self._lock, on_mesh(self.model.mesh):
            if sequence.slot < 0:
                raise InfiniteVLError("the sequence was closed", "take its cache before")
            if sequence.fresh:
                return self.model.init_cache(1, self.max_length)
            return self._run.take(self._cache, np.int32(sequence.slot))

    def _check(self, cache: Cache | None) -> None:
        """A cache to go on from is one sequence's, of this model."""
        if cache is not None and not same_shapes(cache, self._spec):
            raise InfiniteVLError(
                "the cache is another model's, or not of one sequence in this engine's slots",
                "pass the cache of an earlier request or stream of this engine",
            )

    def cancel(self, reader: Reader) -> None:
        """End a request or an open sequence where it stands. Others go on undisturbed."""
        with self._lock, on_mesh(self.model.mesh):
            if reader.done:
                return
            reader.done = True
            if isinstance(reader, Request):
                reader.cancelled = True
            self._leave(reader)

    def run(self) -> None:
        """Work until no request is left and all that came is read."""
        while self.step():
            pass

    def step(self) -> bool:
        """One round: requests join, a chunk of prompts, a launch of decoding steps, and the tokens
        of the round before. Returns whether there is anything left to do."""
        with self._lock, on_mesh(self.model.mesh):
            while self._queue and (slot := self._free()) is not None:
                self._seat(self._queue.popleft(), slot)
            arrived, self._flying = self._flying, []
            self._read()
            speaking = [
                held if isinstance(held, Request) and held.pieces is None else None
                for held in self._held
            ]
            if any(speaking):
                self._cache, self._slots, tokens = self._run.decode(
                    self.model.params,
                    self._cache,
                    self._slots,
                    steps=self.steps,
                    sampled=_sampled(speaking),
                )
                self.launches += 1
                self._flying.append((tokens, speaking))
            for tokens, requests in arrived:  # the device is at work meanwhile
                self._hand_over(np.asarray(tokens), requests)
            return bool(self._queue or self._reading or self._flying)

    def _free(self) -> int | None:
        return next((i for i, held in enumerate(self._held) if held is None), None)

    def _seat(self, reader: Reader, slot: int) -> None:
        reader.slot, self._held[slot] = slot, reader
        if reader.past is not None:
            self._cache = self._run.put(self._cache, np.int32(slot), reader.past)
            reader.past = None
        if reader.pieces is not None:
            self._reading.append(reader)

    def _read(self) -> None:
        """Read the next piece of up to `rows` prompts; prompts take turns."""
        chosen: list[tuple[Reader, Piece]] = []
        ready = list(self._reading)[: self.rows]
        self._reading.rotate(-len(ready))
        for reader in ready:
            try:
                chosen.append((reader, next(reader.pieces or iter(()))))
            except StopIteration:
                self._reading.remove(reader)
                reader.pieces = None
            except Exception as error:
                self._fail(reader, error)
        if not chosen:
            return
        chunk, beginning = join_pieces(
            [(piece, r.slot, r.fresh, r.begin) for r, piece in chosen],
            self.rows,
            self.slots,
            self.model.config.text.vocab_size,
        )
        self._cache, hidden = self._run.prefill(self.model.params, self._cache, self._stage(chunk))
        self.chunks += 1
        first: list[Request | None] = [None] * self.rows
        for row, (reader, piece) in enumerate(chosen):
            reader.fresh = False
            if piece.last and isinstance(reader, Request):
                first[row], reader.pieces, reader.begin = reader, None, None
                self._reading.remove(reader)
        if beginning is not None:
            self._slots, tokens = self._run.enter(
                self.model.params, self._slots, hidden, beginning, sampled=_sampled(first)
            )
            self._flying.append((tokens[None], first))

    def _hand_over(self, tokens: np.ndarray, requests: list[Request | None]) -> None:
        """Give tokens [steps, columns] to the requests whose columns they were then."""
        for row in tokens:
            for column, request in enumerate(requests):
                if request is not None and not request.done and row[column] >= 0:
                    if request.take(int(row[column])):
                        request.done = True
                        self._leave(request)

    def _fail(self, reader: Reader, error: BaseException) -> None:
        reader.error, reader.done = error, True
        self._leave(reader)

    def _leave(self, reader: Reader) -> None:
        """Take a reader out, wherever it is."""
        for queue in (self._queue, self._reading):
            if reader in queue:
                queue.remove(reader)
        slot, reader.slot = reader.slot, -1
        reader.pieces = reader.past = reader.begin = None
        if slot < 0:
            return
        if isinstance(reader, Request):
            if reader.keep and not reader.cancelled and reader.error is None:
                reader.cache = self._run.take(self._cache, np.int32(slot))
            self._slots = self._run.stop(self._slots, np.int32(slot))
        self._held[slot] = None


def _sampled(requests: list[Request | None]) -> bool:
    """Whether some of them draw their tokens."""
    return any(request is not None and request.arguments.sampled for request in requests)
