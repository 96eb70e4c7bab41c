"""What `megatron-steel plan` was asked for: a plan of a recipe, the check of the time model, or a plan of data."""

from typing import Any

from megatron_steel.errors import SteelError

_USAGE = ("megatron-steel plan RECIPE --gpus 8xA100-80G [key.path=value ...], plan --check, "
          "or plan --data SOURCE FILE... --tokenizer DIR")  # fmt: skip
_ONLY_WITH = {
    "RECIPE --gpus": ("link", "peak_tflops", "memory_gb", "price"),
    "--data": ("tokenizer", "chain", "cores", "total_size"),
}


def run(recipe: str | None, overrides: list[str], options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(plain values, text). Raises SteelError on bad input, and where nothing fits."""
    asked = [bool(recipe or options["gpus"]), options["check"], bool(options["data"])]
    if sum(asked) != 1 or (asked[0] and not (recipe and options["gpus"])):
        raise SteelError(
            "the command is not complete" if sum(asked) < 2 else "one plan at a time", "command line", _USAGE
        )
    _refuse_options(("RECIPE --gpus", "--check", "--data")[asked.index(True)], options)
    if options["check"]:
        from megatron_steel.planner import calibrate

        found = calibrate.check()
        return found, calibrate.as_text(found)
    if options["data"]:
        from megatron_steel.planner import corpus

        sizes = {key: options[key] for key in ("tokenizer", "chain", "cores", "total_size")}
        found = corpus.plan(options["data"], **sizes)
        return found, corpus.as_text(found)
    assert recipe
    return _recipe(recipe, overrides, options)


def _refuse_options(plan: str, options: dict[str, Any]) -> None:
    """What another plan takes is refused, so that nobody believes it was heeded."""
    for other, names in _ONLY_WITH.items():
        given = [f"--{name.replace('_', '-')}" for name in names if options[name] is not None]
        if given and plan != other:
            what = f"only plan {other} takes {', '.join(given)}"
            raise SteelError(what, f"plan {plan}", f"leave it out, or: {_USAGE}")


def _recipe(name: str, overrides: list[str], options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    from megatron_steel.planner.hardware import parse_cluster
    from megatron_steel.recipe import load_recipe

    price = options["price"]
    if price is not None and not 0 <= price < float("inf"):
        raise SteelError(f"a price of {price} is none", "--price", "give what one GPU costs for one hour")
    cluster = parse_cluster(options["gpus"], options["link"], options["peak_tflops"], options["memory_gb"])
    recipe = load_recipe(name, overrides)

    from megatron_steel.planner import show
    from megatron_steel.planner.plan import plan

    found = plan(recipe, name, cluster, price)
    return found, show.as_text(found)
