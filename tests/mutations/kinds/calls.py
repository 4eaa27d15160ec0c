"""Arguments of the calls that people write: the model, generate, the processor."""

import functools
from random import Random
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from tiny_folder import tiny_config, tiny_model

from infinitevl_jax import Processor, Sampling

from ..case import Case, Place
from ..values import BAD
from . import processors
from .messages import odd_objects, processor
from .processors import picture

SAY = [
    {
        "role": "user",
        "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "what is it?"}],
    }
]
FILM = [
    {
        "role": "user",
        "content": [{"type": "video", "video": [picture()] * 4}, {"type": "text", "text": "x"}],
    }
]
INTEGERS = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw", "position_ids")
COUNTS = [
    0,
    1,
    3,
    -1,
    2**31,
    2**63,
    2.0,
    2.5,
    float("nan"),
    True,
    "3",
    None,
    [3],
    np.int64(3),
    jnp.int32(2),
]
NUMBERS = [
    0,
    0.0,
    0.7,
    1,
    1.0,
    -1,
    1e308,
    1e-30,
    float("nan"),
    float("inf"),
    "0.7",
    None,
    [0.7],
    np.float32(0.7),
    True,
    2**70,
]


@functools.cache
def model():
    return tiny_model(tiny_config())


@functools.cache
def base(film: bool) -> np.ndarray:
    """Logits of the unchanged batch."""
    return np.asarray(model()(**_batch(film)).logits)


_BATCHES: dict[bool, dict] = {}


def _batch(film: bool) -> dict[str, Any]:
    return dict(_BATCHES[film])


def make(rng: Random, place: Place) -> Case:
    if not _BATCHES:
        words = processor(place)
        _BATCHES.update({False: words(SAY), True: words(FILM)})
        base(False), base(True)
    return rng.choice(
        [_model] * 6 + [_generate] * 3 + [_processor, _processor, _options, _options, _sampling]
    )(rng, place)


def _model(rng: Random, place: Place) -> Case:
    film = rng.random() < 0.5
    batch = _batch(film)
    width = batch["input_ids"].shape[1]
    batch["position_ids"] = None
    name = rng.choice([n for n in batch] + ["position_ids"])
    value = (
        np.broadcast_to(np.arange(width, dtype=np.int32), (3, 1, width)).copy()
        if name == "position_ids"
        else batch[name]
    )
    batch[name], label, meaning = changed(rng, value, name)

    def check(found):
        logits = np.asarray(found.logits)
        if (
            logits.shape[-1] != 272
            or logits.shape[:2] != np.shape(batch["input_ids"])[:2]
            or not np.isfinite(logits).all()
        ):
            return f"logits that are none: {logits.shape}"
        if meaning == "refuse":
            return f"accepted {name}: {label}"
        return (
            "other logits"
            if meaning == "same"
            and name != "position_ids"
            and not np.array_equal(logits, base(film))
            else ""
        )

    return Case(f"model: {name} {label}", lambda: model()(**batch), check)


def changed(rng: Random, value: np.ndarray, name: str) -> tuple[Any, str, str]:
    """Another value for an array, what was done, and what is to come of it.

    "same", "refuse" or "any".
    """
    way = rng.choice(["cast", "cast", "odd", "odd", "shape", "entry", "entry"])
    if way == "cast":
        casts = {
            "list": value.tolist(), "int64": value.astype(np.int64), "jax": jnp.asarray(value),
            "torch": torch.from_numpy(value.copy()), "float64": value.astype(np.float64),
            "object": value.astype(object), "fortran": np.asfortranarray(value),
            "big-endian": value.astype(value.dtype.newbyteorder(">")),
            "torch, gradient": torch.from_numpy(value.astype(np.float32)).requires_grad_(),
            "read-only": np.broadcast_to(value, value.shape), "strings": value.astype(str),
            "tuple": tuple(map(tuple, value)) if value.ndim == 2 else tuple(value),
        }  # fmt: skip
        label = rng.choice(list(casts))
        exact = (
            np.issubdtype(value.dtype, np.integer)
            if label not in ("float64", "strings", "object", "torch, gradient")
            else False
        )
        exact = exact or label in ("jax", "torch", "fortran", "big-endian", "read-only")
        return casts[label], label, "refuse" if label == "strings" else "same" if exact else "any"
    if way == "odd":
        odd = rng.choice([*BAD, *odd_objects()])
        return (
            odd,
            f"= {odd!r:.60}",
            "any" if odd is None or _empty(odd) else "refuse" if not _numbers(odd, name) else "any",
        )
    if way == "shape":
        shapes = [
            value.T,
            value[None],
            value[:0],
            value[..., :-1],
            np.concatenate([value, value]),
            value.reshape(-1),
            np.concatenate([value, value], -1),
        ]
        other = rng.choice(shapes)
        return other, f"of shape {other.shape} for {value.shape}", "any"
    integer = np.issubdtype(value.dtype, np.integer)
    new = rng.choice(
        [-1, 2**31, 2**40, 10**6, float("nan"), 0.5]
        if integer
        else [float("nan"), float("inf"), -1e30, 1e38, -1.0]
    )
    other = (
        value.astype(np.float64 if isinstance(new, float) else np.int64)
        if integer
        else value.copy()
    )
    other.reshape(-1)[rng.randrange(value.size)] = new
    pixels = name.startswith("pixel")
    refused = not np.isfinite(new) or (
        not pixels
        and name != "attention_mask"
        and (new < 0 or new > 2**31 - 1 or (integer and new == 0.5))
    )
    return other, f"with {new}", "refuse" if refused else "any"


def _empty(value: Any) -> bool:
    """Whether it is an empty list or array, which stands for none."""
    return isinstance(value, list | tuple | np.ndarray) and not len(value)


def _numbers(value: Any, name: str) -> bool:
    """Whether it is made of whole numbers or, for seconds, of any that may be some."""
    try:
        found = np.asarray(value)
        seconds = name == "second_per_grid_ts" and found.dtype.kind == "f"
        return found.dtype.kind in "iu" or (
            seconds and bool(np.all((found >= 0) & (found < np.inf)))
        )
    except (ValueError, TypeError, OverflowError, RuntimeError):
        return False


def _generate(rng: Random, place: Place) -> Case:
    batch = _batch(False)
    settings: dict[str, Any] = {"max_new_tokens": 3}
    name = rng.choice(
        [
            "max_new_tokens",
            "max_new_tokens",
            "seed",
            "eos_token_ids",
            "sampling",
            "zzz",
            "input_ids",
            "attention_mask",
            "pixel_values",
        ]
    )
    if name in batch:
        batch[name], label, _ = changed(rng, batch[name], name)
        label = f"{name} {label}"
    else:
        values = (
            COUNTS
            if name in ("max_new_tokens", "seed")
            else [
                [],
                [1, 2],
                5,
                -1,
                "x",
                None,
                [[1]],
                2**40,
                {1},
                1.5,
                [None],
                Sampling(0.5),
                np.array([3]),
            ]
        )
        settings[name] = rng.choice(
            [v for v in values if not (name == "max_new_tokens" and isinstance(v, int) and v > 100)]
        )
        label = f"{name} = {settings[name]!r:.60}"

    def check(found):
        wanted = settings["max_new_tokens"]
        wanted = 2**31 if wanted is None else wanted  # as if it were not given
        if isinstance(wanted, bool) or not isinstance(wanted, int | np.integer | jnp.ndarray):
            return f"accepted max_new_tokens {wanted!r}"
        if (
            found.dtype != np.int32
            or found.ndim != 2
            or found.shape[1] > max(int(wanted), 0)
            or (found < 0).any()
            or (found >= 272).any()
        ):
            return f"tokens that are none: {found.dtype} {found.shape}"
        unknown = name == "zzz" and settings[name] is not None  # None is as good as absent
        return f"accepted {label}" if unknown else ""

    return Case(f"generate: {label}", lambda: model().generate(**batch, **settings), check)


def _processor(rng: Random, place: Place) -> Case:
    words = processor(place)
    if rng.random() < 0.5:
        name, values = rng.choice(
            [("turns", ["last", "all", "first", None, 1, ["all"]]), ("max_length", COUNTS)]
        )
        value = rng.choice(values)
        dialogue = [*SAY, {"role": "assistant", "content": "a cat"}]
        call = lambda: words.encode_example(dialogue, **{name: value})  # noqa: E731
    else:
        name, values = rng.choice(
            [
                ("padding_side", ["left", "right", "up", None, 1, ["left"]]),
                ("max_length", COUNTS),
                ("add_generation_prompt", [True, False, None, "no", 2]),
            ]
        )
        value = rng.choice(values)
        call = lambda: words([SAY, FILM], **{name: value})  # noqa: E731

    def check(found):
        length = np.shape(found["input_ids"])[-1]
        good = {"turns": ("last", "all"), "padding_side": ("left", "right", None)}
        if name in good and not any(value is g or value == g for g in good[name]):
            return f"accepted {name} = {value!r}"
        limited = name == "max_length" and value is not None
        if limited and (
            isinstance(value, bool)
            or not isinstance(value, int | np.integer | jnp.ndarray)
            or int(value) < length
        ):
            return f"accepted max_length = {value!r} for {length} tokens"
        return "" if np.isfinite(found["pixel_values"]).all() else "NaN in pictures"

    return Case(f"processor: {name} = {value!r:.60}", call, check)


def _options(rng: Random, place: Place) -> Case:
    """Options of Processor.from_pretrained and of Processor itself."""
    folder = place.original("bytes-only", processors.bytes_only)
    names = [
        "min_pixels",
        "max_pixels",
        "video_min_pixels",
        "video_max_pixels",
        "video_total_pixels",
        "fps",
        "min_frames",
        "max_frames",
        "max_length",
        "padding_side",
    ]
    name = rng.choice(names)
    value = rng.choice([*COUNTS, *NUMBERS, 64, 128, 256, 1024, 2**40, "left", "right"])

    def action():
        words = Processor.from_pretrained(folder, **{name: value})
        return words(FILM), words(SAY), words

    def check(found):
        if value is not None and (
            isinstance(value, bool | list) or (isinstance(value, str) and name != "padding_side")
        ):
            return f"accepted {name} = {value!r}"
        if value is not None and name != "padding_side" and not 0 < float(value) < np.inf:
            return f"accepted {name} = {value!r}"
        batches = [
            v for batch in found[:2] for k, v in batch.items() if k.startswith(("pixel", "second"))
        ]
        return "" if all(np.isfinite(v).all() for v in batches) else "NaN in pictures"

    return Case(f"from_pretrained: {name} = {value!r:.60}", action, check)


def _sampling(rng: Random, place: Place) -> Case:
    name = rng.choice(["temperature", "top_k", "top_p"])
    settings: dict[str, Any] = {"temperature": 0.7, name: rng.choice(NUMBERS + COUNTS)}
    batch = _batch(False)
    value = settings[name]

    def check(found):
        if isinstance(value, bool | str | list) or value is None or not np.isfinite(float(value)):
            return f"accepted {name} = {value!r}"
        return "" if ((found >= 0) & (found < 272)).all() else "tokens that are none"

    return Case(
        f"Sampling({name}={value!r:.40})",
        lambda: model().generate(**batch, max_new_tokens=2, sampling=Sampling(**settings)),
        check,
    )
