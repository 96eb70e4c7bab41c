"""Not a test: checkpoints by the real engine, ours and others', for the tests of this folder. Two launcher runs make all, once."""

import json
from pathlib import Path

from conftest import finished, launcher


def made(kind: str, factory, tokenizer: Path) -> Path:
    """A folder with one run folder a case of `test_export`, and `foreign/` with one a case of `test_foreign_checkpoints`.

    kind: `CASES`, or `GRID` for every case there is (slow).
    """
    import test_export
    import test_foreign_checkpoints

    folder = factory.getbasetemp() / f"checkpoints-{kind.lower()}"
    if (folder / "whole").exists():  # another file of tests has had them made
        return folder
    folder.mkdir(exist_ok=True)
    ours, foreign = getattr(test_export, kind), getattr(test_foreign_checkpoints, kind)
    for ranks in (1, 2):
        wanted = {
            "ours": {name: test_export.recipe_of_case(name, tokenizer) for name in ours if ours[name][0] == ranks},
            "foreign": {name: case for name, case in foreign.items() if case["ranks"] == ranks},
        }
        (folder / "cases.json").write_text(json.dumps(wanted))
        script = str(Path(__file__).with_name("make_checkpoints.py"))
        finished([*launcher(ranks), script, str(folder / "cases.json"), str(tokenizer), str(folder)], timeout=1500)
    (folder / "whole").touch()
    return folder
