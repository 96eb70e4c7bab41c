"""`recipes scale`: a proportionate small model of a recipe's family, to try it out.

1. The ratios stay: width to depth, inner width to width, query heads to key/value heads, attention width to width. Widths are
   multiples of 64 (of 32 below 256) or of the head; a head keeps its size, or is halved until enough heads fit.
2. Among sizes within a tenth of the wanted count the one nearest the family's width to depth is taken; counts are exact.
3. What muP and MiniCPM make depend on size is computed again. Learning rate, initial std and schedule stay as they are.
4. The run is 20 tokens a parameter long, in at least a thousand steps where the recipe has more.

Must not know how models are built or trained; it asks for their counts.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from megatron_steel.errors import SteelError
from megatron_steel.recipe import Recipe, Train, load_recipe

_TOKENS_PER_PARAMETER = 20  # Chinchilla (2203.15556)
_WITHIN = 0.1
_SECTIONS = ("about", "run", "tokenizer", "model", "data", "optim", "schedule", "train", "kernels")
_LENGTHS = ("steps", "tokens", "ratio")  # of a stage
_NAMES = {  # the same thing in each configuration class's words
    "width": ("hidden_size", "n_embd", "model_dim", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_transformer_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "d_kv"),
    "inner": ("intermediate_size", "n_inner", "d_ff"),
}


def scale(name: str, parameters: str, vocab_size: int | None = None) -> str:
    """A recipe as YAML with about so many parameters.

    Args:
        name: a shipped name or a YAML path.
        parameters: as in `50m`, `1.5b` or `3000000`.
        vocab_size: another vocabulary than the recipe's; it must then be tokenized for it.

    Raises:
        SteelError: a number that is none, a model larger than the recipe's, none of this size within a tenth.
    """
    recipe, wanted = load_recipe(name), parse_count(parameters)
    if vocab_size is not None and vocab_size < 1:
        raise SteelError(
            f"{vocab_size} words are no vocabulary", "--vocab-size", "give at least the bytes: 256, or 4096"
        )
    fields, count = scaled_fields(recipe, wanted, vocab_size)
    return _as_yaml(name, recipe, fields, count, vocab_size)


def parse_count(text: str) -> int:
    """`50m` as 50,000,000. Raises SteelError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text.strip().lower().replace("_", "").replace(",", ""))
    if not found or float(found[1]) == 0:
        raise SteelError(f"{text!r} is no number of parameters", "--params", "write 50m, 1.5b or 3000000")
    return round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found[2]])


def scaled_fields(recipe: Recipe, wanted: int, vocab_size: int | None) -> tuple[dict[str, Any], int]:
    """`model.config` of the scaled model, and its exact number of parameters. Raises SteelError."""
    if recipe.model.type is None:
        what = "a model that comes from a folder has no fields to scale"
        raise SteelError(what, "model.path", "write its sizes under model.type and model.config")
    old = _plain_fields(recipe.model.config | ({"vocab_size": vocab_size} if vocab_size else {}))
    largest = _count(recipe, old)
    if wanted > largest * (1 + _WITHIN):
        raise SteelError(f"the recipe has {largest:,} parameters: scale makes it smaller", "--params", "ask for less")
    tried = list(_candidates(recipe, old, wanted))
    fitting = [(fields, count) for fields, count in tried if abs(count / wanted - 1) <= _WITHIN]
    if not fitting:
        what = f"no model of this family with {old['vocab_size']:,} words comes within a tenth of {wanted:,} parameters"
        least = min(count for _, count in tried)
        smaller = "give --vocab-size 4096, or " if old["vocab_size"] > 4096 else ""
        hint = f"{smaller}ask for {'more' if least > wanted else 'a little more or less'}"
        raise SteelError(what, "--params", f"{hint} (the smallest tried has {least:,})")
    return min(fitting, key=lambda found: _unlike(old, found[0]) + abs(found[1] / wanted - 1))


def _plain_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Without ids that the vocabulary does not have. Raises SteelError where a size is left to the class's default."""
    left = [role for role in ("width", "layers") if not _field(fields, role)]
    left += [] if _field(fields, "heads") or _field(fields, "head_dim") else ["heads"]
    names = [_NAMES[role][0] for role in left] + ([] if "vocab_size" in fields else ["vocab_size"])
    if names:
        what = f"the recipe leaves {', '.join(names)} to the class's defaults"
        raise SteelError(what, "model.config", "write these fields into the recipe (in the class's own words)")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return fields | {name: None for name in ids if (fields.get(name) or 0) >= fields["vocab_size"]}


def _candidates(recipe: Recipe, old: dict[str, Any], wanted: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Fields and exact counts: every width with the depth that belongs to it, and depths near it that fit better."""
    width, layers = _field(old, "width"), _field(old, "layers")
    for w in _widths(old[width], _head_dim(old)):
        near = max(2, round(w * old[layers] / old[width]))
        fields = _sized(old, w, near)
        if fields is None:
            continue
        first = _count(recipe, fields)
        yield fields, first
        if first > 3 * wanted:
            return  # wider ones are larger still
        if first < wanted / 3:
            continue
        layer = first - _count(recipe, _sized(old, w, near - 1) or fields)
        fits = near + (wanted - first) / max(1, layer)  # layers of one family cost alike, all but OpenELM's
        fits = min(max(fits, 2), 2 * near)
        for depth in range(math.floor(fits) - 1, math.ceil(fits) + 2):
            sized = _sized(old, w, depth) if 2 <= depth <= 2 * near else None
            if sized is not None:
                yield sized, _count(recipe, sized)


def _unlike(old: dict[str, Any], new: dict[str, Any]) -> float:
    """How far a model is from its family: the logarithm of its width to depth, and a tenth for each halving of the heads."""
    width, layers = _field(old, "width"), _field(old, "layers")
    aspect = math.log(new[width] / new[layers] * old[layers] / old[width])
    return abs(aspect) + 0.1 * math.log2(_head_dim(old) / _head_dim(new))


def _count(recipe: Recipe, fields: dict[str, Any]) -> int:
    from megatron_steel.model.build import build_config
    from megatron_steel.model.flops import parameters
    from megatron_steel.recipe import Model

    return parameters(build_config(Model(type=recipe.model.type, config=fields))).total


def _field(fields: dict[str, Any], role: str) -> str:
    return next((name for name in _NAMES[role] if name in fields), "")


def _head_dim(fields: dict[str, Any]) -> int:
    heads = _field(fields, "heads")
    return fields.get(_field(fields, "head_dim")) or fields[_field(fields, "width")] // fields[heads]


def _widths(largest: int, head_dim: int) -> Iterator[int]:
    tiny, whole, heads = range(32, 256, 32), range(64, largest + 1, 64), range(head_dim, largest + 1, head_dim)
    yield from sorted(w for w in {*tiny, *whole, *heads} if w <= largest)


def _sized(old: dict[str, Any], w: int, depth: int) -> dict[str, Any] | None:
    """The fields at another width and depth; None where no head size fits."""
    width = _field(old, "width")
    new = old | {width: w, _field(old, "layers"): depth}
    ratio, step = w / old[width], 64 if w >= 256 else 32
    inner = _field(old, "inner")
    if inner:
        whole = math.lcm(step, old.get("mlp_div_ratio", 1))
        new[inner] = max(whole, round(old[inner] * ratio / whole) * whole)
    if "num_decoder_layers" in old:
        new["num_decoder_layers"] = max(1, round(old["num_decoder_layers"] * depth / old[_field(old, "layers")]))
    if "ffn_dim_divisor" in old:  # OpenELM computes its widths: only the steps become finer
        new["ffn_dim_divisor"] = max(16, 2 ** int(math.log2(old["ffn_dim_divisor"] * ratio)))
    heads = _heads(old, w)
    if heads is None:
        return None
    return _by_size(new | heads, w, depth)


def _heads(old: dict[str, Any], w: int) -> dict[str, Any] | None:
    """Head fields: the recipe's head size, halved until as many fit as share a key, and at least two."""
    dim, name, kv = _head_dim(old), _field(old, "heads"), _field(old, "kv_heads")
    if not name:  # OpenELM: heads follow from width and head size
        while dim > 8 and w < 2 * dim * old.get("num_gqa_groups", 1):
            dim //= 2
        return {"head_dim": dim}
    group = old[name] // old[kv] if kv else 1
    wide = w * old[name] * dim // old[_field(old, "width")]  # attention may be wider than the model
    while dim >= 8:
        if wide % (dim * group) == 0 and wide // dim >= max(2, group):
            found = {name: wide // dim}
            if kv:
                found[kv] = wide // dim // group
            return found | ({_field(old, "head_dim"): dim} if _field(old, "head_dim") else {})
        if dim % 4:
            return None
        dim //= 2
    return None


def _by_size(new: dict[str, Any], w: int, depth: int) -> dict[str, Any]:
    """With MiniCPM's scalings, which are functions of width, depth and head (arXiv:2404.06395, section 3.1)."""
    if "residual_multiplier" not in new:
        return new
    scalings = {"residual_multiplier": round(1.4 / depth**0.5, 6), "logits_scaling": w / 256}
    return new | scalings | {"attention_multiplier": round(_head_dim(new) ** -0.5, 6)}


def _as_yaml(name: str, recipe: Recipe, fields: dict[str, Any], count: int, vocab_size: int | None) -> str:
    from megatron_steel.model.text_to_text import TEXT_TO_TEXT

    tokens, length = count * _TOKENS_PER_PARAMETER, recipe.data.sequence_length
    batch, micro = _batch(recipe.train, tokens // length)
    steps = math.ceil(tokens / (batch * length))
    tree = {section: _decided(getattr(recipe, section)) for section in _SECTIONS}
    tree["about"] = {"summary": f"{recipe.about.summary or name}, scaled down to try it out", "parameters": count,
                     "source": f"megatron-steel recipes scale {name}"}  # fmt: skip
    tree["model"] |= {"config": fields}
    tree["run"].pop("dir", None)
    for key in ("steps", "tokens", "epochs", "activation_checkpointing", "precision"):
        tree["train"].pop(key, None)
    # How many labels pairs have is known only when they are read: then as if all were of full length.
    length_of_run = {"steps": steps} if recipe.model.type in TEXT_TO_TEXT else {"tokens": tokens}
    tree["train"] |= length_of_run | {"global_batch_size": batch, "micro_batch_size": micro}
    tree["train"] |= {key: min(getattr(recipe.train, key), max(1, steps // 10))
                      for key in ("log_every_steps", "eval_every_steps", "save_every_steps")}  # fmt: skip
    most = {"warmup_steps": steps // 20, "warmup_tokens": tokens // 20}
    tree["schedule"] |= {key: min(tree["schedule"][key], most[key]) for key in most if key in tree["schedule"]}
    tree["stages"] = _stages(recipe, steps, batch)
    if "residual_multiplier" in fields:  # muP: matrices learn and start by width (arXiv:2203.03466, table 8)
        wider = recipe.model.config["hidden_size"] / fields["hidden_size"]
        for section, key, factor in (("optim", "lr_ratio", wider), ("model", "init_std", wider**0.5)):
            if key in tree[section]:
                tree[section][key] = {name: round(value * factor, 6) for name, value in tree[section][key].items()}
    if recipe.optim.name == "adafactor":  # which needs the stage that its recipe names
        tree["deepspeed"] = _decided(recipe.deepspeed)
    notes = [
        f"{name} with {count:,} parameters: `megatron-steel recipes show {name}` has the sources of its numbers.",
        "Kept: ratios of widths, depth and heads, learning rate, initial std, weight decay, shape of the schedule, data.",
        f"By rule: {_TOKENS_PER_PARAMETER} tokens a parameter ({steps:,} steps), warm-up at most a twentieth of them, a batch that leaves 1,000, bf16, sharding by itself.",
    ]
    if vocab_size:
        path = f"data/tokenizer-{vocab_size}"
        tree["tokenizer"]["path"] = path
        notes += [f"megatron-steel train-tokenizer TEXT... --output {path} --vocab-size {vocab_size} makes its tokenizer;",
                  "tokenize the data with that one: data made with another is refused."]  # fmt: skip
    body = yaml.safe_dump({key: value for key, value in tree.items() if value}, sort_keys=False, allow_unicode=True)
    return "".join(f"# {note}\n" for note in notes) + body


def _stages(recipe: Recipe, steps: int, batch: int) -> list[dict[str, Any]]:
    """The stages in the same shares of the run, their batches in the same proportion to the run's."""
    from megatron_steel.stages import parts_of

    scaled = []
    parts = parts_of(recipe)
    whole = sum(part.tokens for part in parts)
    for stage, part in zip(recipe.stages, parts, strict=False):
        said = {key: value for key, value in _decided(stage).items() if key not in _LENGTHS}
        for key in ("data", "optim", "train"):
            said[key] = {name: value for name, value in said.get(key, {}).items() if value is not None}
        share = part.tokens / whole
        if any(getattr(stage, key) is not None for key in _LENGTHS):
            said["ratio"] = round(share, 6)
        if "global_batch_size" in said["train"]:
            of = said["train"]["global_batch_size"] / recipe.train.global_batch_size
            said["train"]["global_batch_size"] = size = max(8, _power_of_two(round(of * batch)))
            said["train"]["micro_batch_size"] = min(_power_of_two(part.recipe.train.micro_batch_size), size // 8)
        if stage.schedule:
            said["schedule"] = _decided(stage.schedule)
            if "warmup_steps" in said["schedule"]:
                said["schedule"]["warmup_steps"] = min(said["schedule"]["warmup_steps"], round(share * steps) // 20)
        scaled.append({"name": said.pop("name"), **{key: value for key, value in said.items() if value}})
    return scaled


def _batch(train: Train, samples: int) -> tuple[int, int]:
    """Global and micro-batch that leave a run of so many samples a thousand steps, and can be cut for up to eight ranks."""
    if samples // 1000 >= train.global_batch_size:
        return train.global_batch_size, train.micro_batch_size
    batch = max(8, _power_of_two(samples // 1000))
    return batch, min(_power_of_two(train.micro_batch_size), batch // 8)


def _power_of_two(at_most: int) -> int:
    return 2 ** int(math.log2(max(1, at_most)))


def _decided(section: Any) -> dict[str, Any]:
    """What a section says beside its defaults, as plain values."""
    said = {}
    for f in dataclasses.fields(section):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if getattr(section, f.name) != default:
            said[f.name] = getattr(section, f.name)
    return yaml.safe_load(json.dumps(said, default=_decided))
