"""Destinations that are taken or full, and our own folders when they are damaged."""

import contextlib
import errno
import json
import resource
import shutil
import signal
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from failing import config, fails, text, tree
from torch_folders import BF16, hybrid_folder, hybrid_tensors, read_folder, write_folder
from typer.testing import CliRunner

import infinitevl_jax.checkpoints.importer as importer
from infinitevl_jax.checkpoints import (
    export_folder,
    import_folder,
    inspect_folder,
    load_params,
    save_params,
)
from infinitevl_jax.checkpoints.manifest import FORMAT
from infinitevl_jax.cli import app
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.sharding import make_mesh, parameter_shardings


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Intact folders to copy: Hugging Face's and ours."""
    root = tmp_path_factory.mktemp("good")
    import_folder(hybrid_folder(root / "hf"), root / "ours")
    return root


def test_destination_is_not_empty(tmp_path, good):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "thesis.txt").write_text("mine")
    for action in (import_folder, export_folder):
        src = good / ("hf" if action is import_folder else "ours")
        fails(
            tmp_path,
            lambda action=action, src=src: action(src, tmp_path / "dst"),
            str(tmp_path / "dst"),
            "--overwrite",
        )
        # Overwriting replaces checkpoints, nothing else.
        fails(
            tmp_path,
            lambda action=action, src=src: action(src, tmp_path / "dst", overwrite=True),
            "not a checkpoint folder",
        )


def test_destination_is_a_file(tmp_path, good):
    (tmp_path / "dst").write_text("mine")
    fails(
        tmp_path,
        lambda: import_folder(good / "hf", tmp_path / "dst", overwrite=True),
        str(tmp_path / "dst"),
    )


def test_destination_is_the_source(tmp_path, good):
    shutil.copytree(good / "hf", tmp_path / "model" / "hf")
    for dst in (tmp_path / "model" / "hf", tmp_path / "model"):
        fails(
            tmp_path,
            lambda dst=dst: import_folder(tmp_path / "model" / "hf", dst, overwrite=True),
            str(dst),
            "source",
        )


def test_failed_overwrite_keeps_the_old_one(tmp_path, good):
    shutil.copytree(good / "ours", tmp_path / "ours")
    src = write_folder(
        tmp_path / "src", hybrid_tensors() | {"model.norm.weight": np.full(32, np.nan, BF16)}
    )
    fails(
        tmp_path, lambda: import_folder(src, tmp_path / "ours", overwrite=True), "model.norm.weight"
    )


def test_overwrite_replaces_the_whole_folder(tmp_path, good):
    shutil.copytree(good / "ours", tmp_path / "ours")
    (tmp_path / "ours" / "left_over.json").write_text("{}")
    import_folder(good / "hf", tmp_path / "ours", overwrite=True)
    assert (
        tree(tmp_path / "ours").keys() == tree(good / "ours").keys()
        or not (tmp_path / "ours" / "left_over.json").exists()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_disk_too_small(tmp_path, good, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    fails(
        tmp_path,
        lambda: import_folder(good / "hf", tmp_path / "dst"),
        str(tmp_path / "dst"),
        "GB are free",
    )
    fails(
        tmp_path,
        lambda: export_folder(good / "ours", tmp_path / "dst"),
        str(tmp_path / "dst"),
        "GB are free",
    )


@contextlib.contextmanager
def file_limit(size):
    """No file of this process grows beyond `size` bytes: what a full disk looks like from
    inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("way", ["import", "export", "save"])
def test_disk_fills_up_while_writing(tmp_path, good, way):
    config, params = load_params(good / "hf", scanned=True)
    action = {
        "import": lambda: import_folder(good / "hf", tmp_path / "dst"),
        "export": lambda: export_folder(good / "ours", tmp_path / "dst"),
        "save": lambda: save_params(tmp_path / "dst", params, config),
    }[way]
    with file_limit(6_000):
        fails(tmp_path, action, "no space left", str(tmp_path / "dst"))


def test_interrupted(tmp_path, good, monkeypatch):
    """Ctrl-C, or any error on the way: nothing stays behind."""
    for stop in (KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")):

        def interrupt(*args, stop=stop):
            raise stop

        monkeypatch.setattr(importer, "read_leaf", interrupt)
        with pytest.raises(type(stop)):
            import_folder(good / "hf", tmp_path / "dst")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("leaf", [0, 20])
def test_signal_while_orbax_writes(tmp_path, good, monkeypatch, stop, leaf):
    """It is raised here, in the main thread; the writer has come to its end before the folder goes,
    and leaves none."""
    main, read, begun, ended = threading.main_thread(), importer.read_leaf, [], []

    def raises(*_):
        raise stop

    def interrupted(*args):
        begun.append(threading.current_thread())
        if len(begun) == leaf + 1:
            signal.pthread_kill(main.ident, signal.SIGUSR1)
            time.sleep(0.2)  # the main thread has raised, and would have removed the folder
        ended.append(threading.current_thread())
        return read(*args)

    old = signal.signal(signal.SIGUSR1, raises)
    try:
        monkeypatch.setattr(importer, "read_leaf", interrupted)
        with pytest.raises(stop):
            import_folder(good / "hf", tmp_path / "dst")
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert begun == ended and main not in begun
    assert len(begun) == leaf + 1  # and nothing was read in vain
    assert not any(tmp_path.iterdir())


# Our own folders.


def spoil_data(ours):
    for path in (ours / "params").rglob("d/*"):
        path.write_bytes(b"\0" * path.stat().st_size)
    return (str(ours / "params"),)


def lose_data(ours):
    for path in (ours / "params").rglob("d/*"):
        path.unlink()
    return (str(ours / "params"),)


def lose_checksums(ours):
    shutil.rmtree(ours / "checksums")
    return str(ours), "checksums/params.0.json"


def lose_a_checksum(ours):
    path = ours / "checksums" / "params.0.json"
    content = json.loads(path.read_text())
    del content["norm.weight"]
    path.write_text(json.dumps(content))
    return "norm.weight", "checksums"


def lose_params(ours):
    shutil.rmtree(ours / "params")
    return str(ours), "params/"


def manifest(change, *culprits):
    def case(ours):
        content = json.loads((ours / "infinitevl_jax.json").read_text())
        change(content)
        (ours / "infinitevl_jax.json").write_text(json.dumps(content))
        return "infinitevl_jax.json", *culprits

    return case


OURS = (
    {
        "data-spoilt": spoil_data,
        "data-lost": lose_data,
        "no-params": lose_params,
        "no-checksums": lose_checksums,
        "a-checksum-lost": lose_a_checksum,
        "checksums-not-json": text("checksums/params.0.json", "{"),
        "checksums-negative": text(
            "checksums/params.0.json",
            '{"norm.weight": [{"start": [-1], "shape": [32], "crc32": 1}]}',
        ),
        "manifest-not-json": text("infinitevl_jax.json", "{"),
        "manifest-of-the-future": manifest(lambda m: m.update(format=FORMAT + 1), str(FORMAT + 1)),
        "manifest-unknown-key": manifest(lambda m: m.update(colour="red"), "colour"),
        "manifest-damaged": manifest(lambda m: m.update(files=[{"name": "x"}])),
        "manifest-a-list": text("infinitevl_jax.json", "[1]"),
        "manifest-deep": text("infinitevl_jax.json", '{"format":' * 100_000 + "2" + "}" * 100_000),
        "manifest-format-a-list": manifest(lambda m: m.update(format=[2]), "[2]"),
        "manifest-spelling": manifest(lambda m: m.update(spelling="backwards"), "spelling"),
        "manifest-tie": manifest(
            lambda m: m.update(tie_word_embeddings="yes"), "tie_word_embeddings"
        ),
        "manifest-index": manifest(lambda m: m.update(index_metadata=[1]), "index_metadata"),
        "manifest-adapters": manifest(lambda m: m.update(adapters="x"), "adapters"),
        "manifest-metadata": manifest(
            lambda m: m["files"][0].update(metadata={"a": 1}), "metadata"
        ),
        "manifest-tensor-a-number": manifest(
            lambda m: m["files"][0]["tensors"].append(3), "tensors"
        ),
        "manifest-tensor-twice": manifest(
            lambda m: m["files"][0]["tensors"].append(["model.norm.weight", "BF16"]),
            "model.norm.weight twice",
        ),
        "manifest-file-twice": manifest(
            lambda m: m["files"].append(m["files"][0] | {"name": "Model.safetensors"}), "twice"
        ),
    }
    | {
        f"manifest-file-{name!r}": manifest(
            lambda m, name=name: m["files"][0].update(name=name), "name"
        )
        for name in (
            "../../home/.profile",
            "/etc/cron.d/x.safetensors",
            "../evil.safetensors",
            "a/b.safetensors",
            "x",
            "config.json",
            "",
            ".hidden.safetensors",
            "..",
            "a\\b.safetensors",
            "a\0.safetensors",
            "a\n.safetensors",
            "a" * 300 + ".safetensors",
            3,
            None,
        )
    }
    | {
        f"manifest-dtype-{dtype}": manifest(
            lambda m, dtype=dtype: m["files"][0]["tensors"][0].__setitem__(1, dtype), "tensors"
        )
        for dtype in ("I64", "I8", "BOOL", "F8_E4M3", "F64", "f32", 3)
    }
    | {
        "config-of-another": config("missing", "layers.9.", num_hidden_layers=12),
        "config-of-other-widths": config("misshapen", "mlp.up_proj.kernel", intermediate_size=64),
    }
)


@pytest.mark.parametrize("name", OURS)
def test_ours(tmp_path, good, name):
    ours = tmp_path / "ours"
    shutil.copytree(good / "ours", ours)
    culprits = OURS[name](ours)
    fails(tmp_path, lambda: export_folder(ours, tmp_path / "hf"), *culprits)
    fails(tmp_path, lambda: load_params(ours, scanned=False), *culprits)


def test_manifest_names_other_tensors(tmp_path, good):
    shutil.copytree(good / "ours", tmp_path / "ours")
    manifest(lambda m: m["files"][0]["tensors"].pop())(tmp_path / "ours")
    fails(
        tmp_path,
        lambda: export_folder(tmp_path / "ours", tmp_path / "hf"),
        "infinitevl_jax.json",
        "model.norm.weight",
    )


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_manifest_says_that_a_tensor_is_narrower(tmp_path, dtype):
    """What is stored counts: no value loses digits. (Of format 2, tests/checkpoints/test_format2.py
    has the refusal.)"""
    src = hybrid_folder(tmp_path / "src", dtype=np.dtype(np.float32))
    import_folder(src, tmp_path / "ours")
    name = "model.layers.2.mlp.up_proj.weight"
    manifest(
        lambda m: next(t for t in m["files"][0]["tensors"] if t[0] == name).__setitem__(1, dtype)
    )(tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "hf")
    assert read_folder(tmp_path / "hf") == read_folder(src)
    for scanned in (True, False):
        _, params = load_params(tmp_path / "ours", scanned=scanned)
        assert {p.dtype for p in params.values()} == {np.dtype(np.float32)}


def test_a_flipped_bit_is_seen(tmp_path, good):
    """By load, in both layouts and on a mesh, and by export; the tensor is named. The store itself
    does not see it."""
    config, params = load_params(good / "hf", scanned=False)
    value = np.asarray(params["layers.3.mlp.up_proj.kernel"])
    shutil.copytree(good / "ours", tmp_path / "ours")
    (path,) = (
        path
        for path in (tmp_path / "ours" / "params").rglob("d/*")
        if value.tobytes() in path.read_bytes()
    )
    raw = bytearray(path.read_bytes())
    raw[raw.index(value.tobytes()) + 100] ^= 1
    path.write_bytes(raw)
    said = ("layers.3.mlp.up_proj.kernel", "does not have the bytes that were written")
    mesh = make_mesh(RunConfig(fsdp=8))
    for scanned in (True, False):
        shardings = parameter_shardings(parameters(config, scanned=scanned), mesh)
        for where in (None, shardings):
            fails(
                tmp_path,
                lambda scanned=scanned, where=where: load_params(
                    tmp_path / "ours", scanned=scanned, shardings=where
                ),
                *said,
            )
    fails(tmp_path, lambda: export_folder(tmp_path / "ours", tmp_path / "back"), *said)


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "tokenizer.json", "additional_chat_templates/tool.jinja", "notes.txt"],
)
@pytest.mark.parametrize("far", [True, False])
def test_side_file_that_leads_out(tmp_path, good, name, far):
    """Nothing from outside a folder is copied into the result, which may be published."""
    (tmp_path / "secret").write_text("a private key")
    for kind, action in (("hf", import_folder), ("ours", export_folder)):
        src = tmp_path / kind
        shutil.copytree(good / kind, src)
        (src / name).unlink(missing_ok=True)
        up = "../" * (2 + name.count("/") - 1)
        (src / name).symlink_to(tmp_path / "secret" if far else f"{up}secret")
        fails(
            tmp_path,
            lambda action=action, src=src: action(src, tmp_path / "dst"),
            name,
            "leads out",
            "secret",
        )


def test_side_folder_that_leads_out(tmp_path, good):
    shutil.copytree(good / "hf", tmp_path / "hf")
    shutil.move(tmp_path / "hf" / "additional_chat_templates", tmp_path / "elsewhere")
    (tmp_path / "hf" / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    fails(
        tmp_path,
        lambda: import_folder(tmp_path / "hf", tmp_path / "dst"),
        "tool.jinja",
        "leads out",
    )


def test_links_inside_and_hub_cache(tmp_path, good):
    """A link within the folder, and the cache of huggingface_hub, whose snapshots are links to
    blobs."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    shutil.copytree(good / "hf", snapshot)
    blobs.mkdir()
    for path in [p for p in snapshot.rglob("*") if p.is_file()]:
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    (snapshot / "chat_template.jinja").symlink_to("tokenizer.json")
    import_folder(snapshot, tmp_path / "ours")
    assert (tmp_path / "ours" / "chat_template.jinja").read_bytes() == (
        good / "hf" / "tokenizer.json"
    ).read_bytes()
    assert not any(p.is_symlink() for p in (tmp_path / "ours").rglob("*"))


def test_nan_after_training(tmp_path, good):
    config, params = load_params(good / "hf", scanned=True)
    params["norm.weight"] = params["norm.weight"].at[3].set(jnp.nan)
    save_params(tmp_path / "step", params, config)
    fails(
        tmp_path,
        lambda: export_folder(tmp_path / "step", tmp_path / "hf"),
        "norm.weight",
        "nan at [3]",
    )
    fails(
        tmp_path, lambda: load_params(tmp_path / "step", scanned=False), "norm.weight", "nan at [3]"
    )


def test_save_what_is_not_the_model(tmp_path, good):
    config, params = load_params(good / "hf", scanned=True)
    extra = params | {"head.bias": params["norm.weight"]}
    fails(tmp_path, lambda: save_params(tmp_path / "dst", extra, config), "1 extra", "head.bias")
    cut = {name: p[:16] if name == "norm.weight" else p for name, p in params.items()}
    fails(
        tmp_path, lambda: save_params(tmp_path / "dst", cut, config), "1 misshapen", "norm.weight"
    )
    ints = params | {"norm.weight": params["norm.weight"].astype(jnp.int32)}
    fails(tmp_path, lambda: save_params(tmp_path / "dst", ints, config), "norm.weight", "int32")


def test_wrong_direction(tmp_path, good):
    fails(
        tmp_path,
        lambda: import_folder(good / "ours", tmp_path / "dst"),
        str(good / "ours"),
        "export",
    )
    fails(
        tmp_path,
        lambda: export_folder(good / "hf", tmp_path / "dst"),
        str(good / "hf"),
        "infinitevl_jax.json",
    )
    fails(tmp_path, lambda: export_folder(tmp_path / "nowhere", tmp_path / "dst"), "nowhere")
    fails(tmp_path, lambda: import_folder(tmp_path / "nowhere", tmp_path / "dst"), "nowhere")
    fails(tmp_path, lambda: inspect_folder(tmp_path / "nowhere"), "nowhere")


@pytest.mark.parametrize(
    "size", ["5 parsecs", "0", "-1GB", "GB", "0.5", "9" * 400, "1e400", "nan", ""]
)
def test_shard_size(tmp_path, good, size):
    fails(
        tmp_path,
        lambda: export_folder(good / "ours", tmp_path / "dst", max_shard_size=size),
        "max_shard_size",
        size[:9],
    )


def test_command_line(tmp_path, good):
    """The command prints the same error and exits with 1; there is no traceback."""

    def convert(*arguments):
        return CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)

    result = convert("import", tmp_path / "nowhere", tmp_path / "dst")
    assert result.exit_code == 1
    printed = result.stderr
    assert printed.startswith("error: ") and "nowhere" in printed and "Traceback" not in printed
    result = convert("export", good / "ours", tmp_path / "hf")
    assert result.exit_code == 0 and result.stdout.startswith(f"wrote {tmp_path / 'hf'}\n")
    result = convert("inspect", tmp_path / "hf")
    assert result.exit_code == 0 and "infinite_vl" in result.stdout
