"""docs/recipes_table.md from the recipes' own `about` sections: recipe_table.py [OUTPUT]."""

import sys
from pathlib import Path

from megatron_steel.catalogue import as_markdown

TABLE = Path(__file__).resolve().parents[1] / "docs" / "recipes_table.md"
HEAD = """# Recipes

Made by `python tools/recipe_table.py` from the `about` section of each file in `megatron_steel/recipes/`; do not edit.
Parameters are exact, counted by building the model without memory; tokens, hardware and results are what the source says,
not measured here. `megatron-steel recipes show NAME` prints a recipe with the source of each number and what is in conflict,
`megatron-steel recipes scale NAME --params 50m` a small one of the same family.

"""


def text() -> str:
    return HEAD + as_markdown() + "\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else TABLE).write_text(text(), encoding="utf-8")
