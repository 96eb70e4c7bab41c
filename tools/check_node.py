"""What one machine does, measured in ten minutes: a report in Markdown (launch/check_node.sh).

python tools/check_node.py [--gpus N] [--out FILE.md]      exit code 0: all that ran held; 70: something did not; 78: refused
"""

import signal
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from node_check import options, report, trials  # noqa: E402

from megatron_steel import dist  # noqa: E402


def main() -> int:
    dist.set_up_logging()
    chosen = options.read()
    if refused := dist.exit_code(lambda: options.require(chosen)):
        return refused
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(70))  # its 40 GB go then, too
    with tempfile.TemporaryDirectory(prefix="check-node-", dir=".") as folder:
        results = trials.run_all(Path(folder).resolve(), chosen.gpus)
    text = report.as_markdown(results)
    Path(chosen.out).write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {chosen.out}")
    return 0 if report.all_hold(results) else 70


if __name__ == "__main__":
    sys.exit(main())
