"""`clean`: what is refused before data-juicer starts, and the real data-juicer, where its environment lies beside ours."""

import json
import os
import sys
from pathlib import Path

import pytest

from megatron_steel.data.clean.run import clean
from megatron_steel.errors import SteelError

ROOTS = (Path(sys.prefix), Path(__file__).resolve().parents[2] / ".venv")
FOUND = [path for root in ROOTS if (path := root / "clean-venv" / "bin" / "python").exists()]
data_juicer = pytest.mark.skipif(not FOUND, reason="no data-juicer environment (bash launch/clean_environment.sh)")

CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n你好，请问今天的天气怎么样？<|im_end|>\n<|im_start|>assistant\n今天晴，适合出门散步。<|im_end|>\n"
    "<|im_start|>user\n你好，请问今天的天气怎么样？<|im_end|>\n<|im_start|>assistant\n今天晴，适合出门散步。"
)
PROSE = "《清明》是唐代诗人杜牧的作品：“清明时节雨纷纷，路上行人欲断魂。”……（全文见下）；若 a<b and c>d，则停！"
LONG_LINE = "这是一个只有一行的中文文档，没有换行。" + "".join(
    f"第{i}句写的是第{i * 7 % 113}件不同的事情，" for i in range(90)
)
POEM = "\n".join(["床前明月光，", "疑是地上霜。", "举头望明月，", "低头思故乡。"])
TEXTS = {
    "chat": CHAT, "prose": PROSE, "line": LONG_LINE, "line again": LONG_LINE + "完。", "poem": POEM, "empty": "",
    "short": "好", "repeats": "一样的话说了很多遍。" * 80,
    "link": "资料在https://example.org/a_b?c=1，请先读完第三章，再回答后面的四个问题。写信到 a@b.example.org 也可以。",
}  # fmt: skip

PYTHON = (
    "#!/usr/bin/env python\n# Sorts the rows of a table, and says how many there were in the end.\n"
    "import sys\n\n\ndef middle(rows, start, end):\n\tif start < end and end > 0:\n\t\treturn rows[start:end]\n"
    "\ttotal = weights@rows.sum()  # 矩阵乘法，“加权”求和；\n\treturn total\n\n\nprint(middle(sys.argv, 1, 2))\n"
)
CPP = (
    "#include <iostream>\n#include <vector>\n\ntemplate <typename T>\nvoid show(const std::vector<T>& rows) {\n"
    '    for (const auto& row : rows) {\n        std::cout << row << "\\t" << std::endl;\n    }\n}\n\n'
    "int main() {\n    std::vector<int> rows = {3, 1, 4, 1, 5, 9, 2, 6};\n    show(rows);\n    return 0;\n}\n"
)
MAKE = "all: build test\n\nbuild:\n\tgcc -O2 -Wall -o tool main.c list.c tree.c\n\ntest: build\n\t./tool --self-test --verbose one two three four five six seven eight\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def fake_python(tmp_path_factory):
    """Stands for an interpreter in checks that come before it is started."""
    path = tmp_path_factory.mktemp("bin") / "python"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"content": "no text"}\n', "line 1"),
        ('{"text": "a"}\n{"text": 3}\n', "line 2"),
        ('{"text": null}\n', "the row has no text"),
        ('["text"]\n', "the row has no text"),
        ('{"text": "a"\n', "not a JSON row"),
        ('{"text": "\\ud800"}\n', "surrogate"),
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(tmp_path, fake_python, content, says):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(content)
    with pytest.raises(SteelError, match=says):
        clean([rows], "text", tmp_path / "out.jsonl", python=fake_python)
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_bad_utf8_is_refused(tmp_path, fake_python):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(SteelError, match="not a JSON row"):
        clean([rows], "text", tmp_path / "out.jsonl", python=fake_python)


def test_paths_are_checked_first(tmp_path, fake_python):
    rows = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    for inputs, output, says in (
        ([tmp_path / "none.jsonl"], "out.jsonl", "no such input file"),
        ([rows], "rows.jsonl", "one of the inputs"),
        ([rows], ".", "a folder"),
        ([rows], "none/out.jsonl", "does not exist"),
    ):
        with pytest.raises(SteelError, match=says):
            clean(inputs, "text", tmp_path / output, python=fake_python)
    (tmp_path / "r.md").mkdir()
    for report, picture, says in (
        (tmp_path / "r.json", None, "picture is a folder"),  # the table's name
        (None, tmp_path, "picture is a folder"),
        (None, rows, "one of the inputs"),
        (None, tmp_path / "out.jsonl", "the output, too"),
        (tmp_path / "none" / "r.json", None, "does not exist"),
    ):
        with pytest.raises(SteelError, match=says):
            clean([rows], "text", tmp_path / "out.jsonl", None, report, picture, python=fake_python)
    with pytest.raises(SteelError, match=r"clean_environment\.sh"):
        clean([rows], "text", tmp_path / "out.jsonl", python=tmp_path / "none")


def test_a_process_that_fails_leaves_an_older_output(tmp_path, fake_python):
    rows = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    (tmp_path / "out.jsonl").write_text("older\n")
    with pytest.raises(SteelError, match="exit code 1"):
        clean([rows], "text", tmp_path / "out.jsonl", python=fake_python)
    assert (tmp_path / "out.jsonl").read_text() == "older\n"
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "rows.jsonl"]


def test_an_environment_without_data_juicer_is_named(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(SteelError, match="data-juicer is not in this environment"):
        clean([rows], "text", tmp_path / "out.jsonl", python=sys.executable)


STAND_IN = """#!{python}
import json, os, signal, sys
import pyarrow as pa, pyarrow.parquet as pq, yaml

config = yaml.safe_load(open(sys.argv[2]))
if {dies}:
    os.kill(os.getpid(), signal.SIGKILL)
rows = pq.read_table(config["dataset_path"])
texts = pa.array([text.replace("x", "“y”\\n") for text in rows["text"].to_pylist()], pa.large_string())
pq.write_table(pa.table({{"row": rows["row"], "text": texts}}), config["export_path"])
sources = rows["source"].to_pylist()
step = {{"operator": "load", "seconds": 0.0, "by_source": {{source: sources.count(source) for source in sources}}}}
json.dump({{"data_juicer": "none", "steps": [step]}}, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """stand_in(dies): in data-juicer's place, to test what lies around it: every x of a text becomes something else."""

    def make(dies=False):
        path = tmp_path_factory.mktemp("bin") / "python"
        path.write_text(STAND_IN.format(python=sys.executable, dies=dies))
        path.chmod(0o755)
        return path

    return make


def test_a_row_whose_text_changed_keeps_the_rest_as_it_was_written(tmp_path, stand_in):
    rows = tmp_path / "rows.jsonl"
    row = '{"a" :[1e400,1.10,-0.0],"te\\u0078t":"no, x", "text": TEXT ,"text2":"x","b":{"text":"x"},"c":"\\ud800\\/"}'
    other = '{"text":TEXT}'
    lines = [row.replace("TEXT", '"x\\u4f60"'), row.replace("TEXT", '"\\u4f60"'), other.replace("TEXT", '"x"')]
    rows.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    clean([rows], "text", tmp_path / "out.jsonl", python=stand_in())
    expected = [row.replace("TEXT", '"“y”\\n你"'), lines[1], other.replace("TEXT", '"“y”\\n"')]
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines() == expected


def test_a_killed_process_is_no_bad_input(tmp_path, stand_in):
    rows = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(SteelError, match="crashed: exit code -9") as error:
        clean([rows], "text", tmp_path / "out.jsonl", python=stand_in(dies=True))
    assert error.value.exit_code == 70
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("which", ["report", "picture"])
def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path, stand_in, which):
    rows = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    papers = {"report": tmp_path / "r.json", "picture": tmp_path / "p.png"}
    papers[which] = tmp_path / ("l" * 249 + papers[which].suffix)  # a name that is too long aside
    with pytest.raises(SteelError, match="File name too long"):
        clean([rows], "text", tmp_path / "out.jsonl", python=stand_in(), **papers)
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_report_table_and_picture_come_with_the_output(tmp_path, stand_in):
    rows = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    clean([rows], "text", tmp_path / "out.jsonl", None, tmp_path / "r.json", tmp_path / "p.png", python=stand_in())
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "p.png", "r.json", "r.md", "rows.jsonl"]


@pytest.fixture(scope="module")
def cleaned_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rows = [{"text": text, "source": "tests", "file": "a.json", "row": name, "more": {"n": [1, None]}}
            for name, text in TEXTS.items()]  # fmt: skip
    half = len(rows) // 2
    inputs = [write(folder / "one.jsonl", rows[:half]), write(folder / "two.jsonl", rows[half:])]
    account = clean(inputs, "text", folder / "out.jsonl", 1, folder / "out.json", folder / "out.png", python=FOUND[0])
    return rows, read(folder / "out.jsonl"), account, folder


@data_juicer
def test_text_keeps_order_and_every_key(cleaned_text):
    rows, out, _, _ = cleaned_text
    expected = [row for row in rows if row["row"] not in ("empty", "short", "line again")]
    assert [row["row"] for row in out] == [row["row"] for row in expected]
    for before, after in zip(expected, out, strict=True):
        assert {**before, "text": None} == {**after, "text": None}


@data_juicer
def test_text_keeps_markers_punctuation_and_refrains(cleaned_text):
    _, out, _, _ = cleaned_text
    texts = {row["row"]: row["text"] for row in out}
    for name in ("chat", "prose", "line", "poem"):
        assert texts[name] == TEXTS[name]
    assert texts["repeats"] == "一样的话说了很多遍。"
    assert texts["link"] == TEXTS["link"].replace("https://example.org/a_b?c=1", "").replace("a@b.example.org", "")


@data_juicer
def test_the_account_names_who_dropped_each_row(cleaned_text):
    _, out, account, folder = cleaned_text
    dropped = {entry["operator"]: entry["dropped"] for entry in account["operators"] if entry["dropped"]}
    assert sum(dropped.values()) == account["dropped"] == len(TEXTS) - len(out)
    assert dropped == {
        "alphanumeric_filter": 1, "average_line_length_filter": 1, "document_simhash_deduplicator": 1
    }  # fmt: skip
    assert account["left_out"][0]["operator"] == "perplexity_filter"
    assert json.loads((folder / "out.json").read_text()) == account
    assert (folder / "out.md").read_text().startswith("| operator |")
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.partial"))


@data_juicer
def test_code_stays_as_it_was_written(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"text": text} for text in (PYTHON, CPP, MAKE)])
    clean([rows], "code", tmp_path / "out.jsonl", 1, python=FOUND[0])
    assert (tmp_path / "out.jsonl").read_bytes() == rows.read_bytes()


@data_juicer
def test_an_unknown_operator_is_named(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    (tmp_path / "chain.yaml").write_text("process:\n- text_lenght_filter:\n")
    with pytest.raises(SteelError, match="no operator text_lenght_filter") as error:
        clean([rows], str(tmp_path / "chain.yaml"), tmp_path / "out.jsonl", 1, python=FOUND[0])
    assert "text_length_filter" in error.value.remedy


@data_juicer
@pytest.mark.slow
def test_a_wrong_parameter_is_named(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    (tmp_path / "chain.yaml").write_text("process:\n- text_length_filter: {minimum: 3}\n")
    with pytest.raises(SteelError, match="minimum"):
        clean([rows], str(tmp_path / "chain.yaml"), tmp_path / "out.jsonl", 1, python=FOUND[0])


@data_juicer
@pytest.mark.slow
def test_the_last_line_of_a_failure_comes_first(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    (tmp_path / "chain.yaml").write_text("process:\n- clean_email_mapper: {pattern: '(['}\n")
    with pytest.raises(SteelError, match=r"^data-juicer failed: \S+error: unterminated character set") as error:
        clean([rows], str(tmp_path / "chain.yaml"), tmp_path / "out.jsonl", 1, python=FOUND[0])
    assert "\n" not in error.value.what
    assert error.value.exit_code == 78


@data_juicer
@pytest.mark.slow
def test_a_missing_package_is_named_not_installed(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"text": "some words to be looked at by a spelling model"}])
    (tmp_path / "chain.yaml").write_text("process:\n- nlpaug_en_mapper:\n")
    with pytest.raises(SteelError, match="lacks the package nlpaug"):
        clean([rows], str(tmp_path / "chain.yaml"), tmp_path / "out.jsonl", 1, python=FOUND[0])


@data_juicer
@pytest.mark.slow
def test_the_original_chain_damages_what_the_corrected_one_keeps(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"text": text} for text in (PYTHON, CPP, MAKE)])
    clean([rows], "code-original", tmp_path / "out.jsonl", 1, python=FOUND[0])
    texts = "".join(row["text"] for row in read(tmp_path / "out.jsonl"))
    assert "\t" not in texts
    assert "#include" not in texts
    assert "start:end" not in texts


@data_juicer
@pytest.mark.slow
def test_workers_change_nothing(tmp_path, cleaned_text):
    rows, out, _, _ = cleaned_text
    again = write(tmp_path / "rows.jsonl", rows)
    clean([again], "text", tmp_path / "out.jsonl", 3, python=FOUND[0])
    assert read(tmp_path / "out.jsonl") == out


@data_juicer
@pytest.mark.slow
def test_ray_gives_the_same_filters(tmp_path):
    chain = "process:\n- clean_email_mapper:\n- text_length_filter: {min_len: 10}\n- alphanumeric_filter: {max_ratio: 0.98}\n"
    (tmp_path / "chain.yaml").write_text(chain)
    rows = write(tmp_path / "rows.jsonl", [{"text": text, "row": name} for name, text in TEXTS.items() if text])
    for name, ray in (("here", None), ("ray", "local")):
        clean([rows], str(tmp_path / "chain.yaml"), tmp_path / f"{name}.jsonl", 1, python=FOUND[0], ray=ray)
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
