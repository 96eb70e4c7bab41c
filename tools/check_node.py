"""What one machine does, measured in ten minutes: a report in Markdown (launch/check_node.sh).

python tools/check_node.py [--gpus N] [--out FILE.md]      exit code 0: all that ran held; 70: something did not
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from node_check import report, trials  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="What this machine does, in ten minutes.")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks (default: one per GPU, two without one)")
    parser.add_argument("--out", default="check_node.md", metavar="FILE.md")
    options = parser.parse_args()
    if options.gpus is not None and options.gpus < 1:
        parser.error(f"{options.gpus} ranks cannot be checked")
    if not Path(options.out).resolve().parent.is_dir():  # said now, not after ten minutes
        parser.error(f"there is no folder for {options.out}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(70))  # its 40 GB go then, too
    with tempfile.TemporaryDirectory(prefix="check-node-", dir=".") as folder:
        results = trials.run_all(Path(folder).resolve(), options.gpus)
    text = report.as_markdown(results)
    Path(options.out).write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {options.out}")
    return 0 if report.all_hold(results) else 70


if __name__ == "__main__":
    sys.exit(main())
