"""infinitevl_jax.json and the other files of one of our folders, loaded, inspected and exported."""

import json
from pathlib import Path
from random import Random

from torch_folders import read_folder

from infinitevl_jax.checkpoints import export_folder, inspect_folder

from ..case import Case, Place
from ..content import mutate_bytes, mutate_file
from ..values import mutate
from .folders import as_torch, different, ours, parameters, tensors

MANIFEST = "infinitevl_jax.json"
KEYS = (
    "spelling",
    "tie_word_embeddings",
    "files",
    "index_metadata",
    "adapters",
    "format",
    "name",
    "metadata",
    "tensors",
)
NAMES = [
    "../../home/.profile",
    "/tmp/x.safetensors",
    "../evil.safetensors",
    "x",
    "config.json",
    "a/b.safetensors",
    ".safetensors",
]
NAMES += [
    "model.safetensors",
    "\0.safetensors",
    "é.safetensors",
    "x" * 300 + ".safetensors",
    "..safetensors",
    "infinitevl_jax.json",
]
DTYPES = ["I64", "I8", "BOOL", "F8_E4M3", "F16", "F32", "BF16", "F64", "bf16", "", None, 3, []]


def make(rng: Random, place: Place) -> Case:
    folder = place.copy("ours", ours)
    label = mutated(rng, folder, place.work / "outside")
    use = rng.choice([_load, _load, _export, _export, _inspect])
    return use(label, folder, place.out)


def mutated(rng: Random, folder: Path, outside: Path) -> str:
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    kind = rng.choice(
        ["json"] * 5
        + ["names"] * 2
        + ["dtypes"] * 3
        + ["bytes", "file", "stored", "stored", "twice"]
    )
    file = rng.randrange(len(content["files"]))
    if kind == "json":
        focus = [(key,) for key in content] + [
            ("files", file, key) for key in ("name", "metadata", "tensors")
        ]
        focus += [
            ("files", file, "tensors", 0),
            ("files", file, "tensors", 0, 0),
            ("files", file, "tensors", 0, 1),
        ]
        changed = mutate(rng, content, focus=focus, keys=KEYS)
        path.write_bytes(changed.data)
        return changed.label
    if kind == "names":
        content["files"][file]["name"] = name = rng.choice(
            [*NAMES, content["files"][file - 1]["name"]]
        )
        path.write_text(json.dumps(content))
        return f"files.{file}.name = {name!r}"
    if kind == "dtypes":
        tensor = rng.choice(content["files"][file]["tensors"])
        tensor[1] = rng.choice(DTYPES)
        path.write_text(json.dumps(content))
        return f"dtype of {tensor[0]} = {tensor[1]}"
    if kind == "twice":
        tensor = rng.choice(content["files"][file]["tensors"])
        rng.choice(content["files"])["tensors"].append([*tensor, *rng.choice([[], [1]])])
        path.write_text(json.dumps(content))
        return f"{tensor[0]} twice"
    if kind == "bytes":
        data, label = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return f"manifest: {label}"
    if kind == "file":
        return mutate_file(
            rng,
            rng.choice(
                [
                    path,
                    folder / "config.json",
                    folder / "params",
                    folder / "checksums" / "params.0.json",
                ]
            ),
            outside,
        )
    files = [p for part in ("params", "checksums") for p in (folder / part).rglob("*")]
    stored = rng.choice(sorted(p for p in files if p.is_file()))
    if stored.suffix == ".json" and rng.random() < 0.5:
        changed = mutate(rng, json.loads(stored.read_text()))
        stored.write_bytes(changed.data)
        return f"checksums: {changed.label}"
    data = stored.read_bytes()
    place = rng.randrange(len(data) + 1)
    ways = {
        "cut": data[:place],
        "empty": b"",
        "a bit": data[:place] + bytes(b ^ 1 for b in data[place : place + 1]) + data[place + 1 :],
    }
    ways["removed"] = None
    label = rng.choice(list(ways))
    stored.unlink() if ways[label] is None else stored.write_bytes(ways[label])
    name = stored.name if len(stored.name) < 30 else "data"
    return f"params/{name}: {label} at {place} of {len(data)}"


def _load(label: str, folder: Path, out: Path) -> Case:
    def check(found):
        config, params = found
        return different(
            as_torch(params, config), {n: v for n, v in tensors().items() if n != "lm_head.weight"}
        )

    return Case(f"load; {label}", lambda: parameters(folder), check)


def _export(label: str, folder: Path, out: Path) -> Case:
    def check(_):
        found = {
            n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): v
            for n, v in read_folder(out).items()
        }
        wanted = {name: ("BF16", value.shape, value.tobytes()) for name, value in tensors().items()}
        if found.keys() - {"lm_head.weight"} != wanted.keys():
            return f"exported other tensors: {sorted(found.keys() ^ wanted.keys())[:3]}"
        wrong = [name for name in wanted if found[name] != wanted[name]]
        return f"exported other numbers: {wrong[:3]}" if wrong else ""

    return Case(f"export; {label}", lambda: export_folder(folder, out), check)


def _inspect(label: str, folder: Path, out: Path) -> Case:
    count = sum(value.size for value in tensors().values())

    def check(found):
        return (
            ""
            if found.parameters == count and str(found)
            else f"counts {found.parameters} parameters, there are {count}"
        )

    return Case(f"inspect; {label}", lambda: inspect_folder(folder), check)
