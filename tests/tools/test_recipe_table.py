"""The table of recipes in docs/ is the one that the recipes themselves give."""

import importlib.util
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "recipe_table.py"


def test_the_table_is_up_to_date():
    spec = importlib.util.spec_from_file_location("recipe_table", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.TABLE.read_text(encoding="utf-8") == tool.text(), "run: python tools/recipe_table.py"
