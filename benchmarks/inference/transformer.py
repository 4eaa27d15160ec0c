"""The peer: the text model of `transformers`' Qwen2.5-VL, of equal size, in PyTorch.

Examples:

    # caches of 8,192, 60,000 and 360,000 tokens, as a CUDA graph and eager
    python -m benchmarks.inference.transformer

    # without a GPU, a tiny model, eager only
    python -m benchmarks.inference.transformer --size tiny

It has the decoder's width, MLP, heads, vocabulary and number of layers, with full attention in
every layer, a tied head, and random bf16 weights. A step is one token of one sequence: embedding,
decoder, head, and the likeliest token. Keys and values of the cache are random: the time does not
depend on them.

* `cuda graph`: a cache of fixed size, in which the token takes the last place; all of it is
  attended to, without a mask. One graph of several steps is replayed.
* `eager`: each operation is launched by itself, with `transformers`' DynamicCache, which is
  extended by each token.

Attention is flash-attn's if that package is installed, else PyTorch's scaled_dot_product_attention
with one backend (`--backend`); each line says which. Results go to the lines of
benchmarks.inference.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import inspect
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import cuda_graphs
from benchmarks.inference.sizes import SIZES, Size
from benchmarks.record import RESULTS, add_commit, record, versions
from benchmarks.timing import REPEATS, summary

TOKENS = 4  # of one graph, so that its launch is negligible
ATTENTION = (
    "one_token"  # the name by which transformers knows `attend`; one with "flash" would be loaded
)


def transformer(size: Size, lengths: list[int], backend: str, repeats: int) -> Iterator[dict]:
    """One line for each length and form."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = register_attention(backend, device)
    copy = copy_rate(size.copied, device)
    with torch.inference_mode():
        model = make_model(size, device)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        fixed = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch": 1,
            "attention": how,
        }
        forms = ("cuda graph", "eager") if device == "cuda" else ("eager",)
        for length in lengths:
            cache_bytes = cache_size(model, length)
            limit = (weights + cache_bytes) / copy * 1e3
            for form in forms:
                line = {"form": form, "context": length, **fixed}
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                try:
                    times = FORMS[form](model, length, repeats)
                except Exception as error:  # report it and measure the others
                    reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]
                    line |= {"failed": reason}
                else:
                    ms = statistics.median(times)
                    line |= {
                        "ms": summary(times),
                        "limit_ms": round(limit, 4),
                        "times_limit": round(ms / limit, 3),
                        "limit_GB": round((weights + cache_bytes) / 1e9, 3),
                    }
                line |= {"cache_bytes": cache_bytes, "copy_GB_s": round(copy / 1e9, 1)}
                if device == "cuda":
                    peak = torch.cuda.max_memory_allocated()
                    line |= {"device_peak_GB": round(peak / 1e9, 3)}
                yield line
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()


def make_model(size: Size, device: str):
    """`Qwen2_5_VLTextModel` with random weights and the sizes of our decoder."""
    import torch
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    text = size.config().text
    config = Qwen2_5_VLTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        rms_norm_eps=text.rms_norm_eps,
        max_position_embeddings=1 << 20,
        rope_theta=text.rope_theta,
        rope_scaling={"rope_type": "default", "mrope_section": list(text.mrope_section or ())},
        attn_implementation=ATTENTION,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Qwen2_5_VLTextModel(config).eval()
    finally:
        torch.set_default_dtype(before)


def register_attention(backend: str, device: str) -> str:
    """Let transformers attend by flash attention to the whole cache. Returns what does it."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AttentionInterface

    installed = importlib.util.find_spec("flash_attn") is not None and device == "cuda"
    chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def by_package(q, k, v, scale):
        from flash_attn import flash_attn_with_kvcache

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_with_kvcache(q, k, v, softmax_scale=scale)

    def by_torch(q, k, v, scale):
        # on a CPU PyTorch chooses
        with sdpa_kernel(chosen) if device == "cuda" else contextlib.nullcontext():
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, scale=scale, enable_gqa=True
            )
        return out.transpose(1, 2)

    run = by_package if installed else by_torch

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        assert query.shape[2] == 1 and attention_mask is None, "only one token is decoded here"
        return run(query, key, value, scaling), None

    AttentionInterface.register(ATTENTION, attend)
    if installed:
        return f"flash-attn {versions('flash-attn')['flash-attn']}"
    return f"torch scaled_dot_product_attention, {backend if device == 'cuda' else 'CPU'}"


class FixedCache:
    """Keys and values [1, heads, length, width] of each layer; each token takes the last place."""

    is_compileable = True

    def __init__(self, keys: list, values: list):
        self.keys, self.values = keys, values

    def update(self, key, value, layer: int, *_, **__):
        self.keys[layer][:, :, -1:].copy_(key)
        self.values[layer][:, :, -1:].copy_(value)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, *_) -> int:
        return self.keys[0].shape[2] - 1


def random_cache(model, length: int) -> tuple[list, list]:
    """Random keys and values of `length` tokens, by layer."""
    import torch

    config = model.config
    width = config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, length, width)

    def draw():
        return [
            torch.randn(shape, dtype=model.dtype, device=model.device)
            for _ in range(config.num_hidden_layers)
        ]

    return draw(), draw()


def cache_size(model, length: int) -> int:
    """Bytes of the keys and values of `length` tokens."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    return values * length * model.dtype.itemsize


def step(model, token, position, cache):
    """The token that follows `token` [1, 1] at `position` [3, 1, 1]."""
    return logits(model, token, position, cache).argmax(-1, keepdim=True)


def logits(model, token, position, cache):
    """Logits [1, vocab] after one token."""
    import torch

    out = model(
        input_ids=token,
        position_ids=position,
        attention_mask={"full_attention": None},
        use_cache=True,
        **{_cache_name(type(model)): cache},
    )
    return torch.nn.functional.linear(out.last_hidden_state[:, -1], model.embed_tokens.weight)


@functools.cache
def _cache_name(kind: type) -> str:
    """What this version of transformers calls the argument."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def by_graph(model, length: int, repeats: int) -> list[float]:
    """Milliseconds a token, one number for each replay of a graph of `TOKENS` tokens."""
    import torch

    cache = FixedCache(*random_cache(model, length))
    token = torch.ones((1, 1), dtype=torch.long, device=model.device)
    position = torch.full((3, 1, 1), length - 1, device=model.device)
    return cuda_graphs.milliseconds(
        lambda: token.copy_(step(model, token, position, cache)), TOKENS
    )


def eagerly(model, length: int, repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` tokens after two of warm-up; the cache grows by each."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    keys, values = random_cache(model, length - 1)
    for layer in range(len(keys)):
        cache.update(keys[layer], values[layer], layer)
        keys[layer] = values[layer] = None
    token = torch.ones((1, 1), dtype=torch.long, device=model.device)
    synchronise = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    times = []
    for i in range(repeats + 2):
        position = torch.full((3, 1, 1), length - 1 + i, device=model.device)
        synchronise()
        started = time.perf_counter()
        token = step(model, token, position, cache)
        synchronise()
        times.append((time.perf_counter() - started) * 1e3)
    assert cache.get_seq_length() == length - 1 + len(times)
    return times[2:]


FORMS: dict[str, Callable[..., list[float]]] = {"cuda graph": by_graph, "eager": eagerly}


def copy_rate(nbytes: int, device: str) -> float:
    """Bytes a second, read and written, of copies in device memory: the median of `REPEATS`."""
    import torch

    source = torch.zeros(nbytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for i in range(REPEATS + 2):
        synchronise()
        started = time.perf_counter()
        for _ in range(5):
            target.copy_(source)
        synchronise()
        if i >= 2:
            seconds.append((time.perf_counter() - started) / 5)
    return 2 * nbytes / statistics.median(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="4.4B", help="default: 4.4B")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the cache")
    parser.add_argument(
        "--backend", choices=("flash", "cudnn"), default="flash", help="default: flash"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed tokens of the eager form")
    parser.add_argument("--results", type=Path, default=RESULTS / "inference.jsonl")
    add_commit(parser)
    args = parser.parse_args()
    # JAX only names the device here
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return measure(args)


def measure(args: argparse.Namespace) -> int:
    """Record each line. Returns 1 if a case failed."""
    size, failed = SIZES[args.size], 0
    case = {"part": "transformer", "model": size.name}
    for line in transformer(size, args.lengths or list(size.peer), args.backend, args.repeats):
        if "failed" in line:
            print(f"{line['form']}, {line['context']} tokens fails: {line['failed']}", flush=True)
            failed = 1
            continue
        used = versions("torch", "transformers")
        record("inference", args.commit, case | line | used, args.results)
    return failed


if __name__ == "__main__":
    sys.exit(main())
