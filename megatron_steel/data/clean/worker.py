"""One chain over one parquet file, inside data-juicer's environment: python worker.py CONFIG.yaml RESULT.json

    1. data-juicer reads its configuration, the rows (text, row, source) and the operators
    2. each operator runs alone, and after it the rows of each source are counted
    3. the rest is exported as parquet, the counts as JSON

Imports nothing of megatron_steel. A problem with a name (a missing package, an unknown operator) goes
into RESULT.json, and so does the last line of any other exception.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

_BATCH = 10_000
_PR_SET_PDEATHSIG = 1


class NamedError(Exception):
    """Something the user can mend: (what, remedy)."""


def main(config: str, result: str) -> int:
    _end_with_the_parent()
    try:
        counts = _run(config)
    except NamedError as problem:
        Path(result).write_text(json.dumps({"what": problem.args[0], "remedy": problem.args[1]}), encoding="utf-8")
        return 78
    except Exception as error:
        failed = " ".join(traceback.format_exception_only(error)[-1].split())
        Path(result).write_text(json.dumps({"failed": failed}), encoding="utf-8")
        raise
    Path(result).write_text(json.dumps(counts), encoding="utf-8")
    return 0


def _end_with_the_parent() -> None:
    """The verb may be killed: then this process and all that it started go, too (Linux; it leads its own group)."""
    me = os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL) if os.getpid() == me else os._exit(143))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _run(config: str) -> dict[str, Any]:
    from data_juicer.utils.lazy_loader import LazyLoader

    LazyLoader._install_package = classmethod(_refuse_to_install)
    from data_juicer.config import init_configs
    from data_juicer.core.executor.factory import ExecutorFactory
    from data_juicer.ops import load_ops

    cfg = init_configs(["--config", config])
    _check_names(cfg.process)
    executor = ExecutorFactory.create_executor(cfg.executor_type)(cfg)
    _end_with_the_parent()  # Ray has taken the signal for itself
    on_ray = cfg.executor_type == "ray"
    builder = executor.datasetbuilder if on_ray else executor.dataset_builder
    dataset = builder.load_dataset()
    steps = [{"operator": "load", "seconds": 0.0, "by_source": _by_source(dataset, on_ray)}]
    for operator in load_ops(cfg.process):
        started = time.monotonic()
        before, dataset = dataset, dataset.process([operator])
        if on_ray:
            dataset.data = dataset.data.materialize()
        step = {"operator": operator._name, "seconds": round(time.monotonic() - started, 3)}
        step["by_source"] = _by_source(dataset, on_ray)
        if not on_ray and len(before) == len(dataset) and _is_mapper(operator):
            step["changed"] = _changed(before, dataset)
        steps.append(step)
    if on_ray:
        dataset.data = dataset.data.select_columns(["row", "text"]).sort("row")
        executor.exporter.export(dataset.data, columns=["row", "text"])
    else:
        executor.exporter.export(dataset.select_columns(["row", "text"]))
    return {"data_juicer": version("py-data-juicer"), "steps": steps}


def _refuse_to_install(cls: Any, package_spec: str, pip_args: Any = None) -> None:
    what = f"data-juicer's environment lacks the package {package_spec}"
    raise NamedError(what, f"{sys.executable} -m pip install {package_spec} (data-juicer would do so unasked)")


def _check_names(process: list[dict[str, Any]]) -> None:
    from data_juicer.core.preflight import PipelineConfigError, pre_instantiation_check
    from data_juicer.ops.base_op import OPERATORS

    known = list(OPERATORS.modules)
    for entry in process:
        for name in entry:
            if name not in known:
                close = ", ".join(get_close_matches(name, known, n=3)) or "`dj-process --help` lists them"
                raise NamedError(f"data-juicer knows no operator {name}", f"did you mean: {close}")
    try:
        pre_instantiation_check(process)
    except PipelineConfigError as error:
        raise NamedError("; ".join(map(str, error.errors)), "mend the operator's parameters in the chain") from None


def _is_mapper(operator: Any) -> bool:
    from data_juicer.ops.base_op import Mapper

    return isinstance(operator, Mapper)


def _by_source(dataset: Any, on_ray: bool) -> dict[str, int]:
    counts: Counter[str] = Counter()
    if on_ray:
        sources = dataset.data.select_columns(["source"])
        for row in sources.map_batches(_value_counts, batch_format="pyarrow", batch_size=None).iter_rows():
            counts[row["values"]] += row["counts"]
        return dict(counts)
    for table in _tables(dataset, "source"):
        for pair in _value_counts(table).to_pylist():
            counts[pair["values"]] += pair["counts"]
    return dict(counts)


def _value_counts(table: Any) -> Any:
    """Columns `values` and `counts` of the column `source`."""
    import pyarrow as pa

    return pa.Table.from_struct_array(table["source"].combine_chunks().value_counts())


def _changed(before: Any, after: Any) -> dict[str, int]:
    """Rows whose text an operator changed, and by how many characters they grew in all (negative: it removed)."""
    import pyarrow.compute as pc

    rows = characters = 0
    for old, new in zip(_tables(before, "text"), _tables(after, "text"), strict=True):
        rows += pc.sum(pc.not_equal(old["text"], new["text"])).as_py() or 0
        characters += pc.sum(pc.subtract(pc.utf8_length(new["text"]), pc.utf8_length(old["text"]))).as_py() or 0
    return {"rows": rows, "characters": characters}


def _tables(dataset: Any, column: str) -> Any:
    return dataset.select_columns([column]).with_format("arrow").iter(batch_size=_BATCH)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
