"""model.safetensors.index.json, and the shards that it names."""

import json
from random import Random

from ..case import Case, Place
from ..content import mutate_bytes, mutate_file
from ..values import mutate
from .folders import parameters, three_files
from .safetensors import as_the_library_says

INDEX = "model.safetensors.index.json"
NAMES = [
    "../x.safetensors",
    "/etc/passwd",
    "model-00001-of-00003.safetensors",
    "no.safetensors",
    "config.json",
    "",
    ".",
    "a/b.safetensors",
]


def make(rng: Random, place: Place) -> Case:
    folder = place.copy("three-files", three_files)
    path = folder / INDEX
    content = json.loads(path.read_text())
    kind = rng.choice(
        ["json"] * 4 + ["names", "names", "bytes", "file", "renamed", "no index", "links"]
    )
    if kind == "json":
        changed = mutate(
            rng,
            content,
            focus=[("metadata",), ("weight_map",), ("metadata", "total_size")],
            keys=("format", "weight_map"),
        )
        path.write_bytes(changed.data)
        label = changed.label
    elif kind == "names":
        name, file = rng.choice(sorted(content["weight_map"])), rng.choice(NAMES)
        content["weight_map"][name] = file
        path.write_text(json.dumps(content))
        label = f"{name} in {file!r}"
    elif kind == "bytes":
        data, label = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
    elif kind == "file":
        label = mutate_file(rng, rng.choice(sorted(folder.glob("model*"))), place.work / "outside")
    elif kind == "links":
        shard = rng.choice(sorted(folder.glob("*.safetensors")))
        target = rng.choice(["../outside.safetensors", shard.name, "."])
        shard.rename(place.work / "outside.safetensors")
        shard.symlink_to(target)
        label = f"{shard.name} -> {target}"
    else:
        path.unlink()
        label = kind
        if kind == "renamed":
            shard = rng.choice(sorted(folder.glob("*.safetensors")))
            name = rng.choice(
                [
                    "model-00001-of-999999999",
                    "model-00000-of-00003",
                    "model-1-of-3",
                    "model-x",
                    "model-00004-of-00003",
                ]
            )
            shard.rename(shard.with_name(name + ".safetensors"))
            label = f"{shard.name} is called {name}"
    return Case(
        f"{INDEX}: {label}",
        lambda: parameters(folder),
        lambda found: as_the_library_says(found, folder),
    )
