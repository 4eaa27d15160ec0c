"""From inputs to new tokens: the prompt in chunks, then one token a step."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from infinitevl_jax.inputs.model_inputs import ModelInputs, chunks
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.nn.params import Params
from infinitevl_jax.serve.generation import Request
from infinitevl_jax.serve.programs import Programs, on_mesh

PREFILL_CHUNK = 8192  # tokens of a prompt that go through the decoder at once


def prefill(
    run: Programs, params: Params, inputs: ModelInputs, cache: Cache
) -> tuple[Array, Cache]:
    """Logits [batch, vocab] of every row's last token, and the new cache."""
    embeds = None if inputs.patches is None else run.encode(params, inputs.patches)
    last = None
    for part in chunks(inputs.decoder, PREFILL_CHUNK):
        ending = np.maximum((part.token_index >= 0).sum(1, keepdims=True) - 1, 0).astype(np.int32)
        logits, cache, _ = run.forward(params, part, embeds, cache, ending)
        logits = logits[:, 0]
        # a row that ended in an earlier chunk keeps the logits it had
        last = logits if last is None else jnp.where(part.token_index[:, :1] >= 0, logits, last)
    assert last is not None, "a prompt has tokens"
    return last, cache


def decode(
    run: Programs,
    params: Params,
    logits: Array,
    cache: Cache,
    request: Request,
    occurred: np.ndarray | None,
    stopped: Callable[[np.ndarray], list[bool]] | None,
    mesh: Mesh | None,
) -> Iterator[tuple[np.ndarray, Cache]]:
    """Yield [batch] token ids as they are made, each with the cache of that moment.

    Args:
      logits: [batch, vocab] of every row's last token.
      cache: has room for the request's tokens. Each step uses up the one before.
      occurred: [batch, vocab] bool, what repetition_penalty counts; None without a penalty.
      stopped: tells which rows a step's tokens [batch] end, beside `request.ends`.
    """
    sampling, ends = request.sampling, np.asarray(request.ends, np.int32)
    key, penalised = jax.random.key(request.seed), sampling.repetition_penalty != 1
    with on_mesh(mesh):
        seen = jnp.asarray(occurred) if penalised else None
        token = run.choose(logits, key, sampling=sampling, occurred=seen)
        device_ends = jnp.asarray(ends)
    done = np.zeros(token.shape, bool)
    for i in range(1, request.max_new_tokens + 1):
        following = None
        if i < request.max_new_tokens:
            # the device works on the next token while this one is looked at
            with on_mesh(mesh):
                seen = run.mark(seen, token) if penalised else None
                following, cache = run.step(
                    params,
                    token,
                    cache,
                    jax.random.fold_in(key, i),
                    sampling=sampling,
                    ends=device_ends,
                    occurred=seen,
                )
        now = np.asarray(token)
        yield np.where(done, request.pad, now).astype(np.int32), cache
        done |= np.isin(now, ends)
        if stopped is not None:
            done |= stopped(now)
        if done.all():
            return
        token = following
