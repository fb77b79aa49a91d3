"""The configuration of a training run, from TOML, YAML or a recipe."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

TASKS = (
    "translation",
    "language-modeling",
    "masked-language-modeling",
    "text-classification",
    "image-classification",
    "question-answering",
)
SCHEDULES = ("cosine", "inverse_sqrt", "constant")
TOKENIZERS = ("characters", "bpe", "wordpiece")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16")
LOGS = ("csv", "tensorboard")
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the examples come from.

    Args:
        dataset: a name of `fastattn.training.datasets`.
        options: of its `load`.
        train, held_out: files in its place: .jsonl (keys "source" and "target", or "text" and
            "label", or "text", or "question", "context" and "answer"), .csv and .tsv (columns of
            the same), .txt, or .npz (arrays "images" and "labels"). Of a question there may be
            "answers", a list, in place of "answer", and "answer_start", the first one's place in
            the context in characters; else it is the first such text.
        seqlen: tokens of a window of text, for language models; of a row with a question and its
            context, of which longer ones become several.
        shift: pixels by which training moves images at random.
    """

    dataset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    train: str | None = None
    held_out: str | None = None
    seqlen: int = 128
    shift: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How text becomes tokens.

    Args:
        kind: "characters", "bpe" (of bytes; Sennrich et al. 2016), or "wordpiece" (of lower case;
            Devlin et al. 2019), learnt from the training examples.
        vocab_size: the most tokens.
        file: a tokenizer.json of the tokenizers library in its place.
    """

    kind: str = "bpe"
    vocab_size: int = 8000
    file: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train.

    Args:
        steps: of the optimizer.
        batch: examples of a forward and backward.
        accumulate: of these to a step.
        learning_rate: the highest, of AdamW (Loshchilov and Hutter 2019).
        warmup: steps in which it rises from 0.
        schedule: how it falls then: "cosine" to `min_learning_rate` at the last step,
            "inverse_sqrt" of the step (Vaswani et al. 2017, section 5.3), "constant".
        weight_decay: of matrices; embeddings, biases and norms have none.
        betas: of AdamW.
        clip: the largest norm of the gradient; 0: any.
        label_smoothing: see `fastattn.cross_entropy`.
        dtype: "bfloat16" computes under autocast.
        device: "auto" takes a GPU if there is one.
        eval_every: steps between evaluations.
        eval_examples: the most of each kind to evaluate on.
        save_every: steps between states to resume from.
        log_every: steps between lines of the log.
        log: "csv" alone, or "tensorboard" too.
        patience: evaluations without a better held-out loss before it stops early; 0: never.
        init: folder of a model to begin with. What it lacks begins anew.
        threads: of the CPU; 0: torch's own number.
    """

    steps: int
    batch: int = 64
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int = 100
    schedule: str = "cosine"
    min_learning_rate: float = 0.0
    weight_decay: float = 0.01
    betas: Sequence[float] = (0.9, 0.98)
    clip: float = 1.0
    label_smoothing: float = 0.0
    dtype: str = "float32"
    device: str = "auto"
    eval_every: int = 200
    eval_examples: int = 1000
    save_every: int = 200
    log_every: int = 10
    log: str = "csv"
    patience: int = 0
    init: str | None = None
    threads: int = 0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run.

    Args:
        task: one of ``TASKS``.
        seed: of everything that is drawn.
        data, tokenizer, training: see there.
        model: fields of the model's configuration, beside "preset", one of
            `fastattn.models.PRESETS`, if they begin from it; sizes that the data decides are
            filled in.
    """

    task: str
    training: TrainingConfig
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `from_dict`."""
        return json.loads(json.dumps(asdict(self)))


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The configuration of these values.

    Raises:
        ValueError: an unknown key, a missing one, or a value out of range; the message names it.
    """
    sections = {"data": DataConfig, "tokenizer": TokenizerConfig, "training": TrainingConfig}
    made = {}
    for name, kind in sections.items():
        made[name] = _make(kind, values.get(name, {}), f"{name}.")
    config = _make(RunConfig, {**values, **made}, "")
    _check(config)
    return config


def read(source: str, changes: Sequence[str] = ()) -> RunConfig:
    """The configuration in a file, changed.

    Args:
        source: a path to a .toml, .yaml or .json file, or the name of a recipe.
        changes: of single values, such as ``training.steps=100``.

    Raises:
        FileNotFoundError: neither a file nor a recipe.
        ValueError: it can't be read, or as `from_dict`.
    """
    values = parse(find(source))
    for change in changes:
        _set(values, change)
    return from_dict(values)


def recipes() -> list[str]:
    """The names of the recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def find(source: str) -> Path:
    """The file that `source` is, or that is the recipe of that name."""
    path = RECIPES / f"{source}.toml" if source in recipes() else Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"config: expected a file or one of the recipes {', '.join(recipes())}, got {source!r}"
        )
    return path


def parse(path: Path) -> dict[str, Any]:
    """The values in a .toml, .yaml or .json file."""
    text = path.read_text()
    try:
        if path.suffix == ".toml":
            values = _toml(text)
        elif path.suffix in (".yaml", ".yml"):
            values = _yaml(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            raise ValueError("expected .toml, .yaml or .json")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected sections, got {type(values).__name__}")
    return values


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _set(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals:
        raise ValueError(f"set: expected key=value, got {change!r}")
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"set: {section} is no section in {change!r}")
    try:
        values[name] = json.loads(text)
    except ValueError:
        values[name] = text


def _make(kind: Any, values: Any, prefix: str) -> Any:
    if isinstance(values, kind):
        return values
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')}: expected a section, got {values!r}")
    known = {f.name: f for f in fields(kind)}
    if odd := sorted(values.keys() - known):
        names = ", ".join(prefix + name for name in odd)
        raise ValueError(f"{names}: unknown; expected of {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        missing = [name for name in ("task", "steps") if name in known and name not in values]
        raise ValueError(
            f"{prefix}{missing[0] if missing else error}: expected, got none"
        ) from None


def _check(config: RunConfig) -> None:
    training, data = config.training, config.data
    for name, value, choices in (
        ("task", config.task, TASKS),
        ("tokenizer.kind", config.tokenizer.kind, TOKENIZERS),
        ("training.schedule", training.schedule, SCHEDULES),
        ("training.device", training.device, DEVICES),
        ("training.dtype", training.dtype, DTYPES),
        ("training.log", training.log, LOGS),
    ):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    for name, section in (("model", config.model), ("data.options", data.options)):
        if not isinstance(section, dict):
            raise ValueError(f"{name}: expected a section, got {section!r}")
    betas = training.betas
    if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(map(_is_share, betas)):
        raise ValueError(f"training.betas: expected two numbers from 0 to below 1, got {betas!r}")
    sizes = ("steps", "batch", "accumulate", "eval_every", "eval_examples", "save_every")
    for name in (*sizes, "log_every"):
        _check_int(f"training.{name}", getattr(training, name), 1)
    for name in ("warmup", "patience", "threads"):
        _check_int(f"training.{name}", getattr(training, name), 0)
    _check_int("data.seqlen", data.seqlen, 1)
    _check_int("data.shift", data.shift, 0)
    _check_int("tokenizer.vocab_size", config.tokenizer.vocab_size, 8)
    _check_int("seed", config.seed, 0)
    for name in ("learning_rate", "min_learning_rate", "weight_decay", "clip"):
        value = getattr(training, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"training.{name}: expected at least 0, got {value!r}")
    if (data.dataset is None) == (data.train is None):
        raise ValueError("data.dataset: expected either a data set or data.train, got both or none")
    if data.train is not None and data.held_out is None:
        raise ValueError("data.held_out: expected a file beside data.train, got none")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
