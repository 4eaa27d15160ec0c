"""Folders: which files go along unchanged, and how a result appears whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from infinitevl_jax.errors import InfiniteVLError

MANIFEST = "infinitevl_jax.json"
PARAMS = "params"
_WEIGHTS = tuple(".safetensors .bin .pt .pth .ckpt .h5 .msgpack .onnx .gguf .safetensors.index.json .bin.index.json".split())
# An adapter is merged, and must not be found and merged again; the last two are orbax's.
_OWN = (MANIFEST, "adapter_config.json", "_CHECKPOINT_METADATA", "commit_success.txt")
_SIDE_FOLDERS = ("additional_chat_templates",)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_ours(folder: Path) -> bool:
    """Whether a folder is one of ours (else it is taken for Hugging Face's)."""
    return (folder / MANIFEST).exists()


def side_files(folder: Path) -> list[Path]:
    """Paths, relative to `folder`, of everything that belongs to a checkpoint and is not weights: configuration, code, tokenizer."""
    found = [p for p in folder.iterdir() if p.is_file()]
    found += [p for name in _SIDE_FOLDERS if (folder / name).is_dir() for p in (folder / name).iterdir() if p.is_file()]
    return sorted(
        p.relative_to(folder) for p in found if not p.name.startswith(".") and p.name not in _OWN and not p.name.endswith(_WEIGHTS)
    )


def copy_side_files(src: Path, dst: Path, skip: tuple[str, ...] = ()) -> None:
    """Copy `side_files` byte for byte."""
    for path in side_files(src):
        if str(path) not in skip:
            (dst / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(src / path, dst / path)


@contextlib.contextmanager
def new_folder(dst: str | Path, *, overwrite: bool = False, inputs: tuple[Path, ...] = (), needs: int = 0) -> Iterator[Path]:
    """A folder to write into that becomes `dst` when the block ends well, and leaves no trace when it does not.

    Args:
      dst: where the result goes; must not exist, be empty, or (with overwrite) be a folder that is replaced once the new one is whole.
      inputs: folders that are read meanwhile, which `dst` must not replace.
      needs: bytes that will be written, checked against the free space first.

    Raises:
      InfiniteVLError: `dst` is taken, or the disk is full.
    """
    dst = Path(os.path.abspath(dst))
    for source in inputs:
        source = source.resolve()
        if dst.resolve() == source or dst.resolve() in source.parents:
            raise InfiniteVLError(f"{dst} is the source, or holds it", "choose another destination")
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise InfiniteVLError(f"{dst} exists and is not a folder", "choose another destination, or move it away")
    if dst.is_dir() and any(dst.iterdir()) and not overwrite:
        raise InfiniteVLError(f"{dst} exists and is not empty", "choose another destination, or replace it with --overwrite")
    if dst.is_dir() and any(dst.iterdir()) and not (dst / "config.json").exists():
        raise InfiniteVLError(f"{dst} is not a checkpoint folder: it will not be overwritten", "choose another destination, or empty it")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(dst.parent).free
        if free < needs:
            raise InfiniteVLError(
                f"{dst} needs {needs / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there", "free some space, or choose another disk"
            )
        work = Path(tempfile.mkdtemp(prefix=f".{dst.name}.partial-", dir=dst.parent))
    except OSError as error:
        raise InfiniteVLError(f"{dst} cannot be created: {error.strerror}", "check the path and its permissions") from None
    try:
        work.chmod(0o755)
        yield work
        _sync(work)
        _replace(work, dst)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, InfiniteVLError):
            raise
        if getattr(error, "errno", None) in _FULL or any(os.strerror(code) in str(error) for code in _FULL):
            raise InfiniteVLError(
                f"no space left while writing {dst}" + (f", which needs {needs / 1e9:.2f} GB" if needs else ""),
                "free some space, or choose another disk; nothing was left behind",
            ) from error
        raise


def _replace(work: Path, dst: Path) -> None:
    old = None
    if dst.is_dir() and any(dst.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{dst.name}.old-", dir=dst.parent))
        os.rename(dst, old)
    try:
        os.rename(work, dst)
    except OSError:
        if old:
            os.rename(old, dst)
        raise
    _sync_folder(dst.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
