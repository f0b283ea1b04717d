"""What a run is: a frozen, validated tree of settings. A recipe returns one; YAML with the same fields works too.

    RunConfig
    ├── ModelConfig        which LLM and vision encoder become one model, or which model is trained on
    ├── DataConfig         example sources (dotted path and keyword arguments), their weights, packing
    ├── StageConfig ...    what is trained, in sequence
    │   ├── TrainingConfig     steps, batch, optimizer, schedule, checkpoints
    │   └── DataConfig         where a stage reads other data than the run
    └── DecoderConfig      for a run that trains the diffusion decoder instead

All of them are keyword arguments in Python and mappings in YAML; a field that does not exist is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from metamorph.errors import ConfigError


class Section(BaseModel):
    """Base of every settings class: frozen; an unknown field or a wrong type is a ConfigError, with the nearest name."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_describe(type(self).__name__, error)) from None

    __init__.__pydantic_base_init__ = True  # pyright: ignore  # inner sections are validated by the outermost, which knows the place

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, from which an equal section can be built."""
        return self.model_dump(mode="json")

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_fields(cls, values: Any) -> Any:
        unknown = [name for name in values if name not in cls.model_fields] if isinstance(values, Mapping) else []
        if unknown:
            text = unknown_name(unknown[0], list(cls.model_fields), f"field of {cls.__name__}")
            raise PydanticCustomError("unknown_field", "{text}", {"text": text})
        return values


class TrainingConfig(Section):
    """How weights change: the settings of one call of `train`."""

    steps: int = Field(default=0, ge=0)
    """Optimizer steps; 0 = as many as the stage's data gives (order: epoch)."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences (with `data.batch_unit` rows: packed rows) per step over all processes; used by whoever builds the stream."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Of these, how many per forward pass on one process; None = the whole share of a step at once."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the weights of linear layers (not the text head) by Muon, all else by AdamW; on one process."""
    learning_rate: float = Field(default=1e-3, gt=0)
    learning_rate_scale: dict[str, float] = {}
    """Multiplies the learning rate of parameters whose name starts with the key (a module's dotted name)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    warmup: Literal["linear", "logarithmic"] = "linear"
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    """The learning rate ends at this share of its peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Only on matrices: norms and biases are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto = bfloat16 autocast where the device is measured or known to be fast at it."""
    gradient_checkpointing: bool = False
    normalization: Literal["global", "micro_batch"] = "global"
    """Divide each loss by the number of its targets in the whole step, or (as the authors) in each micro-batch."""
    visual_loss_weight: float = Field(default=1.0, ge=0)
    drawn_token_dropout: float = Field(default=0.0, ge=0, le=1)
    """Hide from the input a share of each drawn image's visual tokens, uniform between 0 and this; not in the paper."""
    loss_weights: dict[str, float] = {}
    """Weights of further kinds of loss; 1.0 where nothing is said."""
    seed: int = 0
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; None = only one, at the end."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints to keep."""
    log_every: int = Field(default=10, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; None = only at the end."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return round(self.warmup_ratio * self.steps)

    def loss_weight(self, kind: str) -> float:
        """Weight of a kind of loss in the total."""
        return self.loss_weights.get(kind, self.visual_loss_weight if kind == "visual" else 1.0)


class ModelConfig(Section):
    """Where the trained model starts: an LLM and a vision encoder to join, or a saved MetaMorph."""

    llm: str | None = None
    vision: str | None = None
    start: str | None = None
    """A saved MetaMorph to go on from, instead of `llm` and `vision`."""
    overrides: dict[str, Any] = {}
    """Fields of MetaMorphConfig that differ from their defaults, for a model joined from `llm` and `vision`."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.start is None) == (self.llm is None) or (self.llm is None) != (self.vision is None):
            given = f"llm={self.llm!r}, vision={self.vision!r}, start={self.start!r}"
            raise ValueError(f"{given} but either llm and vision, or start, is needed")
        return self


class SourceConfig(Section):
    """A source: a function, by dotted path, that returns an ExampleSource when called with `kwargs`."""

    source: str
    kwargs: dict[str, Any] = {}
    weight: float = Field(default=1.0, gt=0)
    """order: infinite: its share of what is drawn, relative to the other sources, in `weight_unit`."""
    repeats: float = Field(default=1.0, gt=0)
    """order: epoch: its passes per epoch; 0.5 = a random half, another one in each epoch."""
    max_examples: int | None = Field(default=None, ge=1)
    """Use only so many of its rows: a random subset by the training seed, the same in every pass."""
    mean_tokens: float | None = Field(default=None, gt=0)
    """Mean positions of its sequences, for `weight_unit` tokens; None = measured on `token_sample` rows."""
    loss_weight: float = Field(default=1.0, ge=0)
    """Multiplies the loss of its examples."""


class DataConfig(Section):
    """What is read, in which mixture, and how it is put into batches."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    order: Literal["epoch", "infinite"] = "epoch"
    """All sources concatenated and shuffled, `epochs` times, as in the paper; or drawn without end by weight."""
    epochs: int = Field(default=1, ge=1)
    weight_unit: Literal["examples", "tokens"] = "examples"
    """What the sources' weights are shares of; tokens are positions of sequences, images included."""
    token_sample: int = Field(default=128, ge=1)
    """Rows of a source that are encoded to measure its mean length, where `weight_unit` needs one that is not stated."""
    max_length: int = Field(default=4096, ge=2)
    """Longest sequence, and the length of a packed row."""
    too_long: Literal["refuse", "cut_turns"] = "refuse"
    """A longer conversation is an error, or loses its last turns until it fits; no turn or image is ever cut in two."""
    on_bad_record: Literal["raise", "skip"] = "raise"
    """A row that is malformed, too long or has a broken image stops the run; or the next good row of its source takes its place."""
    max_bad_records: int = Field(default=100, ge=0)
    """With skip: stop above so many different bad rows, on all processes together. They are listed in bad_records.jsonl."""
    pack: bool = False
    """Several conversations in one row instead of padding."""
    batch_unit: Literal["sequences", "rows"] = "sequences"
    """What `batch_size` counts. rows (needs pack): rows of `max_length`, filled from conversations drawn ahead, more than 97% full."""
    look_ahead: int = Field(default=4, ge=1)
    """With `batch_unit` rows: so many rows' worth of conversations wait on each process to be packed."""
    group_by_length: bool = False
    """Sort a step's sequences by length before cutting micro-batches: less padding, same losses."""
    workers: int = Field(default=0, ge=0)
    """Processes that prepare batches; 0 = a thread."""
    cached_images: int = Field(default=0, ge=0)
    """Images whose encoder outputs are kept in memory instead of being computed each time; 0 = none."""
    encoded: str | None = None
    """A store of visual tokens (`metamorph data encode`) that holds every image of the sources: the vision encoder is then not loaded."""

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        epoch = self.order == "epoch"
        for source in self.sources:
            found = f"order={self.order!r} and {{}} for {source.source}"
            if epoch and source.weight != 1:
                raise ValueError(found.format(f"weight={source.weight:g}") + " but epochs have no weights: use repeats, or order: infinite")
            if not epoch and source.repeats != 1:
                raise ValueError(found.format(f"repeats={source.repeats:g}") + " but only epochs repeat: use weight, or order: epoch")
            if self.weight_unit != "tokens" and source.mean_tokens is not None:
                raise ValueError(f"mean_tokens={source.mean_tokens:g} for {source.source} but weights are shares of {self.weight_unit}")
        if epoch and self.weight_unit == "tokens":
            raise ValueError("weight_unit='tokens' but epochs have no weights: use order: infinite")
        if self.batch_unit == "rows" and (self.group_by_length or not self.pack):
            found = f"batch_unit='rows', pack={self.pack}, group_by_length={self.group_by_length}"
            raise ValueError(f"{found} but packed rows need pack: true and are not grouped")
        if self.encoded is not None and self.cached_images:
            raise ValueError(f"encoded={self.encoded!r} and cached_images={self.cached_images} but encoded data need no cache: use one")
        return self


class StageConfig(Section):
    """One stage: which modules train, and how. Stages run in sequence, each from the weights the last one left."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    train: tuple[str, ...] | None = None
    """Dotted names of the modules that train; None = all."""
    freeze: tuple[str, ...] = ()
    """Dotted names of modules that do not, taken from `train`."""
    training: TrainingConfig
    data: DataConfig | None = None
    """None = the run's."""


class DecoderConfig(Section):
    """A run that trains the diffusion decoder: where it starts, what conditions it, and its objective."""

    encoder: str
    """A saved MetaMorph, whose visual tokens are the condition."""
    base: str
    """A saved denoiser to start from: unet/ and scheduler/; with `latent` a diffusion model of latents, with model_index.json and vae/."""
    latent: bool = False
    """The base is laid out as Stable Diffusion 1.5 (context padded to 77 positions) or Sana, with a VAE, which stays frozen."""
    batches: SourceConfig
    """A function of (encode, size, seed, **kwargs) that returns a function from the step's number to its DecoderBatch."""
    conditioner: dict[str, Any] = {}
    """Sizes of the conditioner that differ from its defaults."""
    objective: dict[str, Any] = {}
    """Settings of the objective (times, their shift, condition dropout and noise) that differ from those of the start."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Save an exponential moving average of the weights instead of the last."""


class RunConfig(Section):
    """A whole run: a model (or a decoder), data, stages, and where everything is written."""

    name: str
    description: str = ""
    output_dir: str | None = None
    """None = runs/<name>."""
    model: ModelConfig | None = None
    decoder: DecoderConfig | None = None
    data: DataConfig | None = None
    """What a model reads; a decoder names its batches itself."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    license: str | None = None
    """Of the trained model, as the hub spells licences (apache-2.0, llama3.1, ...): for its card. None = unknown."""
    datasets: tuple[str, ...] = ()
    """Names on the hub of the data sets behind `data`: for the model's card."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if (self.model is None) == (self.decoder is None):
            raise ValueError("both or neither of model and decoder given but a run trains exactly one of them")
        if self.model is not None and self.data is None and any(stage.data is None for stage in self.stages):
            raise ValueError("no data given but a stage needs some: set data for the run or for each stage")
        for stage in self.stages:
            data = stage.data or self.data
            if not stage.training.steps and (data is None or data.order != "epoch"):
                raise ValueError(f"0 steps in stage {stage.name!r} but only data in epochs says how many there are: set steps")
            if not stage.training.steps and data is not None and data.batch_unit == "rows":
                raise ValueError(f"0 steps in stage {stage.name!r} but how many packed rows an epoch fills is not known before: set steps")
        stores = [data.encoded for stage in self.stages if (data := stage.data or self.data) is not None]
        if None in stores and any(stores):
            raise ValueError(f"encoded={stores} by stage but either all stages read encoded data or none: set it for each")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages named {names} but each needs a name of its own")
        return self

    @property
    def run_dir(self) -> Path:
        """Where config, metrics, checkpoints and the final model are written."""
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.name

    def with_overrides(self, assignments: Mapping[str, Any]) -> RunConfig:
        """A copy with other values, by dotted path: {"stages.0.training.steps": 10}.

        Raises:
            ConfigError: a path leads nowhere, or a value does not fit.
        """
        values = self.to_dict()
        for path, value in assignments.items():
            _assign(values, path, value, type(self))
        return RunConfig(**values)

    def save(self, path: Path) -> None:
        """Write as YAML."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        """Read from YAML.

        Raises:
            ConfigError: the file is missing, not YAML, or has a field that does not exist.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"no readable YAML but a run configuration was expected ({path}): {error}. Check the file.") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{type(values).__name__} but a mapping of fields was expected ({path}). Give the fields of RunConfig.")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{error} ({path})") from None


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["stages.0.training.steps=10"]` as a mapping; values are YAML scalars (a list or mapping is refused).

    Raises:
        ConfigError: an assignment has no `=`, or its value is not a scalar.
    """
    parsed = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"{assignment!r} but field=value was expected (--set). Write for example --set stages.0.training.steps=100.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{text!r} but a YAML scalar was expected (--set {path}): {error}. Quote the value.") from None
        if isinstance(value, list | dict):
            raise ConfigError(f"a {type(value).__name__} but a scalar was expected (--set {path}). Use a YAML file for lists and mappings.")
        parsed[path.strip()] = value
    return parsed


def unknown_name(name: str, known: list[str], what: str) -> str:
    """The sentence for a name that does not exist, with the nearest one that does."""
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    remedy = f"Did you mean {nearest[0]!r}?" if nearest else f"Known are: {', '.join(known) or 'none'}."
    return f"{name!r} but that is no {what}. {remedy}"


def _assign(values: Any, path: str, value: Any, root: type[Section]) -> None:
    """Set one leaf of nested dicts and lists, checking every part of the path."""
    parts = path.split(".")
    for depth, part in enumerate(parts):
        place = f"--set {path}"
        if isinstance(values, list):
            if not part.isdigit() or int(part) >= len(values):
                raise ConfigError(f"{part!r} but an index from 0 to {len(values) - 1} was expected ({place}). Count from 0.")
            key: Any = int(part)
        elif isinstance(values, dict):
            free = depth > 0 and parts[depth - 1] in _FREE_MAPPINGS  # keys of these are data, not fields
            if part not in values and not free:
                owner = ".".join(parts[:depth]) or root.__name__
                raise ConfigError(f"{unknown_name(part, list(values), f'field of {owner}')} ({place})")
            key = part
        else:
            raise ConfigError(f"{part!r} but {'.'.join(parts[:depth])} has no fields ({place}). Shorten the path.")
        if depth == len(parts) - 1:
            values[key] = value
        else:
            values = values.setdefault(key, {}) if isinstance(values, dict) else values[key]


_FREE_MAPPINGS = frozenset({"kwargs", "overrides", "loss_weights", "learning_rate_scale", "conditioner", "objective"})


def _describe(what: str, error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "unknown_field":
            problems.append(f"{problem['msg']} ({'.'.join([what, *([place] if place else [])])})")
        elif problem["type"] == "value_error":
            problems.append(f"{problem['msg'].removeprefix('Value error, ')} ({'.'.join([what, *([place] if place else [])])})")
        else:
            problems.append(f"{problem['input']!r} but {_lower_first(problem['msg'])} ({what}.{place})")
    return "; ".join(problems)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
