"""What became of every row of every set, and when that is too bad to go on. Must not know files or templates."""

from typing import Any

from megatron_steel.errors import SteelError
from megatron_steel.post.sft_data.mix import Mixture
from megatron_steel.post.sft_data.rows import Maker, Outcome
from megatron_steel.post.sft_data.sources import Source
from megatron_steel.post.sft_data.spec import Part, Spec


def judge(spec: Spec, part: Part, source: Source, total: Outcome) -> None:
    """Raise SteelError for a set that is not what its type says, or of which nothing can be used."""
    where = f"source {part.type}: " + (", ".join(place for place, _ in total.problems) or ", ".join(part.files))
    if total.malformed > spec.max_malformed_ratio * total.rows:
        what = f"{total.malformed} of {total.rows} rows are not of the form of {part.type}: {total.problems[0][1]}"
        raise SteelError(what, where, "is it this set? mend the rows, or raise max_malformed_ratio")
    if not total.keys:
        reasons = [f"{why}: {count}, first {total.first[why]}" for why, count in sorted(total.rejected.items())]
        what = f"none of {total.rows} rows can be used ({'; '.join(reasons) or 'there is no row'})"
        raise SteelError(what, where, "give other files, or leave the source out")
    if source.placeholder and not total.placeholders:
        what = "no row leaves room for a name: the model would learn another model's"
        raise SteelError(what, where, "write {{name}} and {{author}} where the names stand")


def build(
    spec: Spec, maker: Maker, outcomes: list[Outcome], mixture: Mixture, written: dict[str, list[int]]
) -> dict[str, Any]:
    """The report, after a check that it accounts for every row."""
    sources = []
    for i, (part, total) in enumerate(zip(spec.sources, outcomes, strict=True)):
        entry: dict[str, Any] = {
            "type": part.type, "rows": total.rows, "malformed": total.malformed,
            "rejected": dict(sorted(total.rejected.items())), "duplicates": mixture.duplicates[i],
            "not_drawn": mixture.usable[i] - mixture.drawn[i], "drawn": mixture.drawn[i],
            **{key: written[key][i] for key in ("train", "heldout", "tokens")},
            "control_strings": total.control_strings, "first_rejected": dict(sorted(total.first.items())),
            "files": dict(total.files),
        }  # fmt: skip
        lost = entry["malformed"] + sum(total.rejected.values()) + entry["duplicates"] + entry["not_drawn"]
        if lost + entry["train"] + entry["heldout"] != entry["rows"]:
            raise RuntimeError(f"not every row is accounted for: {entry}")
        sources.append(entry)
    if not sum(written["train"]):
        raise SteelError("no row is left to train on", "heldout_ratio, ratio, rows", "keep fewer for validation")
    head = {key: getattr(spec, key) for key in ("kind", "seed", "max_tokens", "heldout_ratio", "system")}
    sums = {key: sum(written[key]) for key in ("train", "heldout", "tokens")}
    tree = head | {"tokenizer": maker.template.facts} | sums | {"sources": sources}
    return tree | {"benchmarks": _benchmarks(maker, outcomes)}


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = []
    for entry in report["sources"]:
        lines.append(
            f"{entry['type']}: {entry['rows']:,} rows, {entry['drawn']:,} drawn, {entry['heldout']:,} of them held out"
        )
        losses = {"malformed": entry["malformed"], **entry["rejected"], "duplicate": entry["duplicates"]}
        losses |= {"not drawn": entry["not_drawn"]}
        lines += [f"    {reason:36} {count:>12,}" for reason, count in losses.items() if count]
    lines.append(f"train: {report['train']:,} rows; held out: {report['heldout']:,}; {report['tokens']:,} tokens")
    for entry in report["benchmarks"]:
        lines.append(f"{entry['file']}: {len(entry['found']):,} of {entry['items']:,} questions found and left out")
    if not report["benchmarks"]:
        lines.append("no benchmark is named: nothing is known about contamination")
    if report["forced_test_splits"]:
        lines.append("TEST SPLITS WERE ALLOWED: scores on these benchmarks mean nothing")
    return "\n".join(lines)


def _benchmarks(maker: Maker, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    if (matcher := maker.matcher) is None:
        return []
    found = [matcher.items[i] for i in sorted({i for outcome in outcomes for i in outcome.items})]
    return [
        {"file": name, "items": count, "too_short": short, "found": [item.number for item in found if item.file == i]}
        for i, (name, count, short) in enumerate(zip(matcher.files, matcher.counts, matcher.unmatchable, strict=True))
    ]
