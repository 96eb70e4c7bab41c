"""The numbers that are asked, beside those that were measured. A figure below its floor is said, not hidden."""

from dataclasses import dataclass
from typing import Any

from gpu import sizes, ways

Row = dict[str, Any]
NOT_RUN = "not run"


@dataclass(frozen=True)
class Answer:
    what: str
    wanted: str
    measured: str
    verdict: str
    """reached, below the floor, above the floor, missed, or empty where it was not run"""


def fastest(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """(recipe, way) -> its row of most tokens/s."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["recipe"], row["way"])
        if key not in best or row["tokens_per_second"] > best[key]["tokens_per_second"]:
            best[key] = row
    return best


def below_floor(rows: list[Row], name: str) -> bool:
    row, floor = fastest(rows).get((name, ways.AUTO.name)), sizes.asked(name).floor
    return bool(row and floor and row["mfu_hw"] is not None and row["mfu_hw"] < floor)


def answers(rows: list[Row]) -> list[Answer]:
    """Every number that is asked, in order: shares of peak, the causal mixture beside dense, ratios to the peers."""
    best = fastest(rows)
    return [*_shares(best), _mixture(best), *_ratios(best)]


def _shares(best: dict[tuple[str, str], Row]) -> list[Answer]:
    found = []
    for name, wanted in sizes.RECIPES.items():
        if wanted.floor is None or wanted.aim is None:
            continue
        row = best.get((name, ways.AUTO.name))
        text = f"floor {100 * wanted.floor:.0f} %, aim {100 * wanted.aim:.0f} %"
        if row is None or row["mfu_hw"] is None:
            found.append(Answer(name, text, NOT_RUN, ""))
            continue
        mfu = row["mfu_hw"]
        verdict = "below the floor" if mfu < wanted.floor else "above the floor" if mfu < wanted.aim else "reached"
        measured = (
            f"{100 * mfu:.1f} % ({100 * row['mfu_causal']:.1f} % causal), {row['tokens_per_second']:,.0f} tokens/s"
        )
        found.append(Answer(name, text, measured, verdict))
    return found


def _mixture(best: dict[tuple[str, str], Row]) -> Answer:
    name = "steel-1b-causal"
    mine, dense = (best.get((name, way.name)) for way in (ways.AUTO, ways.DENSE))
    what, wanted = f"{name}, step time of its dense twin", f"<= {sizes.CAUSAL_TO_DENSE} x"
    if mine is None or dense is None:
        return Answer(what, wanted, NOT_RUN, "")
    ratio = dense["tokens_per_second"] / mine["tokens_per_second"]
    return Answer(what, wanted, f"{ratio:.2f} x", "reached" if ratio <= sizes.CAUSAL_TO_DENSE else "missed")


def _ratios(best: dict[tuple[str, str], Row]) -> list[Answer]:
    found = []
    for ours, theirs, least in ways.RATIOS:
        for name in sizes.RECIPES:
            a, b = best.get((name, ours.name)), best.get((name, theirs.name))
            if a is None and b is None:
                continue
            what = f"{name}, {ours.name} / {theirs.peer or theirs.name}"
            if a is None or b is None:
                found.append(Answer(what, f">= {least} x", NOT_RUN, ""))
                continue
            ratio = a["tokens_per_second"] / b["tokens_per_second"]
            found.append(Answer(what, f">= {least} x", f"{ratio:.2f} x", "reached" if ratio >= least else "missed"))
    return found
