"""A plan as text, from its tree of plain values. Decimal units: GB is 10^9 bytes, as GPUs are sold."""

from typing import Any


def as_text(tree: dict[str, Any]) -> str:
    sections = [
        _head(tree),
        _memory(tree),
        _settings(tree),
        _stages(tree),
        _communication(tree),
        _disk(tree),
        _claims(tree),
    ]
    sections.append("\n".join(f"note: {note}" for note in [*tree["notes"], _CURVE]))
    return "\n\n".join(section for section in sections if section)


_CURVE = ("time is a model fitted on published speeds (megatron-steel plan --check shows its errors; docs/plan.md), not "
          "measured on this machine")  # fmt: skip


def _head(tree: dict[str, Any]) -> str:
    model, run, cluster = tree["model"], tree["run"], tree["cluster"]
    lines = [f"{tree['recipe']} on {cluster['gpus']} ({cluster['peak'] / 1e12:.0f} TFLOP/s {'fp16' if cluster['precision'] == 'fp16' else 'bf16'}, "
             f"{cluster['memory_bytes'] / 1e9:.0f} GB, {cluster['bandwidth'] / 1e9:,.0f} GB/s, {cluster['link_kind']} "
             f"{cluster['link'] / 1e9:.0f} GB/s one way)",
             f"model      {model['parameters']:,} parameters; {model['gflops_per_token_hw']:.2f} GFLOP a token (6N: "
             f"{model['gflops_per_token_six_n']:.2f}), {model['head_share']:.0%} of it in the head"]  # fmt: skip
    length = (f"{_count(run['tokens'])} tokens in {run['steps']:,} steps" if run["tokens"]
              else "length unknown without the data (train.epochs): set train.tokens")  # fmt: skip
    lines.append(f"run        {length}, {run['global_batch_size']} samples of {model['sequence_length']} tokens a step")
    return "\n".join(lines)


def _memory(tree: dict[str, Any]) -> str:
    first = tree["memory"][0]
    lines = [f"memory of one rank in GB, {first['micro_batch']} samples a pass (DeepSpeed: its own estimator, states "
             "alone)",
             f"{'':20} {'weights':>8} {'grads':>7} {'optim':>7} {'buffers':>7} {'= states':>8} {'DeepSpeed':>9} "
             f"{'head':>6} {'activations':>11} {'checkp.':>8} {'total':>7} {'host':>6}"]  # fmt: skip
    for row in tree["memory"]:
        lines.append(
            f"{row['file']:20} {_gb(row['weights']):>8} {_gb(row['gradients']):>7} {_gb(row['optimizer']):>7} "
            f"{_gb(row['buffers']):>7} {_gb(row['states']):>8} {_gb(row['deepspeed_device']):>9} {_gb(row['head']):>6} "
            f"{_gb(row['activations']):>11} {_gb(row['activations_checkpointing']):>8} {_gb(row['total']):>7} "
            f"{_gb(row['host']) if row['host'] else '-':>6}{'' if row['fits'] else '  does not fit'}"
        )
    return "\n".join(lines)


def _settings(tree: dict[str, Any]) -> str:
    lines = ["settings that fit, best first",
             f"{'':20} {'checkp.':>7} {'micro':>6} {'(most)':>6} {'GB':>6} {'tok/s/GPU':>9} {'tok/s':>11} {'MFU hw':>6} "
             f"{'6N':>5} {'days':>7} {'GPU hours':>10}"]  # fmt: skip
    lines += [_line(s["file"], s) for s in tree["settings"]]
    lines.append(f"best       {tree['settings'][0]['overrides']}\nwhy        {tree['why']}")
    own = tree["recipe_as_it_is"]
    if own:
        lines.append(_line("the recipe as it is", own) + ("" if own["fits"] else "  does not fit"))
    if tree["smallest_change"]:
        lines.append(f"smallest change to the recipe that fits: {tree['smallest_change']}")
    return "\n".join(lines)


def _stages(tree: dict[str, Any]) -> str:
    lines = ["stages with the best setting"] if tree["stages"] else []
    for s in tree["stages"]:
        told = (
            f"{_short(s['days'])} days, {s['micro_batch']} samples a pass, {_gb(s['memory'])} GB"
            if s["fits"]
            else "does not fit"
        )
        lines.append(f"{s['name']:20} {_count(s['tokens'])} tokens in {s['steps']:,} steps of {s['global_batch_size']} x "
                     f"{s['sequence_length']}: {told}")  # fmt: skip
    return "\n".join(lines)


def _line(name: str, s: dict[str, Any]) -> str:
    days = _short(s["days"]) if s["days"] is not None else "-"
    hours = _short(s["gpu_hours"]) if s["gpu_hours"] is not None else "-"
    cost = f"  costs {s['cost']:,.0f}" if s["cost"] is not None else ""
    return (f"{name:20} {'yes' if s['checkpointing'] else 'no':>7} {s['micro_batch']:>6} "
            f"{s['largest_micro_batch']:>6} {_gb(s['memory']):>6} {s['tokens_per_second_per_gpu']:>9,.0f} "
            f"{s['tokens_per_second']:>11,.0f} {s['mfu_hw']:>6.1%} {s['mfu_six_n']:>5.0%} {days:>7} {hours:>10}"
            f"{cost}")  # fmt: skip


def _communication(tree: dict[str, Any]) -> str:
    if tree["cluster"]["ranks"] == 1:
        return "communication: one GPU has none"
    best = tree["settings"][0]
    lines = [f"communication of one rank in a step ({best['micro_batches']} passes, {best['step_seconds']:.2f} s)"]
    lines += [f"ZeRO-{row['stage']}     sends {row['bytes'] / 1e9:8.1f} GB, {row['seconds'] * 1e3:8.0f} ms at nominal "
              f"speed: {'hides behind computation' if row['hides'] else 'does not hide'}"
              for row in tree["communication"]]  # fmt: skip
    return "\n".join(lines)


def _disk(tree: dict[str, Any]) -> str:
    d = tree["disk"]
    tokens = f"; {d['tokens'] / 1e9:,.0f} GB of tokens, each read once" if d["tokens"] is not None else ""
    return (f"disk       {d['checkpoints'] / 1e9:,.1f} GB of checkpoints at most ({d['checkpoint'] / 1e9:.1f} GB each), "
            f"{d['export'] / 1e9:.1f} GB an export{tokens}")  # fmt: skip


def _claims(tree: dict[str, Any]) -> str:
    claims = tree["claims"]
    if not claims:
        return ""
    lines = [f"what its authors say ({claims['note']})"]
    for row in claims["rows"]:
        own, best = row["planned_days_as_it_is"], row["planned_days_best"]
        planned = f"{own:.0f} days as the recipe is" if own else "the recipe as it is cannot be cut"
        planned += f", {best:.0f} at best" if best else ""
        lines.append(f"{row['cluster']:12} {row['days']:>3} days ({row['source']}); planned here: {planned}")
    return "\n".join(lines)


def _count(tokens: int) -> str:
    return f"{tokens / 1e9:,.1f}B" if tokens >= 1e9 else f"{tokens / 1e6:,.1f}M" if tokens >= 1e6 else f"{tokens:,}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def _gb(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}" if value < 100e9 else f"{value / 1e9:.0f}"
