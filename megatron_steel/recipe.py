"""A recipe: everything that decides a run, as frozen dataclasses read from YAML plus `key.path=value`.

1. `load_recipe` finds a shipped recipe by name or opens a path, applies the overrides in order, validates
   everything at once and raises one `SteelError` that lists every problem with the nearest known key.
2. `Recipe` holds only what the user decides. Derived numbers (accumulation, warm-up in steps) are computed by
   functions and never stored.

Knows nothing of models, data or DeepSpeed: it checks shapes of values and the keys that exclude each other.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from megatron_steel.errors import SteelError
from megatron_steel.recipe_checks import problems_of

RECIPES = Path(__file__).parent / "recipes"


class _Section:
    """Refuses unknown keys when pydantic validates a subclass."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True)
class About(_Section):
    """What the recipe reproduces, for lists and tables; it decides nothing in a run."""

    summary: str = ""
    parameters: int | None = None
    """Of the model as the recipe gives it, exact."""
    tokens: str = ""
    """Length of the published training."""
    hardware: str = ""
    result: str = ""
    """What its authors, or others, measured."""
    source: str = ""


@dataclass(frozen=True)
class Run(_Section):
    dir: str = ""
    """Run folder; `runs/NAME` of the recipe when left out."""
    seed: int = 1234
    """Seeds the initial weights and the order of data."""


@dataclass(frozen=True)
class Tokenizer(_Section):
    path: str
    """A Hugging Face tokenizer folder or a sentencepiece `.model`."""


@dataclass(frozen=True)
class Model(_Section):
    type: str | None = None
    """`steel`, `nanogpt`, `openelm` or a transformers `model_type` (an encoder-decoder: `t5`)."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of that configuration class, in its own names."""
    path: str | None = None
    """A folder with `config.json` instead of type and config."""
    trust_code: bool = False
    """Allow modelling code that lies in `model.path`."""
    init_from: str | None = None
    """A Hugging Face folder whose weights the run starts from."""
    init_std: dict[str, float] = field(default_factory=dict)
    """{pattern of parameter names: standard deviation} where it is not the class's own; the first that matches decides."""


@dataclass(frozen=True)
class Prefix(_Section):
    prefix: str
    weight: float | None = None


@dataclass(frozen=True)
class Data(_Section):
    train: str | list[Prefix]
    """A `.bin`/`.idx` prefix, or a list of {prefix, weight}; no weights: every block once per epoch."""
    sequence_length: int
    """Tokens per sample that are predicted (a block holds one more); of a pair, the longest prompt and response."""
    validation: str | list[Prefix] | None = None
    """Held-out prefix(es), read in the same order at every evaluation."""
    document_mask: bool = False
    """Documents packed into one sample do not attend to each other."""


@dataclass(frozen=True)
class Optim(_Section):
    lr: float
    """Peak learning rate."""
    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """`muon`: for the matrices between embeddings and head, AdamW for the rest."""
    kernel: Literal["auto", "apex", "deepspeed", "torch"] = "auto"
    """Which fused Adam; `auto` takes the fastest that is present and compiles nothing."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    weight_decay_on: Literal["matrices", "matrices_without_embeddings", "all"] = "matrices"
    """`matrices`: tensors of two and more dimensions; `all`: norms and biases too."""
    lr_ratio: dict[str, float] = field(default_factory=dict)
    """{pattern of parameter names: factor on the learning rate}; the first that matches decides."""
    muon_lr: float | None = None
    """Peak learning rate of Muon's matrices; `lr` when left out."""
    muon_momentum: float = 0.95
    muon_adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """torch.optim.Muon's: `match_rms_adamw` makes steps as large as AdamW's, so that its rates hold."""
    clip_grad_norm: float = 1.0
    """Global gradient norm limit; 0 switches clipping off."""


@dataclass(frozen=True)
class Schedule(_Section):
    name: Literal["constant", "linear", "cosine", "wsd", "one_cycle"] = "cosine"
    warmup_steps: int = 0
    warmup_tokens: int | None = None
    """Instead of steps: the run's place in its schedule is then counted in tokens."""
    warmup_ratio: float | None = None
    """Instead of steps: a share of the run's (`one_cycle`: OneCycleLR's pct_start)."""
    initial_lr_ratio: float = 0.0
    """Where the warm-up begins, as a share of the peak."""
    decay_ratio: float = 0.1
    """`wsd`: the share of the run's steps that the final decay takes."""
    decay_shape: Literal["linear", "exponential", "sqrt"] = "linear"
    """`wsd`: how it falls; `sqrt` is 1 - sqrt(x), `exponential` min_lr_ratio^x."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    horizon_ratio: float = 1.0
    """`linear`, `cosine`: where the end lies, in lengths of the run; above 1 the run stops before it."""
    span: tuple[int, int] | None = None
    """[after, until]: the steps of the run (tokens, with `warmup_tokens`) that the schedule takes; all when left out."""


@dataclass(frozen=True)
class BatchStage(_Section):
    """Before the run has trained `until_tokens`, or done `until_steps` (one of the two), a step takes so many samples."""

    global_batch_size: int
    until_tokens: int | None = None
    until_steps: int | None = None


@dataclass(frozen=True)
class Train(_Section):
    global_batch_size: int
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int
    """Samples per rank and forward pass."""
    batch_ramp: list[BatchStage] = field(default_factory=list)
    """Smaller global batches at the start of the run, by fewer micro-batches; then `global_batch_size`."""
    steps: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """`fp16`: with a dynamic loss scale, on a GPU."""
    log_every_steps: int = 10
    eval_every_steps: int = 500
    eval_samples: int = 256
    """Validation samples per evaluation (fewer when the validation data is shorter)."""
    sample_prompts: list[str] = field(default_factory=list)
    """Texts that the model goes on with at each evaluation; an empty one begins a document."""
    sample_tokens: int = 64
    """Tokens it writes after each prompt, always the likeliest."""
    save_every_steps: int = 1000
    keep_last: int = 2
    """Whole checkpoints kept, at least two; older ones are deleted after a newer one is whole."""
    keep_every_steps: int | None = None
    """Checkpoints of steps that this divides are never deleted: a multiple of `save_every_steps`."""
    activation_checkpointing: bool = False
    z_loss: float = 0.0
    """Coefficient of the squared log of the softmax's sum (PaLM 1e-4, OLMo 2 1e-5); not in the loss that is logged."""
    spike_score: float | None = None
    """A loss this many robust deviations above the last 128 (three steps in a row, or one step by ten times that)
    sends the run back to the newest checkpoint before it, without the samples around it; 6 is common, null: never."""
    deterministic: bool = False
    """On a GPU: deterministic kernels, so that a resumed run repeats losses bitwise (slower)."""
    stop_after_minutes: float | None = None
    """Save and leave with exit code 75 after this time."""
    hang_after_seconds: float | None = 1800
    """No progress for so long: write the stacks of all ranks to the run folder and leave with exit code 70; null: never."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues when the run folder holds a whole checkpoint; `never` refuses a used folder."""


@dataclass(frozen=True)
class Kernels(_Section):
    """How things are computed, never what; `auto` takes what runs on the device and never fails."""

    head: Literal["auto", "chunked", "liger", "plain"] = "auto"
    """Linear and cross-entropy: in chunks of 4096 tokens, Liger's, or whole logits."""
    attention: Literal[
        "auto", "cudnn", "flash", "efficient", "math", "flash_attention_2", "flash_attention_3", "flex"
    ] = "auto"
    """One of torch's back ends, the flash-attn package, or FlexAttention."""
    fused: Literal["auto", "liger", "apex", "torch"] = "auto"
    """Norm, rotary positions and SwiGLU, where layers are not compiled."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of each decoder layer; `auto`: on a GPU where triton is."""


@dataclass(frozen=True)
class DeepSpeed(_Section):
    config: str = "auto"
    """A file of `ds_configs/` (by name or path), or `auto`: the smallest ZeRO stage that fits."""


@dataclass(frozen=True)
class StageData(_Section):
    """As in `Data`; what is left out stays as it was."""

    train: str | list[Prefix] | None = None
    sequence_length: int | None = None
    validation: str | list[Prefix] | None = None


@dataclass(frozen=True)
class StageOptim(_Section):
    lr: float | None = None
    """Peak learning rate from here on (`optim.muon_lr` moves in proportion)."""


@dataclass(frozen=True)
class StageTrain(_Section):
    global_batch_size: int | None = None
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class Stage(_Section):
    """A part of the run. What it says holds until a later stage says otherwise."""

    name: str
    steps: int | None = None
    """Its length: one of steps, tokens, ratio; exactly one stage has none and takes what the others leave of the run."""
    tokens: int | None = None
    ratio: float | None = None
    """Of the run's `train.steps` or `train.tokens`."""
    data: StageData = field(default_factory=StageData)
    schedule: Schedule | None = None
    """A whole section, which begins anew with the stage; left out, the schedule before it goes on."""
    optim: StageOptim = field(default_factory=StageOptim)
    train: StageTrain = field(default_factory=StageTrain)


@dataclass(frozen=True)
class Recipe(_Section):
    tokenizer: Tokenizer
    model: Model
    data: Data
    optim: Optim
    train: Train
    run: Run = field(default_factory=Run)
    schedule: Schedule = field(default_factory=Schedule)
    kernels: Kernels = field(default_factory=Kernels)
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed)
    stages: list[Stage] = field(default_factory=list)
    """Parts of the run with other data, schedule or sequence length, one after another (stages.py)."""
    about: About = field(default_factory=About)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON; `from_dict` reads them back."""
        return _plain(self)


# Of the keys in one group exactly one may be set; an override of one clears the others.
_EXCLUSIVE = (("train.steps", "train.tokens", "train.epochs"), ("model.type", "model.path"))
# Of these at most one.
_ALTERNATIVES = (("schedule.warmup_steps", "schedule.warmup_tokens", "schedule.warmup_ratio"),)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `3e-4` as a string; this loader reads every number a Python programmer would write."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def recipe_path(name_or_path: str) -> Path:
    """The YAML file of a shipped name or a path. Raises SteelError when there is none."""
    shipped = RECIPES / f"{name_or_path}.yaml"
    if shipped.is_file() and "/" not in name_or_path:
        return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    near = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise SteelError(
        f"there is no recipe {name_or_path!r}",
        "recipe",
        f"{hint}use a YAML path or one of: {', '.join(recipe_names())}",
    )


def load_recipe(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `key.path=value` overrides.

    Raises:
        SteelError: unknown recipe, unreadable YAML, or a list of every unknown key, wrong type and conflict.
    """
    path = recipe_path(name_or_path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SteelError(f"the recipe is not YAML: {error}", path, "mend the file") from None
    if not isinstance(tree, dict):
        raise SteelError(
            "the recipe is not a mapping of sections", path, "start from `megatron-steel recipes show tiny`"
        )
    for override in overrides:
        _apply(tree, override)
    recipe = from_dict(tree, where=str(path))
    if recipe.run.dir:
        return recipe
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, dir=f"runs/{path.stem}"))


def from_dict(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a tree of plain values. Raises one SteelError that lists every problem."""
    import pydantic  # 0.2 s: kept out of `--help`

    problems = _conflicts(tree)
    try:
        recipe = pydantic.TypeAdapter(Recipe).validate_python(tree)
        problems += problems_of(recipe)
    except pydantic.ValidationError as error:
        problems = [_describe(dict(e)) for e in error.errors()] + problems
    if problems:
        what = "the recipe has problems:\n    - " + "\n    - ".join(problems)
        raise SteelError(what, where, "mend these keys; `megatron-steel recipes show tiny` shows a whole recipe")
    return recipe


def accumulation_steps(train: Train, world_size: int) -> int:
    """Micro-batches that one rank adds up per optimizer step, once a batch ramp is over.

    Raises SteelError when a global batch != micro batch x ranks x a whole number.
    """
    per_pass = train.micro_batch_size * world_size
    for batch in (*(stage.global_batch_size for stage in train.batch_ramp), train.global_batch_size):
        if batch % per_pass == 0:
            continue
        fits = [m for m in range(1, train.micro_batch_size + 1) if batch % (m * world_size) == 0]
        remedy = (
            f"train.micro_batch_size={fits[-1]} fits" if fits else f"make the global batch a multiple of {world_size}"
        )
        raise SteelError(
            f"a global batch of {batch} samples cannot be cut into micro-batches of "
            f"{train.micro_batch_size} on {world_size} ranks ({per_pass} samples a pass)",
            ("train.global_batch_size" if batch == train.global_batch_size else "train.batch_ramp")
            + ", train.micro_batch_size",
            remedy,
        )
    return train.global_batch_size // per_pass


def _conflicts(tree: dict[str, Any]) -> list[str]:
    problems = []
    for group in _EXCLUSIVE:
        if not isinstance(tree.get(group[0].split(".")[0]), dict):
            continue  # the missing section is reported by itself
        present = [key for key in group if _get(tree, key) is not None]
        if len(present) != 1:
            names = ", ".join(present) if present else "none of " + ", ".join(group)
            problems.append(f"{names} set: exactly one of {', '.join(group)} is needed")
    stages = tree.get("stages") if isinstance(tree.get("stages"), list) else []
    for where, part in (("", tree), *((f"stages.{i}.", stage) for i, stage in enumerate(stages or []))):
        for group in _ALTERNATIVES:
            present = [where + key for key in group if _get(part, key)]
            if len(present) > 1:
                problems.append(f"{', '.join(present)} set: give one of them")
    return problems


def _describe(error: dict[str, Any]) -> str:
    """One pydantic error as one line, with the nearest known key."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(part for part in path if not re.match(r"^(str|list\[|Prefix$)", part))
    if error["type"] != "unexpected_keyword_argument":
        return f"{key}: {error['msg']}" + ("" if error["type"] == "missing" else f" (got {error['input']!r})")
    near = difflib.get_close_matches(re.sub(r"\.\d+\.", ".", key), _ALL_KEYS, n=1, cutoff=0.5)
    return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")


def known_keys(cls: type = Recipe, before: str = "") -> list[str]:
    """Every `section.key` of a recipe."""
    keys = []
    for f in dataclasses.fields(cls):
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            keys += known_keys(f.type, f"{before}{f.name}.")
        else:
            keys.append(before + f.name)
    return keys


_ALL_KEYS = [
    *known_keys(),
    "data.train.prefix",
    "data.train.weight",
    "data.validation.prefix",
    "data.validation.weight",
    *(f"train.batch_ramp.{f.name}" for f in dataclasses.fields(BatchStage)),
    *known_keys(Stage, "stages."),
    *known_keys(Schedule, "stages.schedule."),
]


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or key.startswith("-") or not all(part.isidentifier() for part in key.split(".")):
        raise SteelError(
            f"{override!r} is not an override", "command line", "write key.path=value, as in optim.lr=3e-4"
        )
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise SteelError(f"the value of {override!r} is not YAML", key, "quote it, or write a list as [a, b]") from None
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        if isinstance(node.get("stages"), list) and node is tree and section == "stages":
            node = {str(stage.get("name")): stage for stage in node["stages"] if isinstance(stage, dict)}
            if key.split(".")[1] not in node:
                what = f"the recipe has no stage {key.split('.')[1]!r}"
                raise SteelError(what, key, f"its stages: {', '.join(node)}")
            continue
        if not isinstance(node.get(section), dict):
            node[section] = {}
        node = node[section]
    for group in (*_EXCLUSIVE, *_ALTERNATIVES):
        if key in group and value is not None:
            for other in group:
                node.pop(other.split(".")[1], None)
    if key == "model.path":
        node.pop("config", None)  # it belongs to the type that the path replaces
    node[name] = value


def _get(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return dict(value) if isinstance(value, dict) else value
