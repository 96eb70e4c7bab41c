"""The shipped recipes as a list: what each reproduces, in a terminal, as a Markdown table, or one in full with its count.

Lists read the `about` sections alone and import nothing heavy; `show` builds the model without memory to count it. Must not know
how a recipe is trained.
"""

import re

import yaml

from megatron_steel.recipe import About, load_recipe, recipe_names, recipe_path


def listed() -> list[tuple[str, About]]:
    """Every shipped recipe with its `about` section: families by name, in each by size."""
    rows = [(name, _about(recipe_path(name).read_text(encoding="utf-8"))) for name in recipe_names()]
    return sorted(rows, key=lambda row: (re.split(r"-?\d", row[0])[0], row[1].parameters or 0, row[0]))


def as_text() -> str:
    """A line a recipe: name, parameters, tokens, hardware, published result."""
    rows = [("name", "parameters", "tokens", "hardware", "published result"), *map(_cells, listed())]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, parameters, tokens, hardware, result in rows:
        words = (
            name.ljust(widths[0]),
            parameters.rjust(widths[1]),
            tokens.ljust(widths[2]),
            hardware.ljust(widths[3]),
            result,
        )
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)


def as_markdown() -> str:
    """The table of docs/recipes_table.md."""
    lines = [
        "| recipe | what | parameters | tokens | hardware | published result | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, about in listed():
        parameters, tokens, hardware, result = _cells((name, about))[1:]
        cells = f"`{name}`", about.summary, parameters, tokens, hardware, result, about.source
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def show(name: str) -> str:
    """The file as it is, and behind it as a comment what its model counts to.

    Raises SteelError: unknown, or a model that cannot be built.
    """
    from megatron_steel.model.build import build_config
    from megatron_steel.model.flops import parameters
    from megatron_steel.stages import described, parts_of

    recipe = load_recipe(name)
    counts = parameters(build_config(recipe.model))
    counted = (
        f"{counts.total:,} parameters in {counts.tensors} tensors, {counts.embedding:,} of them the input embedding"
    )
    stages = "".join(f"# {described(part)}\n" for part in parts_of(recipe) if part.number)
    return f"{recipe_path(name).read_text(encoding='utf-8').rstrip()}\n# Counted: {counted}.\n{stages}"


def _about(text: str) -> About:
    """The `about` section without reading the rest, which would take ten times as long."""
    section = re.search(r"^about:\n(?:[ ].*\n)+", text, re.MULTILINE)
    return About(**yaml.safe_load(section[0])["about"]) if section else About()


def _cells(row: tuple[str, About]) -> tuple[str, str, str, str, str]:
    name, about = row
    return name, f"{about.parameters:,}" if about.parameters else "", about.tokens, about.hardware, about.result
