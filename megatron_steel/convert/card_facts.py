"""What is known of an export, as rows for its card: from its configuration, the checkpoint's manifest and the run's metrics.

A row is (what, value). What is not known gives no row: nothing is guessed. No path leaves the machine, only names.
Must not know Markdown.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.checkpoint.commit import Checkpoint
from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Rows = list[tuple[str, str]]
Metrics = list[dict[str, Any]]

_SIZES = (
    ("layers", "num_hidden_layers"), ("hidden size", "hidden_size"), ("attention heads", "num_attention_heads"),
    ("key and value heads", "num_key_value_heads"), ("FFN size", "intermediate_size"),
    ("experts", "num_experts"), ("experts", "num_local_experts"), ("experts", "n_routed_experts"),
    ("experts a token passes", "num_experts_per_tok"), ("longest position", "max_position_embeddings"),
)  # fmt: skip


def architecture(config: "PretrainedConfig", shapes: dict[str, tuple[int, ...]], dtype: str) -> Rows:
    """The model's kind, sizes and parameters."""
    text = config.get_text_config()
    rows = [("architecture", f"`{config.model_type}`")]
    if hasattr(text, "FFN_type"):
        rows += [("FFN", f"`{text.FFN_type}`, MLP `{text.mlp_type}`")]
        rows += [("experts", f"{text.n_experts:,}")] if text.FFN_type != "raw" else []
    sizes = [(label, getattr(text, name, None)) for label, name in _SIZES]
    rows += [(label, f"{size:,}") for label, size in sizes if isinstance(size, int)]
    tied = "tied" if text.tie_word_embeddings else "not tied"
    rows += [("vocabulary", f"{text.vocab_size:,} rows, input and output embeddings {tied}")]
    return [*rows, ("parameters", _parameters(config, shapes) + f" ({dtype})")]


def _parameters(config: "PretrainedConfig", shapes: dict[str, tuple[int, ...]]) -> str:
    from megatron_steel.model.flops import parameters

    counted, text = parameters(config), config.get_text_config()
    inner = counted.total - counted.embedding * (1 if text.tie_word_embeddings else 2)
    active, of = getattr(text, "num_experts_per_tok", None), None
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        of = of or getattr(text, name, None)
    said = f"{counted.total:,}, of which {inner:,} are neither input nor output embedding"
    if not active or not of:
        return said
    experts = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name)
    return f"{said}; {counted.total - experts + experts * active // of:,} are active for a token"


def training(manifest: dict[str, Any], metrics: Metrics) -> Rows:
    """Length, batch, optimizer, precision, machines, speed."""
    tokens = f", {manifest['tokens']:,} tokens" if "tokens" in manifest else ""
    rows = [("training", f"{manifest['step']:,} steps{tokens}")]
    recipe = manifest.get("recipe")
    if recipe:
        train, optim, schedule = recipe["train"], recipe["optim"], recipe["schedule"]
        length = recipe["data"]["sequence_length"]
        steps = _run_length(manifest)
        if steps and steps > manifest["step"]:
            rows += [("the run's length", f"{steps:,} steps: this is a checkpoint from its middle")]
        rows += _stages(manifest)
        batch = train["global_batch_size"]
        rows += [
            ("global batch", (f"{batch:,} pairs of a prompt and a response of up to {length:,} tokens each" if _of_pairs(manifest) else
             f"{batch:,} sequences of {length:,} tokens ({batch * length:,} tokens a step)") + _ramp_words(train)),
            ("optimizer", f"{_optimizer(optim)}, weight decay "
             f"{optim['weight_decay']:g} on {optim['weight_decay_on']}, gradient norm " + (f"at most {optim['clip_grad_norm']:g}" if optim["clip_grad_norm"] else "not clipped")),
            ("learning rate", _schedule(optim["lr"], schedule)),
            ("precision", train["precision"]),
        ]  # fmt: skip
    if "zero_stage" in manifest and "world_size" in manifest:
        rows += [("sharding", f"DeepSpeed ZeRO stage {manifest['zero_stage']}, world size {manifest['world_size']:,}")]
    return rows + _speed(metrics)


def _stages(manifest: dict[str, Any]) -> Rows:
    """Of a run that changed on its way; the other rows are those of the stage that the checkpoint belongs to."""
    every = manifest.get("stages") or []  # older runs have none
    words = [f"{s['name']} (steps {s['first_step'] + 1:,} to {s['first_step'] + s['steps']:,}, {s['tokens']:,} tokens)"
             for s in every]  # fmt: skip
    now = manifest.get("stage")
    return [("stages", f"{', '.join(words)}; what follows is of stage {now} ({every[now - 1]['name']})")] if now else []


def _of_pairs(manifest: dict[str, Any]) -> bool:
    return any(entry.get("kind") == "pairs" for entry in manifest.get("data", []))


def _ramp_words(train: dict[str, Any]) -> str:
    stages = train.get("batch_ramp") or []  # older runs have none
    return f", reached from {stages[0]['global_batch_size']:,} sequences in {len(stages)} stages" if stages else ""


def _run_length(manifest: dict[str, Any]) -> int | None:
    """Optimizer steps of the whole run, as `pretrain` counts them from this checkpoint on; None where nobody can tell."""
    from megatron_steel.data.order import blocks
    from megatron_steel.data.order_json import from_json
    from megatron_steel.data.pairs import SAMPLE_LENGTH
    from megatron_steel.data.ramp import Stage, endless, plan_ramp, steps_of

    recipe, done = manifest["recipe"], manifest["step"]
    train, length = recipe["train"], recipe["data"]["sequence_length"]
    stages = [Stage(s["global_batch_size"], s["until_tokens"], s["until_steps"]) for s in train.get("batch_ramp") or []]
    try:
        if manifest.get("stages"):
            return int(manifest["stages"][-1]["first_step"] + manifest["stages"][-1]["steps"])
        if train.get("steps"):
            return int(train["steps"])
        ramp = endless(plan_ramp(stages, length), train["global_batch_size"])
        trained = from_json(manifest["order"], "manifest").trained_samples
        if train.get("tokens"):
            samples = math.ceil((train["tokens"] - manifest["tokens"]) / length)
            whole, rest = steps_of(ramp, trained, max(0, samples))
            return int(done + whole + (rest > 0))
        length = SAMPLE_LENGTH if _of_pairs(manifest) else length
        samples = int(train["epochs"] * sum(blocks(entry["tokens"], length) for entry in manifest["data"]))
        return int(done + steps_of(ramp, trained, max(0, samples - trained))[0])
    except (KeyError, TypeError, ValueError, SteelError):
        return None


def _schedule(lr: float, schedule: dict[str, Any]) -> str:
    said = f"peak {lr:g}, {schedule['name']}, {_warmup(schedule)}"
    if schedule["name"] == "wsd":
        said += (
            f", {schedule.get('decay_shape', 'linear')} decay over the last {schedule['decay_ratio']:.0%} of the steps"
        )
    return said if schedule["name"] == "constant" else f"{said}, {schedule['min_lr_ratio']:.0%} of the peak at the end"


def _optimizer(optim: dict[str, Any]) -> str:
    if optim["name"] == "adafactor":
        return "adafactor"
    adamw = f"adamw, betas {optim['betas'][0]} and {optim['betas'][1]}, eps {optim['eps']:g}"
    if optim["name"] != "muon":
        return adamw
    rate = optim["muon_lr"] or optim["lr"]
    return f"muon (momentum {optim['muon_momentum']}, peak learning rate {rate:g}) for inner matrices, the rest {adamw}"


def _warmup(schedule: dict[str, Any]) -> str:
    if schedule.get("warmup_tokens"):
        return f"{schedule['warmup_tokens']:,} warm-up tokens"
    if schedule.get("warmup_ratio"):
        return f"warm-up over {schedule['warmup_ratio']:.1%} of the steps"
    return f"{schedule['warmup_steps']:,} warm-up steps"


def _speed(metrics: Metrics) -> Rows:
    """Time and mean speed by the training lines: each tells the mean step since the one before it."""
    lines = [row for row in metrics if "loss" in row]
    if not lines or not all("seconds_step" in row and "tokens" in row for row in lines):
        return []
    before = [0, *(row["step"] for row in lines[:-1])]
    seconds = sum((row["step"] - since) * row["seconds_step"] for row, since in zip(lines, before, strict=True))
    if not seconds > 0:
        return []
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    speed = f"{lines[-1]['tokens'] / seconds:,.0f} tokens a second on average"
    return [("time", f"{hours} h {minutes:02} min {rest:02} s, {speed}")]


def data_sets(manifest: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, tokens, weight in the recipe, share of what was read) of each set; empty strings for what is not known."""
    sets = manifest.get("data", [])
    recipe = manifest.get("recipe", {}).get("data", {})
    given = recipe.get("train") if isinstance(recipe.get("train"), list) else []
    weights = {entry["prefix"]: entry["weight"] for entry in given if entry.get("weight")}
    read = _samples_read(manifest)
    total = sum(read.get(entry.get("digest", ""), 0) for entry in sets)
    earlier = manifest.get("data_before", [])
    names = _told_apart([entry.get("prefix") or entry["name"] for entry in [*sets, *earlier]])
    rows = []
    for name, entry in zip(names, sets, strict=False):
        weight, samples = _weight(entry, weights), read.get(entry.get("digest", ""))
        share = f"{samples / total:.2%}" if total and samples is not None else ""
        rows.append((name, _size(entry), f"{weight:g}" if weight else "", share))
    before = zip(names[len(sets) :], earlier, strict=True)
    return rows + [(name, _size(entry), "", "no longer read") for name, entry in before]


def _size(entry: dict[str, Any]) -> str:
    from megatron_steel.data.pairs import SAMPLE_LENGTH

    if entry.get("kind") == "pairs":
        return f"{entry['tokens'] - SAMPLE_LENGTH:,} pairs"
    return f"{entry['tokens']:,}"


def _weight(entry: dict[str, Any], weights: dict[str, float]) -> float | None:
    """Of a data set in the recipe. Older manifests tell no prefix: then it is by the name, where only one has it."""
    if "prefix" in entry:
        return weights.get(entry["prefix"])
    found = [weight for prefix, weight in weights.items() if Path(prefix).name == entry["name"]]
    return found[0] if len(found) == 1 else None


def _told_apart(prefixes: list[str]) -> list[str]:
    """Their names; of those that share one also the folder's."""
    names = [Path(prefix).name for prefix in prefixes]
    return [
        name if names.count(name) == 1 else "/".join(Path(prefix).parts[-2:])
        for name, prefix in zip(names, prefixes, strict=True)
    ]


def _samples_read(manifest: dict[str, Any]) -> dict[str, int]:
    """Samples drawn of each data set, by digest; empty where the order does not tell (none, or of changing length)."""
    from megatron_steel.data.order import blocks
    from megatron_steel.data.order_json import from_json

    try:
        order = from_json(manifest["order"], "manifest")
        (length,) = {segment.sequence_length for segment in order.segments}
        drawn = order.drawn_before(order.next_sample)
        tokens = {entry["digest"]: entry["tokens"] for entry in manifest["data"]}
        return {d: drawn[d][0] * blocks(count, length) + drawn[d][1] for d, count in tokens.items() if d in drawn}
    except (KeyError, ValueError, TypeError, IndexError, SteelError):
        return {}


def validation_sets(manifest: dict[str, Any]) -> str | None:
    """Names of the held-out sets."""
    given = manifest.get("recipe", {}).get("data", {}).get("validation")
    prefixes = [given] if isinstance(given, str) else [entry["prefix"] for entry in given or []]
    return ", ".join(_told_apart(prefixes)) or None


def losses(manifest: dict[str, Any], metrics: Metrics, report: dict[str, Any] | None, future: bool) -> Rows:
    """The last losses, and what an audit says of them. No perplexity of a loss that is none of a language model."""
    rows: Rows = []
    if manifest.get("averaged_steps"):
        rows += [("whose losses these are", "the run's at these steps; that of the mean is not measured")]
    trained = [row for row in metrics if "loss" in row]
    if trained:
        rows += [
            ("training loss", f"{trained[-1]['loss']:.4f} nats per token at step {trained[-1]['step']:,} (one batch)")
        ]
    held_out = [row for row in metrics if "validation_loss" in row]
    if held_out:
        loss = held_out[-1]["validation_loss"]
        perplexity = f" (perplexity {math.exp(loss):,.2f})" if not future and loss < 100 else ""
        rows += [("validation loss", f"{loss:.4f} nats per token at step {held_out[-1]['step']:,}{perplexity}")]
    else:
        rows += [("validation loss", "not measured")]
    if report:
        rows += [("audit", str(report.get("verdict") or report["causal"]))]
        honest = report.get("loss") if isinstance(report.get("loss"), dict) else {}
        if isinstance(honest.get("prefix_only"), float):
            rows += [("loss with nothing but what lies before", f"{honest['prefix_only']:.4f} nats per token on {Path(str(honest.get('data', '?'))).name}")]  # fmt: skip
    return rows


def read_metrics(checkpoint: Checkpoint) -> Metrics:
    """The lines of the run's `metrics.jsonl` up to the checkpoint's step; torn ones and those without a step are left out.

    None where the checkpoint is another trainer's, or was taken out of its run.
    """
    holder = checkpoint.path.absolute().parent
    file = holder.parent / "metrics.jsonl"
    if not checkpoint.manifest.get("recipe") or holder.name != "checkpoints" or not file.is_file():
        return []
    return list(_rows(file.read_text(encoding="utf-8", errors="replace").splitlines(), checkpoint.step))


def _rows(lines: Iterable[str], last_step: int) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
            numbers = {
                key: float(row[key]) for key in ("loss", "validation_loss", "seconds_step", "tokens") if key in row
            }
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if step <= last_step:
            yield {**numbers, "step": step}
