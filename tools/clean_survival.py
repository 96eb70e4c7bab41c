"""What the corrected chains keep beside the original ones: JSON, tables and a picture.

python tools/clean_survival.py --text A.jsonl B.jsonl --code C.jsonl --output docs/clean_survival [--python PATH]
"""

import argparse
import json
import tempfile
from pathlib import Path

from megatron_steel.data.clean import report
from megatron_steel.data.clean.run import clean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE.jsonl")
    parser.add_argument("--code", nargs="+", required=True, metavar="FILE.jsonl")
    parser.add_argument("--output", required=True, type=Path, metavar="PREFIX", help="writes PREFIX.json, .md and .png")
    parser.add_argument("--python", metavar="PATH", help="interpreter of data-juicer's environment")
    parser.add_argument("--workers", type=int, metavar="N")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("text", "code"):
            for chain in (kind, f"{kind}-original"):
                output = Path(folder) / f"{chain}.jsonl"
                inputs = getattr(arguments, kind)
                found[chain] = clean(inputs, chain, output, workers=arguments.workers, python=arguments.python)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    arguments.output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    tables = [f"## {chain}\n\n{report.table(account)}" for chain, account in found.items()]
    arguments.output.with_suffix(".md").write_text("\n".join(tables), encoding="utf-8")
    report.draw(found, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
