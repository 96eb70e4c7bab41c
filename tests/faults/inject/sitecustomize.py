"""Faults for jobs that real launchers start: Python imports this file first where its folder is on PYTHONPATH.

FAULT is JSON: {"module": ..., "function": ..., "code": ...}; the code runs before every call of that function, with
`args`, `kwargs` and `rank` at hand. Without FAULT nothing happens.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys

FAULT = json.loads(os.environ.get("FAULT", "null"))


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != FAULT["module"]:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            original = getattr(module, FAULT["function"])

            @functools.wraps(original)
            def faulty(*args, **kwargs):
                exec(FAULT["code"], {"args": args, "kwargs": kwargs, "rank": int(os.environ.get("RANK", 0))})
                return original(*args, **kwargs)

            setattr(module, FAULT["function"], faulty)

        spec.loader.exec_module = exec_module
        return spec


if FAULT:
    sys.meta_path.insert(0, Finder())
