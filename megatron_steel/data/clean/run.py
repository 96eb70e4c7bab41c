"""`megatron-steel clean`: rows through a chain of data-juicer operators, with their provenance and a full account.

    1. number the rows of the input: data-juicer sees text, row number and source, nothing else
    2. run the chain in data-juicer's own environment, as a process that may install and download nothing
    3. check the account: every row is kept, or was dropped by a named operator
    4. write the kept rows in input order: each as it was, with the text that the chain made of it

Written aside and renamed. Needs disk for about twice the text. Must not import data-juicer, nor know its operators.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_steel.data.clean import chain as chains
from megatron_steel.data.clean import report as reports
from megatron_steel.errors import EXIT_INTERNAL, SteelError

log = logging.getLogger("megatron_steel")
_ROWS = 5_000  # a parquet row group
_SPACE = re.compile(r"[ \t\n\r]*")
_BOM = b"\xef\xbb\xbf"
_INSTALL = "bash launch/clean_environment.sh makes it; or give --python PATH of an environment with data-juicer"
_NO_NETWORK = {
    "PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "UV_NO_CACHE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip


class Crashed(SteelError):  # noqa: N818  (it says what happened)
    """data-juicer was killed or fell over: the input may be fine, and another start may succeed."""

    exit_code = EXIT_INTERNAL


def clean(
    inputs: Sequence[str | os.PathLike[str]],
    chain: str,
    output: str | os.PathLike[str],
    workers: int | None = None,
    report: str | os.PathLike[str] | None = None,
    picture: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    python: str | os.PathLike[str] | None = None,
    ray: str | None = None,
) -> dict[str, Any]:
    """Clean jsonl files into one.

    Args:
        inputs: jsonl files; each row an object with a string under `text`; `source` names its corpus in the report.
        chain: `text`, `code`, `text-original`, `code-original`, or a YAML file.
        workers: processes (default: one per core); without effect on Ray.
        report: JSON file for the account; the same as a markdown table lies beside it.
        models: folder with the files of operators that would download them; such operators are left out without.
        python: interpreter of data-juicer's environment (default: `clean-venv` beside this one's packages).
        ray: address of a Ray cluster that shares this file system, or `local`.

    Returns:
        The report (`report.build`), with the chain, what was left out, and seconds.

    Raises:
        SteelError: a file, row, chain or operator that cannot be used, or no environment; nothing is written then.
        Crashed: data-juicer's process did not come to its end; nothing is written then.
    """
    started = time.monotonic()
    target = Path(output).resolve()
    if report and Path(report).suffix != ".json":
        raise SteelError("the report is JSON", report, "name it FILE.json; the table goes to FILE.md beside it")
    papers = {"json": Path(report), "md": Path(report).with_suffix(".md")} if report else {}
    papers |= {"png": Path(picture)} if picture else {}
    files = _check_paths(inputs, target, list(papers.values()))
    todo = chains.runnable(chains.load(chain), models, bool(ray))
    interpreter = _interpreter(python)
    aside = target.with_name(f"{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        rows_in = _number(files, aside / "rows.parquet")
        log.info("%s rows through %d operators of %s ...", f"{sum(rows_in.values()):,}", len(todo.operators), todo.name)
        with tempfile.TemporaryDirectory(prefix="steel-") as short:
            found = _data_juicer(interpreter, todo, aside, short, workers, models, ray)
        rows_out = _join(files, aside / "kept.parquet", aside / target.name)
        account = {
            "chain": todo.name, "data_juicer": found["data_juicer"], "executor": "ray" if ray else "default",
            **reports.build(found["steps"], rows_in, rows_out),
            "left_out": [{"operator": str(operator), "reason": reason} for operator, reason in todo.left_out],
        }  # fmt: skip
        account["seconds"] = round(time.monotonic() - started, 1)
        _publish(account, papers, aside / target.name, target)
    except OSError as error:
        remedy = "there must be room for about twice the text; nothing was written"
        raise SteelError(f"a file could not be read or written: {error}", aside, remedy) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for operator, reason in todo.left_out:
        log.warning("left out: %s (%s)", operator, reason)
    log.info(
        "%s: %s of %s rows kept (%.1f s)", target, f"{account['kept']:,}", f"{account['rows_in']:,}", account["seconds"]
    )
    return account


def _check_paths(inputs: Sequence[str | os.PathLike[str]], output: Path, papers: Sequence[Path]) -> list[Path]:
    files = [Path(path) for path in inputs]
    taken = {}
    for path in files:
        if not path.is_file():
            raise SteelError("there is no such input file", path, "name jsonl files, as `prepare` writes them")
        taken[path.resolve()] = "one of the inputs"
    for name, path in (("output", output), *(("report or picture", paper) for paper in papers)):
        if path.is_dir():
            raise SteelError(f"the {name} is a folder", path, "name a file")
        if not path.resolve().parent.is_dir():
            raise SteelError(f"the folder of the {name} does not exist", path, "make it first")
        if path.resolve() in taken:
            raise SteelError(f"the {name} is {taken[path.resolve()]}", path, f"choose another {name}")
        taken[path.resolve()] = f"the {name}, too"
    return files


def _interpreter(python: str | os.PathLike[str] | None) -> Path:
    path = Path(python) if python else Path(sys.prefix) / "clean-venv" / "bin" / "python"
    if not path.is_file() or not os.access(path, os.X_OK):
        raise SteelError("data-juicer's environment is not there", path, _INSTALL)
    return path.absolute()  # not resolved: a link out of a virtual environment is its identity


def _rows(files: Sequence[Path]) -> Iterator[tuple[Path, int, bytes]]:
    """(file, line number, line) of every line that is not empty; a byte order mark is no part of the first."""
    for path in files:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    yield path, number, line.rstrip(b"\r\n")


def _number(files: Sequence[Path], target: Path) -> dict[str, int]:
    """Write text, row number and source of every row; returns the rows of each source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.large_string()), ("row", pa.int64()), ("source", pa.string())])
    counts: dict[str, int] = {}
    batch: list[tuple[str, int, str]] = []
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:

        def flush() -> None:
            columns = [pa.array(column, type=field.type) for column, field in zip(zip(*batch), schema)]  # noqa: B905
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            batch.clear()

        for position, (path, number, line) in enumerate(_rows(files)):
            row = _row(path, number, line)
            source = row.get("source")
            source = source if isinstance(source, str) and source else path.stem
            counts[source] = counts.get(source, 0) + 1
            batch.append((row["text"], position, source))
            if len(batch) == _ROWS:
                flush()
        if batch:
            flush()
    if not counts:
        where = ", ".join(str(path) for path in files)
        raise SteelError("the input holds no rows", where, "an empty file has nothing to clean")
    return counts


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        remedy = "`prepare` drops and counts such rows: clean what it wrote"
        raise SteelError(f"not a JSON row: {error}", f"{path}, line {number}", remedy) from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        remedy = "a row is an object with a string under `text`, as `prepare` writes it"
        raise SteelError("the row has no text", f"{path}, line {number}", remedy)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SteelError(
            "the text holds half of a surrogate pair", f"{path}, line {number}", "`prepare` rejects such rows"
        ) from None
    return row


def _data_juicer(
    interpreter: Path, chain: chains.Chain, aside: Path, short: str, workers: int | None, models: Any, ray: str | None
) -> dict[str, Any]:
    """Run worker.py; returns its counts. Leaves `kept.parquet` in `aside`: a file, or on Ray a folder of files.

    `short` is an empty folder with a short name: a way to `aside` for sockets, whose paths hold 107 bytes.
    """
    import yaml

    here = Path(__file__).parent
    config = {
        "project_name": "megatron-steel-clean", "dataset_path": str(aside / "rows.parquet"),
        "export_path": str(aside / "kept.parquet"), "export_type": "parquet", "work_dir": str(aside / "work"),
        "np": workers or os.cpu_count() or 1, "text_keys": "text",
        "skip_op_error": False,  # data-juicer's default replaces a row that fails by nothing, silently
        "open_tracer": False, "open_monitor": False, "op_fusion": False,  # fused filters cannot be counted apart
        "use_cache": False, "temp_dir": f"{short}/t", "ds_cache_dir": str(aside / "cache"),
        "custom_operator_paths": [str(here / "steel_operators")],
        "executor_type": "ray" if ray else "default",
        "process": [{operator.name: operator.parameters or None} for operator in chain.operators],
    }  # fmt: skip
    if ray:
        config["ray_address"] = ray
    (aside / "tmp").mkdir()
    os.symlink(aside / "tmp", f"{short}/t")
    (aside / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "UV_"))}
    environment |= {**_NO_NETWORK, "DATA_JUICER_CACHE_HOME": str(aside / "cache"), "HF_HOME": str(aside / "cache")}
    if models:
        environment["DATA_JUICER_EXTERNAL_MODELS_HOME"] = str(Path(models).resolve())
    command = [str(interpreter), str(here / "worker.py"), str(aside / "config.yaml"), str(aside / "result.json")]
    code, said = _wait(command, environment, aside)
    result = json.loads((aside / "result.json").read_text(encoding="utf-8")) if (aside / "result.json").exists() else {}
    if "what" in result:
        raise SteelError(result["what"], f"chain {chain.name}", result["remedy"])
    if code or "steps" not in result:
        if "No module named 'data_juicer'" in said:
            raise SteelError("data-juicer is not in this environment", interpreter, _INSTALL)
        raise _failure(code, result.get("failed"), said, chain.name)
    return result


def _failure(code: int, failed: str | None, said: str, chain: str) -> SteelError:
    """What a process that came to no result is called: one that was killed, or lost one of its own, is no bad input."""
    last_words = f"nothing was written; data-juicer's last words:\n{said}"
    if code < 0 or code > 128 or "abruptly died" in (failed or ""):  # so `datasets` calls a worker that was killed
        what = failed or f"exit code {code} (minus a signal's number, or 128 and that number: 9 is SIGKILL)"
        remedy = "look for a lack of memory (fewer --workers take less), and start it again; "
        return Crashed(f"data-juicer's process crashed: {what}", f"chain {chain}", remedy + last_words)
    what = f"data-juicer failed: {failed}" if failed else f"data-juicer ended with exit code {code}"
    return SteelError(what, f"chain {chain}", f"mend the chain or the environment; {last_words}")


def _wait(command: list[str], environment: dict[str, str], aside: Path) -> tuple[int, str]:
    """Run to the end; returns the exit code and the last lines said. What it started ends with this process."""
    with open(aside / "log", "w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=environment, cwd=aside, start_new_session=True
        )
        try:
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        return code, "\n".join(said.read().strip().splitlines()[-12:])


def _join(files: Sequence[Path], kept: Path, target: Path) -> int:
    """Write the kept rows in input order, each as it came, but for its text. Returns their number."""
    survivors = _survivors(kept)
    wanted = next(survivors, None)
    rows = 0
    with open(target, "wb") as out:
        for position, (path, number, line) in enumerate(_rows(files)):
            if wanted is None:
                break
            if wanted[0] != position:
                continue
            row = _row(path, number, line)
            if row["text"] != wanted[1]:
                line = _with_text(line.decode(), wanted[1]).encode()
            out.write(line + b"\n")
            rows += 1
            wanted = next(survivors, None)
        if wanted is not None:
            raise RuntimeError(f"data-juicer exported row {wanted[0]}, which was not given, or not in order")
        out.flush()
        os.fsync(out.fileno())
    return rows


def _survivors(kept: Path) -> Iterator[tuple[int, str]]:
    """(row number, text), ascending: files in the order of their first row."""
    import pyarrow.parquet as pq

    first = {}
    for path in kept.rglob("*.parquet") if kept.is_dir() else [kept]:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows:
                first[path] = next(file.iter_batches(1, columns=["row"]))["row"][0].as_py()
    for path in sorted(first, key=first.__getitem__):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS, columns=["row", "text"]):
                yield from zip(batch["row"].to_pylist(), batch["text"].to_pylist(), strict=True)


def _with_text(line: str, text: str) -> str:
    """A row, an object with `text`, with another text; numbers, spaces and escapes of the rest stay as written."""
    scan, skip = json.JSONDecoder().raw_decode, lambda at: _SPACE.match(line, at).end()  # type: ignore[union-attr]
    span, at = (0, 0), line.index("{") + 1
    while True:
        key, at = scan(line, skip(at))
        start = skip(skip(at) + 1)  # behind the colon
        _, at = scan(line, start)
        if key == "text":
            span = start, at  # of several the last, as every reader takes it
        at = skip(at)
        if line[at] == "}":
            return line[: span[0]] + json.dumps(text, ensure_ascii=False) + line[span[1] :]
        at += 1


def _publish(account: dict[str, Any], papers: dict[str, Path], made: Path, target: Path) -> None:
    """Write report, table and picture aside, and rename all, the output last: where it is, they are, too."""
    aside = {kind: path.with_name(f"{path.name}.partial") for kind, path in papers.items()}
    try:
        for kind, path in aside.items():
            if kind == "png":
                reports.draw({account["chain"]: account}, path)
            elif kind == "json":
                path.write_text(json.dumps(account, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            else:
                path.write_text(reports.table(account), encoding="utf-8")
        for kind, path in aside.items():
            os.replace(path, papers[kind])
        os.replace(made, target)
    finally:
        for path in aside.values():
            with contextlib.suppress(OSError):
                path.unlink()
