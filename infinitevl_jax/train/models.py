"""The models of a run by name: the student, which trains, and a frozen teacher beside it."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinitevl_jax import checkpoints
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.presets import Preset
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.student import InitialiseConfig, TeacherConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.params import Parameter, Params, initialize, parameters
from infinitevl_jax.nn.stack import Scanned
from infinitevl_jax.processing import Processor
from infinitevl_jax.reading import read_json
from infinitevl_jax.sharding import parameter_shardings
from infinitevl_jax.train.initialise import Setting, initialise
from infinitevl_jax.train.initialise.initialiser import is_new
from infinitevl_jax.train.lora import first_adapters
from infinitevl_jax.train.objectives import objective
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER
from infinitevl_jax.train.setup import Start, source_folder
from infinitevl_jax.train.step import Bind, Held, StageLoss, model_of
from infinitevl_jax.writing import write_text

logger = logging.getLogger(__name__)

DIGEST = "teacher.json"


class _Digest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """RUN/teacher.json."""

    digest: str


@dataclass(frozen=True)
class Teacher:
    """A frozen model.

    Attributes:
      folder: its checkpoint. source: how its parameters are kept.
    """

    config: ModelConfig
    folder: Path
    source: TeacherConfig

    def bind(self, run: RunConfig, ops: Ops, stacked: Scanned) -> Bind:
        """The function that binds its parameters, in its own precision."""
        own = dataclasses.replace(run, dtype=self.source.dtype or run.dtype, remat="none")
        return model_of(self.config, own, ops, self.layout(stacked))

    def layout(self, stacked: Scanned) -> Scanned:
        """The run's layout, if that is one for its depth."""
        other = isinstance(stacked, tuple) and len(stacked) != self.config.text.num_hidden_layers
        return True if other else stacked

    def parameters(self, stacked: Scanned) -> Mapping[str, Parameter]:
        """Its parameters in its layout."""
        return parameters(self.config, scanned=self.layout(stacked))

    def load(self, stacked: Scanned, mesh: Mesh) -> Params:
        """Values of `parameters` on a mesh."""
        places = parameter_shardings(self.parameters(stacked), mesh)
        if self.source.placement == "replicated":
            places = dict.fromkeys(places, NamedSharding(mesh, PartitionSpec()))
        return checkpoints.load_params(
            self.folder,
            scanned=self.layout(stacked),
            shardings=places,
            dtype=self.source.parameters,
        )[1]


def open_teacher(preset: Preset, start: Start) -> Teacher | None:
    """The preset's teacher, None without one.

    Raises:
      InfiniteVLError: the objective lacks a teacher or has no use for one, or the teacher does not
        suit the student.
    """
    options, source = preset.train.objective, preset.teacher
    chosen = objective(options.name)
    if source is None:
        if TEACHER in chosen.models:
            raise InfiniteVLError(
                f"the objective {options.name!r} compares with a teacher, and the preset has none",
                'give [teacher] from = "a checkpoint folder"',
            )
        chosen.check({STUDENT: start.config}, options)
        return None
    if TEACHER not in chosen.models:
        raise InfiniteVLError(
            f"the preset has a teacher, which the objective {options.name!r} does not read",
            "remove [teacher], or choose another train.objective.name",
        )
    folder = source_folder(source.from_, "teacher.from")
    config = checkpoints.read_config(folder)
    chosen.check({STUDENT: start.config, TEACHER: config}, options)
    if (folder / "tokenizer.json").exists():
        theirs, ours = Processor.from_pretrained(folder).tokenizer, start.processor.tokenizer
        if theirs.backend.get_vocab() != ours.backend.get_vocab():
            raise InfiniteVLError(
                f"the tokenizer of {folder} is not the student's",
                "a token has to mean the same to both: take a teacher with the same tokenizer",
            )
    return Teacher(config, folder, source)


def common_layout(*configs: ModelConfig | None) -> Scanned:
    """A stacked layout in which layers of the same depth have the same name in all models.

    Models of another depth than the first are left out.
    """
    given = [config.text.layer_types for config in configs if config is not None]
    alike = [types for types in given if len(types) == len(given[0])]
    return tuple(" ".join(kinds) for kinds in zip(*alike, strict=True)) if alike[1:] else True


class RunModels:
    """The models of a run, in one layout.

    Attributes:
      layout: of the student's stacks. known: its parameters, adapters among them.
      teacher: None without one.
    """

    def __init__(self, preset: Preset, start: Start, mesh: Mesh, ops: Ops):
        """Open the models. Raises InfiniteVLError as `open_teacher` does."""
        self.preset, self.start, self.mesh = preset, start, mesh
        self.teacher = teacher = open_teacher(preset, start)
        self.layout = common_layout(start.config, start.source, teacher and teacher.config)
        lora = preset.train.lora
        self.known = parameters(start.config, scanned=self.layout, lora=lora)
        self._binds = {STUDENT: model_of(start.config, preset.run, ops, self.layout, lora)}
        if teacher:
            self._binds[TEACHER] = teacher.bind(preset.run, ops, self.layout)

    @property
    def teacher_parameters(self) -> Mapping[str, Parameter]:
        """The teacher's parameters; empty without one."""
        return self.teacher.parameters(self.layout) if self.teacher else {}

    def first_params(self, batches: Callable[[], Iterator[TrainBatch]]) -> Params:
        """The student before its first step. batches: opens the stage's own data."""
        mixers = self.preset.model.mixers
        options = mixers and mixers.initialise
        seed, lora = self.preset.train.seed, self.preset.train.lora
        params = first_params(self.start, options, self.layout, self.mesh, batches, seed)
        return params | first_adapters(self.start.config, self.known, lora, self.mesh, seed)

    def loss(self, frozen: Params, run: Path) -> tuple[StageLoss, Held]:
        """What a step minimises, and the parameters that it takes beside the state.

        Args:
          frozen: the student's frozen parameters. run: the run's folder.

        Raises:
          InfiniteVLError: the teacher is not the one that the run began with.
        """
        held, shared = {}, {}
        if teacher := self.teacher:
            held[TEACHER], shared[TEACHER] = hold_teacher(
                teacher, self.layout, self.mesh, frozen, self.known, run
            )
            own = sum(value.size for value in held[TEACHER].values())
            logger.info(f"teacher: {teacher.folder}, {own:,} parameters of its own")
        return StageLoss(self.preset.train.objective, self._binds, shared), held


def first_params(
    start: Start,
    options: InitialiseConfig | None,
    stacked: Scanned,
    mesh: Mesh,
    batches: Callable[[], Iterator[TrainBatch]],
    seed: int,
) -> Params:
    """The student's parameters before the first step.

    Args:
      options: of a derived student's mixers.
      batches: opens the stage's own data.
    """
    params = start.params(stacked, mesh)
    if start.source is None or options is None:
        return params
    known = parameters(start.config, scanned=stacked)
    new = {name for name, found in known.items() if is_new(start.config, found.layers[0])}
    places = {n: p for n, p in parameter_shardings(known, mesh).items() if n in new}
    key = jax.random.key(seed)
    fresh = initialize(start.config, key, scanned=stacked, shardings=places, only=new)
    own = {name: fresh[name] if name in new else params[name] for name in known}
    setting = Setting(start.source, params, start.config, own, stacked, mesh, batches, seed)
    return initialise(setting, options)


def hold_teacher(
    teacher: Teacher,
    stacked: Scanned,
    mesh: Mesh,
    frozen: Params,
    student: Mapping[str, Parameter],
    run: Path,
) -> tuple[Params, tuple[str, ...]]:
    """Load the teacher beside the student's state.

    Args:
      frozen: the student's frozen parameters. student: all of its parameters.
      run: folder of the run, which remembers the teacher's digest.

    Returns:
      Its own parameters, and the names of those that equal the student's frozen ones.

    Raises:
      InfiniteVLError: it is not the teacher that the run began with.
    """
    params = teacher.load(stacked, mesh)
    known = teacher.parameters(stacked)
    _check_digest(run, digest(params, known), teacher)
    same = jax.jit(jnp.array_equal)
    alike = [
        name
        for name in params
        if name in frozen
        and known[name].layers == student[name].layers
        and (params[name].shape, params[name].dtype) == (frozen[name].shape, frozen[name].dtype)
    ]
    shared = []
    for name in alike:
        if bool(same(params[name], frozen[name])):
            del params[name]
            shared.append(name)
    return params, tuple(shared)


def _check_digest(run: Path, found: str, teacher: Teacher) -> None:
    path = run / DIGEST
    if path.exists() and any((run / "checkpoints").glob("[0-9]*")):
        if read_json(path, _Digest).digest != found:
            raise InfiniteVLError(
                f"the weights in {teacher.folder} are not those of the teacher that the run"
                f" in {run} began with",
                "put the old weights back, or choose another train.output",
            )
    else:
        write_text(path, msgspec.json.encode(_Digest(found)).decode() + "\n")


def digest(params: Params, known: Mapping[str, Parameter]) -> str:
    """A fingerprint of parameters, the same for any layout and mesh."""
    found = {}
    for name, value in params.items():
        sums = np.asarray(_fingerprint(value if known[name].stacked else value[None]))
        found |= {
            layer: f"{value.dtype} {known[name].shape[known[name].stacked :]} {int(part)}"
            for layer, part in zip(known[name].layers, sums, strict=True)
        }
    lines = "".join(f"{name} {found[name]}\n" for name in sorted(found))
    return hashlib.sha256(lines.encode()).hexdigest()


@jax.jit
def _fingerprint(x: Array) -> Array:
    """One number [layers] of each layer's bits and their places. Sums of integers do not depend on
    their order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(1, x.ndim):
        place = place * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis
        )
    mixed = (bits + jnp.uint32(0x9E3779B9)) * (place * jnp.uint32(2654435761) | jnp.uint32(1))
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
    return jnp.sum(mixed ^ (mixed >> 13), axis=range(1, x.ndim), dtype=jnp.uint32)
