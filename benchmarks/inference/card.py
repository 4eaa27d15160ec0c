"""What the card can do: its copy rate and its rate of matrix products, measured in this process,
and the limits of a piece of work computed from them."""

import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import REPEATS, repeated
from benchmarks.train_flops import causal_pairs, step_flops
from infinitevl_jax.config.model import SLIDING, ModelConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.inputs.frame import Frame
from infinitevl_jax.inputs.model_inputs import ModelInputs
from infinitevl_jax.nn.params import cache_spec, parameters
from pallas_kernels.attention import KVCache


class Card(NamedTuple):
    """Rates of one device.

    Attributes:
      copy: bytes a second, read and written. products: FLOP a second of large bf16 products.
    """

    copy: float
    products: float

    def beside(self, milliseconds: float, nbytes: float, flops: float = 0.0) -> dict:
        """The limit of work that moves `nbytes` and computes `flops`, and the time in limits."""
        limit = max(nbytes / self.copy, flops / self.products if flops else 0.0) * 1e3
        return {
            "limit_ms": round(limit, 4),
            "times_limit": round(milliseconds / limit, 3),
            "limit_GB": round(nbytes / 1e9, 3),
            **({"limit_TFLOP": round(flops / 1e12, 3)} if flops else {}),
        }

    def figures(self) -> dict:
        """Both rates for a record."""
        return {
            "copy_GB_s": round(self.copy / 1e9, 1),
            "products_TFLOP_s": round(self.products / 1e12, 2),
        }


def measure_card(nbytes: int, product: tuple[int, int, int]) -> Card:
    """Measure this process's device.

    Args:
      nbytes: size of the array that is copied.
      product: m, k, n of [m, k] x [k, n].
    """
    m, k, n = product
    return Card(copy_rate(nbytes), product_rate(m, k, n))


def copy_rate(nbytes: int, calls: int = 5) -> float:
    """Bytes a second, read and written, of copies of an array from device memory to device memory.

    The median of `REPEATS` times `calls` copies.
    """
    source = jnp.arange(nbytes // 4, dtype=jnp.int32)
    copy = jax.jit(jnp.copy)
    seconds = []
    for i in range(REPEATS + 2):
        started = time.perf_counter()
        for _ in range(calls):
            out = copy(source)
        jax.block_until_ready(out)
        if i >= 2:
            seconds.append((time.perf_counter() - started) / calls)
        assert out.unsafe_buffer_pointer() != source.unsafe_buffer_pointer(), "nothing was copied"
    return 2 * source.nbytes / statistics.median(seconds)


def product_rate(m: int, k: int, n: int, calls: int = 10) -> float:
    """FLOP a second of [m, k] x [k, n] and [m, n] x [n, k] in turn, in bf16: an MLP's products."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, up, down = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((m, k), (k, n), (n, k)), strict=True)
    )
    run = repeated(lambda x, up, down: (((x @ up) @ down) * 1e-3).astype(x.dtype), calls)
    jax.block_until_ready(run(x, up, down))
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(run(x, up, down))
        seconds.append(time.perf_counter() - started)
    return 4.0 * m * k * n * calls / statistics.median(seconds)


def decode_bytes(config: ModelConfig, batch: int, context: int, dtype) -> dict[str, int]:
    """Bytes that one decoding step has to move.

    weights: the decoder and its head, each read once; neither the tower nor an untied table.
    cache: the keys and values of the window that `context` tokens fill are read; all other state
      is read and written.
    """
    known, width = parameters(config, scanned=False), jnp.dtype(dtype).itemsize
    unread = ("visual.",) if config.text.tie_word_embeddings else ("visual.", "embed_tokens.")
    weights = sum(p.size for name, p in known.items() if not name.startswith(unread)) * width
    cache = 0
    for state in cache_spec(config, 1, None, dtype).layers:
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        if isinstance(state, KVCache):
            slots = state.k.shape[1]
            cache += nbytes * min(context, slots) // slots
        else:
            cache += 2 * nbytes
    return {"weights": weights, "cache": batch * cache}


def read_flops(config: ModelConfig, inputs: ModelInputs, past: int = 0) -> float:
    """FLOPs to read one row of tokens, tower included, with logits of the last token alone.

    past: tokens before them; keys of the window behind each token count too.
    """
    patches = inputs.patches
    if isinstance(patches, Frame):
        patches = patches.layout
    counted = step_flops(config, [], TrainBatch(patches, None, inputs.decoder, None, None, None))
    text = config.text
    tokens = int((np.asarray(inputs.decoder.token_index) >= 0).sum())
    before = causal_pairs(past + tokens, text.sliding_window)
    pairs = before - causal_pairs(past, text.sliding_window)
    more = pairs - causal_pairs(tokens, text.sliding_window)
    windows = text.layer_types.count(SLIDING)
    attention = 4.0 * text.head_dim * text.num_attention_heads * more * windows
    head = 2.0 * text.vocab_size * text.hidden_size
    return sum(counted.values()) - counted["head"] + head + attention
