"""Weight files.

The header's JSON, its length, the bytes behind it, and other things in the file's place.
"""

import json
import struct
from pathlib import Path
from random import Random

import numpy as np

from ..case import Case, Place
from ..content import mutate_bytes, mutate_file
from ..values import Raw, dump, mutate
from .folders import as_torch, different, one_file, parameters, read_independently, three_files

KEYS = ("__metadata__", "dtype", "shape", "data_offsets")


def split(data: bytes) -> tuple[dict, bytes]:
    """Header and tensor bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: bytes, data: bytes, pad: bytes = b" ") -> bytes:
    header += pad * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def make(rng: Random, place: Place) -> Case:
    several = rng.random() < 0.3
    folder = place.copy("three-files", three_files) if several else place.copy("one-file", one_file)
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    label = mutate_weights(rng, path, place.work / "outside")
    return Case(
        f"{path.name}: {label}",
        lambda: parameters(folder),
        lambda found: as_the_library_says(found, folder),
    )


def mutate_weights(rng: Random, path: Path, outside: Path) -> str:
    """One mutation of a safetensors file; what was done."""
    data = path.read_bytes()
    kind = rng.choice(
        ["header"] * 5 + ["bytes"] * 2 + ["known", "known", "numbers", "file", "many"]
    )
    if kind == "file":
        return mutate_file(rng, path, outside)
    if kind == "bytes":
        data, label = mutate_bytes(rng, data, head=512)
        path.write_bytes(data)
        return label
    header, content = split(data)
    if kind == "numbers":  # NaN, infinity and single bits in the weights
        values = np.frombuffer(content, np.uint8).copy()
        at = rng.randrange(0, len(values) - 4, 4)
        bits = rng.choice(
            [
                b"\0\0\xc0\x7f",
                b"\0\0\x80\xff",
                b"\x80\x7f\x80\x7f",
                b"\xff\xff\xff\xff",
                bytes([values[at] ^ 1]),
            ]
        )
        values[at : at + len(bits)] = list(bits)
        path.write_bytes(join(dump(header), values.tobytes()))
        return f"{bits!r} at byte {at} of the tensors"
    if kind == "many":
        count = rng.choice([1000, 30_000])
        more = ",".join(
            f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[{len(content)},{len(content)}]}}'
            for i in range(count)
        )
        last = rng.choice(["", ',"t0":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'])
        path.write_bytes(join(dump(header)[:-1] + b"," + (more + last).encode() + b"}", content))
        return f"{count} empty tensors more{', one twice' if last else ''}"
    if kind == "known":
        label, header = known(rng, header, len(content))
        path.write_bytes(join(dump(header), content))
        return label
    names = [n for n in header if n != "__metadata__"]
    focus = [(n, key) for n in rng.sample(names, 3) for key in KEYS[1:]] + [("__metadata__",)]
    changed = mutate(rng, header, focus=focus, keys=KEYS)
    path.write_bytes(join(changed.data, content, rng.choice([b" ", b" ", b" ", b"\0", b"\n"])))
    return changed.label


def known(rng: Random, header: dict, size: int) -> tuple[str, dict]:
    """Headers that are well formed and mean something else."""
    names = [n for n in header if n != "__metadata__"]
    one, other = (header[n] for n in rng.sample(names, 2))
    name = rng.choice(names)
    begin, end = one["data_offsets"]
    kind = rng.choice(
        [
            "metadata null",
            "overlap",
            "beyond",
            "backwards",
            "dtype",
            "turned",
            "shape",
            "negative",
            "float",
            "live",
        ]
    )
    if kind == "metadata null":
        return kind, {**header, "__metadata__": None}
    if kind == "live":
        spelled = {
            (
                "model.language_model." + n.removeprefix("model.")
                if n == name and n.startswith("model.")
                else n
            ): e
            for n, e in header.items()
        }
        return f"{name} in the live spelling", spelled
    change = {
        "overlap": {"data_offsets": other["data_offsets"]},
        "beyond": {"data_offsets": [begin + size, end + size]},
        "backwards": {"data_offsets": [end, begin]},
        "dtype": {
            "dtype": rng.choice(["F16", "I8", "F64", "BOOL", "F8_E4M3", "bf16", "C64", "F4", ""])
        },
        "turned": {"shape": one["shape"][::-1]},
        "shape": {
            "shape": rng.choice(
                [[*one["shape"], 1], [1, *one["shape"]], [], [-1, -1], [2**62, 4], one["shape"][:1]]
            )
        },
        "negative": {"data_offsets": [-8, end]},
        "float": {"data_offsets": [float(begin), Raw(f"{end}.0")]},
    }[kind]
    one.update(change)
    return f"{kind}: {change}", header


def as_the_library_says(found, folder: Path) -> str:
    """Right where the library safetensors reads the same bits out of the files that lie there."""
    config, params = found
    try:
        wanted = read_independently(folder)
    except Exception as error:
        return f"accepted what safetensors refuses: {error}"
    if any(not np.isfinite(value.astype(np.float32)).all() for value in wanted.values()):
        return "NaN or infinity in weights was accepted"
    return different(
        as_torch(params, config), {n: v for n, v in wanted.items() if n != "lm_head.weight"}
    )
