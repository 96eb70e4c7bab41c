"""Can this model see the future, and what is its honest loss?

    audit(source)          a Hugging Face folder or a run's checkpoint: every layer, all figures, JSON and picture
    quick_audit(model)     what `pretrain` asks before the first step: causality alone, one layer of each kind

The verdict comes from `audit_probe` (parts alone, at ordinary and at enlarged weights) and is structural: it holds for any
weights of the same model. Everything runs in fp32 on the CPU. Knows nothing of training.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.model.verdict import AUDIT

if TYPE_CHECKING:
    import torch

    from megatron_steel.audit_probe import Part, Reading

_SHORT, _LONG = 31, 251  # probe lengths of a whole model and of a layer; odd primes, never a width
_SEQUENCES, _SAMPLE = 4, 256


def audit(
    source: str | os.PathLike[str],
    data: str | None = None,
    json_file: str | None = None,
    picture: str | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Audit a model, print what was found and return it.

    Args:
        source: a Hugging Face folder, a run folder or one of its checkpoints.
        data: prefix of a data set for the losses; random tokens when left out.
        json_file: write all figures here; `causal` is the verdict.
        picture: write a PNG here.
        trust_code: run modelling code that lies in the folder.

    Raises:
        SteelError: nothing to load there, foreign code without `trust_code`, weights that do not fit or are not finite, data
            that is not the model's, a file that cannot be written.
    """
    for file in (json_file, picture):
        if file and not Path(file).absolute().parent.is_dir():
            raise SteelError("the folder for this file does not exist", file, "make it, or name another file")
    model = load_for_audit(Path(source), trust_code)
    if getattr(model.config, "is_encoder_decoder", False):
        return _audit_decoder(str(source), model, data, json_file, picture)
    ids_BT = _sample(data, model)
    report = {"source": str(source), **examine(model, ids_BT)}
    report["loss"]["data"] = data or "random tokens"
    print(text_of(report))
    if json_file:
        _write(Path(json_file), lambda aside: write_json(aside, report))
    if picture:
        from megatron_steel.audit_picture import draw

        _write(Path(picture), lambda aside: draw(report, aside))
    return report


def _audit_decoder(
    source: str, model: Any, data: str | None, json_file: str | None, picture: str | None
) -> dict[str, Any]:
    """Of an encoder-decoder the causality of its decoder, behind one fixed prompt; its encoder reads both ways by design."""
    if data or picture:
        what = "of an encoder-decoder only the decoder's causality is audited, and no loss"
        raise SteelError(what, "--data, --picture", "leave them out")
    report = {"source": source, **quick_audit(model)}
    print(report["verdict"])
    if json_file:
        _write(Path(json_file), lambda aside: write_json(aside, report))
    return report


def examine(model: Any, ids_BT: "torch.Tensor") -> dict[str, Any]:
    """Every figure of a model in fp32 on the CPU; its weights are drawn anew on the way: they are lost.

    Args:
        ids_BT: int64 [B, T] for the losses.
    """
    from megatron_steel import audit_figures as figures
    from megatron_steel import audit_probe as probe
    from megatron_steel.audit_replay import asked

    length = _length(model, _LONG)
    short = min(length, _SHORT)
    with asked(model):
        whole = {"ordinary": probe.whole_model(model, short)}
        layers = probe.probe_layers(model, length, every=True)
        loss = figures.losses(model, ids_BT)
        health = figures.health(model, ids_BT[:1])
        decoding, padding = figures.decoding(model), {"ordinary": figures.padding(model)}
        probe.enlarge(model, short)
        whole["enlarged"] = probe.whole_model(model, short)
        decoding["enlarged"] = figures.decoding(model)["difference"]
        padding["enlarged"] = figures.padding(model)
    report = _verdict(model, whole, layers)
    for row, figure in zip(report["layers"], health, strict=True):
        row |= figure
    return {**report, "decoding": decoding, "padding": padding, "loss": loss}


def quick_audit(model: Any) -> dict[str, Any]:
    """Causality alone, in a few passes over short sequences; the model stays as it was.

    The whole model at its own weights (31 tokens), and one layer of each kind alone (251 tokens), also as an enlarged
    copy. Memory: a copy of one layer. A model that breaks the instrument is no reason not to train it: `causal` is then
    None and `problem` says why.
    """
    from megatron_steel import audit_probe as probe
    from megatron_steel.audit_replay import asked

    length = _length(model, _LONG)
    try:
        with asked(model):
            whole = {"ordinary": probe.whole_model(model, min(length, _SHORT))}
            layers = probe.probe_layers(model, length, every=False)
            if whole["ordinary"].reads_future and not any(part.reads_future for parts in layers for part in parts):
                layers = probe.probe_layers(model, length, every=True)
    except SteelError:
        raise
    except Exception as error:  # whatever foreign code does when it is called in parts
        return _unknown(f"{type(error).__name__}: {error}")
    return {**_verdict(model, whole, layers), "quick": True}


def verdict_of(source: Path, trust_code: bool = False) -> dict[str, Any]:
    """The quick audit of a folder or checkpoint that has no `audit.json`, for a verb that must know; says what it found.

    Plain JSON values. Nothing is written. What cannot be audited is no reason to refuse the verb: `causal` is then None.
    """
    dist.log.info("%s has no %s: it is audited first", source, AUDIT)
    try:
        report = quick_audit(load_for_audit(source, trust_code))
    except SteelError as error:
        report = _unknown(str(error.what))
    except Exception as error:  # the library's own, or no memory for a second copy
        report = _unknown(f"{type(error).__name__}: {error}")
    warning = warning_of(report)
    if warning:
        dist.log.warning("%s", warning)
    return _plain(report)


def warning_of(report: dict[str, Any]) -> str | None:
    """What a run says before its first step, and a verb before it goes on; None where the model is causal."""
    if report["causal"]:
        return None
    if report["causal"] is None:
        return f"the model could not be audited, so nobody knows whether its loss is true: {report['problem']}"
    what = ", ".join(sorted({leak["what"] for leak in report["leaks"]}))
    return (
        f"{what} lets every position see later tokens: its loss is NOT a language-model loss, and cached decoding "
        f"computes another function ({report['verdict']})"
    )


def write_json(file: Path, report: dict[str, Any]) -> None:
    """All figures; what is not a finite number becomes null."""
    file.write_text(json.dumps(_plain(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_for_audit(source: Path, trust_code: bool) -> Any:
    """The model of a Hugging Face folder, a run or a checkpoint, in fp32 on the CPU."""
    from megatron_steel.model.build import build_config, build_model
    from megatron_steel.recipe import Model

    if (source / "config.json").is_file():
        from megatron_steel.convert.published_steel import is_published

        if is_published(source):
            raise SteelError("this is a published Steel-LLM folder, which transformers cannot load", source,
                             "run `megatron-steel import` on it first, then audit what that wrote")  # fmt: skip
        config = build_config(Model(path=str(source), trust_code=trust_code))
        return build_model(config, 0, str(source), trust_code)
    checkpoint = (source / "manifest.json").is_file() or source.name.startswith("step-")
    if not (source / "checkpoints").is_dir() and not checkpoint:
        raise SteelError("there is no model here", source, "name a Hugging Face folder, a run folder or a checkpoint")
    return _model_of_checkpoint(source)


def text_of(report: dict[str, Any]) -> str:
    """What the verb prints; the verdict is the last line."""
    loss, padding, decoding = report["loss"], report["padding"], report["decoding"]
    lines = [
        f"{report['architecture']}, {report['parameters']:,} parameters, {len(report['layers'])} decoder layers",
        f"loss on {loss['data']}: teacher-forced {loss['teacher_forced_at_positions']:.4f}, prefix-only "
        f"{loss['prefix_only']:.4f} nats per token at {loss['positions']} positions (ln V = {loss['ln_vocabulary']:.4f})",
        f"decoding ({decoding['mode']}) against one pass: {_number(decoding['difference'])} of the logits' RMS, "
        f"{_number(decoding['enlarged'])} at enlarged weights",
        f"left padding against none: {_number(padding['ordinary'])}, {_number(padding['enlarged'])} at enlarged weights",
    ]
    for i, row in enumerate(report["layers"]):
        lines.append(
            f"layer {i}: FFN share of the stream {_number(row['ffn_share'])}, gradient RMS of FFN "
            f"{_number(row['ffn_gradient'])}, of attention {_number(row['attention_gradient'])}"
        )
    return "\n".join([*lines, report["verdict"]])


def _model_of_checkpoint(source: Path) -> Any:
    import torch

    from megatron_steel.checkpoint.zero import stream_weights
    from megatron_steel.convert.sources import find_checkpoint, recipe_of
    from megatron_steel.model.build import build_config, build_model

    checkpoint = find_checkpoint(source)
    model = build_model(build_config(recipe_of(checkpoint).model), seed=0)
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    missing = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in stream_weights(checkpoint.path):
            if name not in places or places[name].shape != tensor.shape:
                raise SteelError(f"the checkpoint's tensor {name} {tuple(tensor.shape)} is not the model's", source,
                                 "use the version of megatron_steel and transformers that trained it")  # fmt: skip
            places[name].copy_(tensor)
            missing.pop(name, None)
    if missing:
        raise SteelError(f"the checkpoint lacks {next(iter(missing))}", source, "use another checkpoint")
    return model


def _sample(data: str | None, model: Any) -> "torch.Tensor":
    """[4, up to 256] tokens, from places spread evenly over a data set, or drawn evenly from the vocabulary."""
    import torch

    words = model.config.get_text_config().vocab_size
    length = _length(model, _SAMPLE)
    if data is None:
        return torch.randint(0, words, (_SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    from megatron_steel.data.indexed import IndexedDataset

    with IndexedDataset(data) as tokens:
        length = min(length, tokens.tokens // _SEQUENCES)
        if length < 2:
            raise SteelError(f"{tokens.tokens} tokens are too few for an audit", data, "name a larger data set")
        apart = (tokens.tokens - length) // (_SEQUENCES - 1)
        rows = [torch.from_numpy(tokens.read(i * apart, i * apart + length).astype("int64")) for i in range(_SEQUENCES)]
    ids_BT = torch.stack(rows)
    if int(ids_BT.max()) >= words or int(ids_BT.min()) < 0:
        raise SteelError(f"token id {int(ids_BT.max())} is outside the model's vocabulary of {words}", data,
                         "name data that was tokenized for this model")  # fmt: skip
    return ids_BT


def _length(model: Any, wanted: int) -> int:
    """As long as wanted, or as long as the model's positions allow."""
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or wanted
    if wanted == _LONG and getattr(text, "FFN_type", "") == "softmoe_causal" and text.causal_slots == "lagged":
        wanted = max(
            wanted, 9 * text.segment_length // 2 | 1
        )  # the place asked, a third in, lies in the second segment
    return min(wanted, limit)


def _verdict(model: Any, whole: "dict[str, Reading]", layers: "list[list[Part]]") -> dict[str, Any]:
    leaks = _leaks(model, layers)
    leaking_whole = any(reading.reads_future for reading in whole.values())
    if leaking_whole and not leaks:
        leaks = [{"what": type(model).__name__, "part": "outside its decoder layers", "layers": []}]
    words = "; ".join(f"{leak['what']} {_where(leak)} reads later tokens" for leak in leaks)
    alone = [bool(parts) for parts in layers]
    doubt = "" if alone and all(alone) else " (asked as a whole only: its layers cannot be run alone)"
    return {
        "format_version": 1,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "causal": not leaks,
        "verdict": f"NOT CAUSAL: {words}" if leaks else f"causal: yes{doubt}",
        "leaks": leaks,
        "whole_model": {weights: vars(reading) for weights, reading in whole.items()},
        "layers": [{"parts": [_row(part) for part in parts]} for parts in layers],
    }


def _unknown(problem: str) -> dict[str, Any]:
    verdict = f"not audited: {problem}"
    return {"format_version": 1, "causal": None, "verdict": verdict, "problem": problem, "leaks": [], "quick": True}


def _leaks(model: Any, layers: "list[list[Part]]") -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[int]] = {}
    for i, parts in enumerate(layers):
        guilty = [part for part in parts if part.name and part.reads_future]
        # the layer's own code is guilty only where no part of it is
        for part in guilty or [part for part in parts if part.reads_future]:
            found.setdefault((_name(model, part), part.name), []).append(i)
    return [{"what": what, "part": part, "layers": numbers} for (what, part), numbers in found.items()]


def _name(model: Any, part: "Part") -> str:
    """A Steel mixture goes by the name its configuration has for it, anything else by its class."""
    ffn = getattr(model.config, "FFN_type", None)
    return ffn if ffn and part.name == "mlp" else part.cls


def _where(leak: dict[str, Any]) -> str:
    numbers = leak["layers"]
    if not numbers:
        return leak["part"]
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    listed = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"in layer{'s' if len(numbers) > 1 else ''} {listed}"


def _row(part: "Part") -> dict[str, Any]:
    readings = {weights: vars(reading) for weights, reading in part.readings.items()}
    return {"part": part.name or "layer", "class": part.cls, "reads_future": part.reads_future, **readings}


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(file: Path, write: Callable[[Path], None]) -> None:
    aside = file.with_name(f".{file.name}.tmp")
    try:
        write(aside)
        os.replace(aside, file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise SteelError(f"it cannot be written: {error.strerror or error}", file, "name another file") from error
    dist.log.info("wrote %s", file)
