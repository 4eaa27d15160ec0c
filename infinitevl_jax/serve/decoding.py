"""Prompts of a batch in chunks, then its new tokens: all rows go side by side, on the programs that
an engine runs its slots with."""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from infinitevl_jax.inputs.model_inputs import ModelInputs, chunks
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.nn.fused_params import FusedParams
from infinitevl_jax.serve.encoding import GroupEncoder
from infinitevl_jax.serve.generation import Request
from infinitevl_jax.serve.programs import Programs, on_mesh
from infinitevl_jax.serve.slots import Slots

PREFILL_CHUNK = 8192  # tokens of a prompt that go through the decoder at once


def prefill(
    run: Programs, params: FusedParams, inputs: ModelInputs, cache: Cache, encoder: GroupEncoder
) -> tuple[Array, Cache]:
    """Logits [batch, vocab] of every row's last token, and the new cache."""
    last = None
    for part, embeds in encoder(inputs.patches, chunks(inputs.decoder, PREFILL_CHUNK)):
        ending = np.maximum((part.token_index >= 0).sum(1, keepdims=True) - 1, 0).astype(np.int32)
        logits, cache, _ = run.forward(params, part, embeds, cache, ending)
        logits = logits[:, 0]
        # a row that ended in an earlier chunk keeps the logits it had
        last = logits if last is None else jnp.where(part.token_index[:, :1] >= 0, logits, last)
    assert last is not None, "a prompt has tokens"
    return last, cache


def decode(
    run: Programs,
    params: FusedParams,
    logits: Array,
    cache: Cache,
    request: Request,
    occurred: np.ndarray | None,
    stopped: Callable[[np.ndarray], list[bool]] | None,
    mesh: Mesh | None,
    steps: int,
) -> Iterator[tuple[np.ndarray, Cache]]:
    """Yield [batch] token ids, each with the cache after its launch.

    Args:
      logits: [batch, vocab] of every row's last token.
      cache: has room for the request's tokens. Each launch uses up the one before.
      occurred: [batch, vocab] bool, what repetition_penalty counts; None for nothing.
      stopped: tells which rows a step's tokens [batch] end, beside `request.ends`.
      steps: of a launch. With 1, tokens come as they are made.
    """
    if not request.max_new_tokens:
        return
    with on_mesh(mesh):
        begun = Slots.beginning(request, len(logits), occurred)
        slots, token = run.begin(begun, logits, sampled=request.sampled)
    tokens, count, left = token[None], 1, request.max_new_tokens - 1
    done = np.zeros(len(logits), bool)
    while True:
        following, more = None, min(steps, left)
        if more:
            # the device works on the next tokens while these are looked at
            with on_mesh(mesh):
                cache, slots, following = run.decode(
                    params, cache, slots, steps=steps, sampled=request.sampled
                )
        for now in np.asarray(tokens)[:count]:
            yield np.where(done, request.pad, now).astype(np.int32), cache
            done |= np.isin(now, request.ends)
            if stopped is not None:
                done |= stopped(now)
            if done.all():
                return
        if following is None:
            return
        tokens, count, left = following, more, left - more
