"""Several runs one after another in the same ranks, to start the launcher once: run_many.py RECIPE a=1 b=2 + a=3 + ...

A run may begin with a recipe of its own, a path that ends in .yaml.
"""

import sys

from megatron_steel import dist
from megatron_steel.pretrain import run

recipe, *words = [a for a in sys.argv[1:] if not a.startswith("--local_rank=")]
dist.set_up_logging()
while words:
    cut = words.index("+") if "+" in words else len(words)
    if words[0].endswith(".yaml"):
        recipe, words, cut = words[0], words[1:], cut - 1
    overrides, dry = [w for w in words[:cut] if w != "--dry-run"], "--dry-run" in words[:cut]
    code = dist.exit_code(lambda recipe=recipe, overrides=overrides, dry=dry: run(recipe, overrides, dry))
    words = words[cut + 1 :]
    if code:
        sys.exit(code)
