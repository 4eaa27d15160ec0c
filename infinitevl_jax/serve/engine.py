"""A decoding engine: many requests on one device, each with the tokens that it would get alone.

    engine = Engine(model, slots=8)
    request = engine.submit(**processor(messages), max_new_tokens=64)
    for token in request: ...

Requests join and leave at any step. Prompts are read in chunks between launches of several decoding
steps, so that a long prompt does not stop the others. Programs have one shape each: after the first
requests nothing is compiled.
"""

import collections
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.arrays import whole_number
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.serve.generation import Request as Arguments
from infinitevl_jax.serve.generation import StopStrings, resolve
from infinitevl_jax.serve.infinitevl import VISION_INPUTS, InfiniteVL
from infinitevl_jax.serve.prompt import Piece, PromptReader
from infinitevl_jax.serve.sampling import Settings
from infinitevl_jax.serve.slots import ENDS, Chunk, Slots, compile_programs


class Request:
    """One sequence of an engine. Iterating gives its new tokens as they are made.

    Attributes:
      tokens: so far. done: whether there will be no more. cancelled: whether `cancel` ended it.
      cache: of a request with `keep_cache`, once it is done. Its last token is not in it.
    """

    def __init__(self, engine: "Engine", arguments: Arguments, room: int, keep_cache: bool):
        self._engine, self._arguments, self._room = engine, arguments, room
        self._keep = keep_cache
        self._pieces: Iterator[Piece] | None = None
        self._past: Cache | None = None
        self._begin: Slots | None = None
        self._stopped = StopStrings(arguments, 1) if arguments.stop_strings else None
        self._slot: int | None = None
        self._error: BaseException | None = None
        self.tokens: list[int] = []
        self.done = self.cancelled = False
        self.cache: Cache | None = None

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            while given < len(self.tokens):
                given += 1
                yield self.tokens[given - 1]
            if self._error is not None:
                raise self._error
            if self.done:
                return
            self._engine.step()

    def result(self) -> np.ndarray:
        """All new tokens [new], int32."""
        return np.fromiter(self, np.int32)

    def cancel(self) -> None:
        """End it here; its slot is free for another."""
        self._engine.cancel(self)


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
        steps: int = 8,
        patches: int = 4096,
        waiting: int | None = None,
    ):
        """
        Args:
          slots: sequences at once.
          max_length: tokens of a sequence, prompt included, where some layer keeps all of them.
          chunk: tokens of a prompt that are read at once.
          steps: decoding steps a launch. Tokens come in such groups.
          patches: image and video patches that are encoded at once.
          waiting: requests that may wait for a slot; None: any number.
        """
        self.model = model
        self.slots = whole_number(slots, "slots", 1)
        self.chunk, self.steps = whole_number(chunk, "chunk", 1), whole_number(steps, "steps", 1)
        self.patches = whole_number(patches, "patches", 1)
        self.waiting = None if waiting is None else whole_number(waiting, "waiting", 0)
        vocab = model.config.text.vocab_size
        self.max_length = max_length if model.keeps_everything else None
        self._cache = model.init_cache(self.slots, max_length)
        self._slots = jax.device_put(Slots.idle(self.slots, vocab))
        self._idle = Slots.idle(1, vocab)
        self._run = compile_programs(model.module, self.steps)
        self._reader = PromptReader(
            self.chunk,
            self.patches,
            1 if model.config.vision is None else model.config.vision.merge_unit,
            model.config.text.hidden_size,
            model.dtype,
            lambda patches: self._run.encode(model.params, patches),
            self._run.merge,
        )
        self._held: list[Request | None] = [None] * self.slots
        self._queue: collections.deque[Request] = collections.deque()
        self._reading: collections.deque[Request] = collections.deque()
        # tokens [steps, columns] under way, and whose each column is
        self._flying: list[tuple[jax.Array, list[Request | None]]] = []
        self._lock = threading.RLock()
        self.launches = self.chunks = 0

    @property
    def busy(self) -> int:
        """Requests that have a slot."""
        return sum(request is not None for request in self._held)

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
        longer than the engine's max_length, and where as many requests wait as may.
        """
        model, vision = self.model, {}
        for name in VISION_INPUTS:
            if name in arguments:
                vision[name] = arguments.pop(name)
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
        out = Request(self, request, total, keep_cache)
        with self._lock:
            if not request.max_new_tokens:
                out.done = True
                return out
            ahead = len(self._queue) - (self.slots - self.busy)  # who wait for a slot to be free
            if self.waiting is not None and ahead >= self.waiting:
                raise InfiniteVLError(
                    f"all {self.slots} slots are taken and {max(ahead, 0)} requests wait",
                    "read or cancel some of them, or make the engine with more slots",
                )
            out._past = None if cache is None else jax.tree.map(lambda leaf: leaf, cache)
            out._begin = self._beginning(request, inputs.occurred(model.config.text.vocab_size))
            out._pieces = self._reader.pieces(inputs, 0 if start is None else int(start[0]))
            self._queue.append(out)
        return out

    def _beginning(self, request: Arguments, occurred: np.ndarray) -> Slots:
        """What the request's slot becomes when its prompt has been read."""
        ends = np.full((1, ENDS), -1, np.int32)
        ends[0, : len(request.ends)] = request.ends
        return Slots(
            token=np.zeros(1, np.int32),
            left=np.array([request.max_new_tokens], np.int32),
            made=np.zeros(1, np.int32),
            seed=np.array([[request.seed, 0]], np.uint32),
            ends=ends,
            occurred=occurred,
            settings=Settings.of([request.sampling]),
        )

    def cancel(self, request: Request) -> None:
        """End a request where it stands. Others go on undisturbed."""
        with self._lock:
            if request.done:
                return
            request.done = request.cancelled = True
            self._leave(request)

    def run(self) -> None:
        """Work until no request is left."""
        while self.step():
            pass

    def step(self) -> bool:
        """One round: requests join, one chunk of a prompt, one launch of decoding steps, and the
        tokens of the launch before. Returns whether there is anything left to do."""
        with self._lock, self.model.on_mesh():
            self._admit()
            arrived, self._flying = self._flying, []
            if self._reading:
                self._read_chunk(self._reading[0])
            decoding = [
                request if request is not None and request._pieces is None else None
                for request in self._held
            ]
            if any(request is not None for request in decoding):
                self._cache, self._slots, tokens = self._run.decode(
                    self.model.params, self._cache, self._slots
                )
                self.launches += 1
                self._flying.append((tokens, decoding))
            for tokens, requests in arrived:  # the device is at work meanwhile
                self._take_in(np.asarray(tokens), requests)
            return bool(self._queue or self._reading or self._flying or self.busy)

    def _free(self) -> int | None:
        return next((i for i, request in enumerate(self._held) if request is None), None)

    def _admit(self) -> None:
        while self._queue and (slot := self._free()) is not None:
            request = self._queue.popleft()
            request._slot, self._held[slot] = slot, request
            if request._past is not None:
                self._cache = self._run.put(self._cache, np.int32(slot), request._past)
            self._reading.append(request)

    def _read_chunk(self, request: Request) -> None:
        """Read the next piece of a prompt; after its last, the first token is known."""
        self._reading.rotate(-1)  # prompts take turns
        try:
            piece = next(request._pieces)
        except Exception as error:
            self._fail(request, error)
            return
        chunk = Chunk(
            piece.inputs,
            piece.vision,
            np.array([request._slot], np.int32),
            np.array([piece.first and request._past is None]),
            np.array([piece.last]),
            request._begin,
        )
        self._cache, self._slots, token = self._run.prefill(
            self.model.params, self._cache, self._slots, chunk
        )
        self.chunks += 1
        if piece.last:
            request._pieces = request._past = request._begin = None
            self._reading.remove(request)
            self._flying.append((token[None], [request]))

    def _take_in(self, tokens: np.ndarray, requests: list[Request | None]) -> None:
        """Hand tokens [steps, columns] to the requests whose columns they were then."""
        for row in tokens:
            for slot, request in enumerate(requests):
                if request is not None and not request.done and row[slot] >= 0:
                    self._hand_over(request, int(row[slot]))

    def _hand_over(self, request: Request, token: int) -> None:
        request.tokens.append(token)
        ended = token in request._arguments.ends
        full = len(request.tokens) == request._arguments.max_new_tokens
        if request._stopped is not None and not (ended or full):
            ended = request._stopped([token])[0]
        if ended or full:
            request.done = True
            self._leave(request)

    def _fail(self, request: Request, error: BaseException) -> None:
        request._error, request.done = error, True
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        for queue in (self._queue, self._reading):
            if request in queue:
                queue.remove(request)
        slot, request._slot = request._slot, None
        request._pieces = request._past = request._begin = None
        if slot is not None:
            if request._keep and not request.cancelled and request._error is None:
                request.cache = self._run.take(self._cache, np.int32(slot))
            self._slots = self._run.stop(self._slots, np.int32(slot))
            self._held[slot] = None
