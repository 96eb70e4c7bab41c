"""`megatron-steel export` from a checkout, for those who did not install the command.

python tools/convert_to_hf.py RUN_OR_CHECKPOINT OUT_DIR [--dtype bfloat16] [--verify] [--average K] [--model HF_DIR] [--tokenizer DIR_OR_MODEL] ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_steel.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
