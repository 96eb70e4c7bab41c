"""The command line of `tools/check_node.py`: what cannot be checked or written is refused at once, not after ten minutes."""

import argparse
import os
from pathlib import Path

from megatron_steel.cli import Parser
from megatron_steel.errors import SteelError


def read() -> argparse.Namespace:
    """A command that cannot be read ends the process, as `megatron-steel` does: three lines and 78."""
    parser = Parser("check_node.sh", description="What this machine does, in ten minutes.")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks (default: one per GPU, two without one)")
    parser.add_argument("--out", default="check_node.md", metavar="FILE.md")
    return parser.parse_args()


def require(options: argparse.Namespace) -> None:
    """Raises SteelError."""
    if options.gpus is not None and options.gpus < 1:
        raise SteelError(f"{options.gpus} ranks cannot be checked", "--gpus", "give how many GPUs to check")
    target = Path(options.out)
    where, remedy = f"--out {options.out}", "name a FILE.md in a folder that can be written"
    if target.is_dir():
        raise SteelError("this is a folder, and the report is a file", where, remedy)
    if not target.resolve().parent.is_dir():
        raise SteelError("there is no folder for the report", where, remedy)
    if not os.access(target if target.exists() else target.resolve().parent, os.W_OK):
        raise SteelError("the report cannot be written there", where, remedy)
