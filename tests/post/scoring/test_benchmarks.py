"""A benchmark folder is read as it is published, and one of another shape is named; the groupings cover every subject."""

import pytest
from toy_models import LETTERS, rows, write_ceval, write_cmmlu, write_letters, write_mmlu

from megatron_steel.errors import SteelError
from megatron_steel.post.scoring import categories
from megatron_steel.post.scoring.benchmarks import BENCHMARKS, document, question, read, shipped_files
from megatron_steel.post.scoring.evaluate import evaluate

pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
WRITE = {"ceval-valid": write_ceval, "cmmlu": write_cmmlu, "mmlu": write_mmlu}
SUBJECT = {"ceval-valid": "law", "cmmlu": "agronomy", "mmlu": "anatomy"}


@pytest.mark.parametrize("task", BENCHMARKS)
def test_rows_come_back_as_they_were_written(task, tmp_path):
    benchmark, subject = BENCHMARKS[task], SUBJECT[task]
    WRITE[task](tmp_path / benchmark.folder, [subject])
    found = read(benchmark, tmp_path)
    assert found == read(benchmark, tmp_path / benchmark.folder)  # the folder itself, or the one that holds it
    assert list(found) == [subject]
    published = rows(subject, benchmark.scored, 4)
    assert [(q.number, q.text, q.options, q.answer) for q in found[subject][benchmark.scored]] == [
        (i, row["question"], tuple(row[x] for x in LETTERS), row["answer"]) for i, row in enumerate(published)
    ]
    for asked in found[subject]["dev"]:
        assert question(benchmark, subject, asked.number, document(benchmark, asked)) == asked


def test_every_subject_stands_in_one_category_and_the_overlapping_ones_have_their_published_sizes():
    for task, table, overlapping, sizes in (
        ("ceval-valid", categories.CEVAL, "Hard", (20, 10, 11, 11, 8)),
        ("cmmlu", categories.CMMLU, "China specific", (17, 13, 22, 15, 15)),
    ):
        assert tuple(len(subjects) for subjects in table.values()) == sizes
        parted = [subject for name, subjects in table.items() if name != overlapping for subject in subjects]
        assert sorted(parted) == sorted(shipped_files(BENCHMARKS[task]))


@pytest.mark.parametrize(
    ("task", "old", "new", "named"),
    [
        ("ceval-valid", "answer", "solution", "the column 'answer' is missing"),
        ("ceval-valid", "law val 问题???2?", "", "question 3 has no question"),
        ("ceval-valid", "0,law val 问题?0?", "0,law val 问题?0?,1,2", "question 1 has 9 columns instead of 7"),
        ("cmmlu", "Question", "question", "the column 'Question' is missing"),
        ("cmmlu", ",A\n", ",E\n", "has the answer 'E'"),
        ("mmlu", "agronomy", "agronomy", "there is no mmlu subject here"),
        ("mmlu", "anatomy test 问题?0?,", "", "question 1 has 5 columns instead of 6"),
        ("mmlu", "anatomy", '"anatomy', "the file is not CSV"),
    ],
)
def test_a_file_of_another_shape_is_named(task, old, new, named, tmp_path):
    benchmark = BENCHMARKS[task]
    subject = "agronomy" if "agronomy" in old else SUBJECT[task]
    WRITE[task](tmp_path, [subject])
    file = tmp_path / benchmark.path(benchmark.scored, subject)
    text = file.read_bytes().decode().replace("\r\n", "\n")
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(SteelError, match=named):
        read(benchmark, tmp_path)


def test_a_scored_question_must_not_be_an_example(tmp_path):
    write_ceval(tmp_path, ["law"])
    dev, val = (tmp_path / split / f"law_{split}.csv" for split in ("dev", "val"))
    lines = val.read_text().splitlines()
    example = dev.read_text().splitlines()[1].rpartition(",")[0]  # without its explanation
    val.write_text("\n".join([lines[0], example, *lines[2:]]) + "\n")
    with pytest.raises(SteelError, match="stands in dev and in val"):
        read(BENCHMARKS["ceval-valid"], tmp_path)
    # The same words about other choices are another question: published files hold such pairs.
    val.write_text("\n".join([lines[0], example.replace(",", ",0", 2), *lines[2:]]) + "\n")
    assert len(read(BENCHMARKS["ceval-valid"], tmp_path)["law"]["val"]) == 4


def test_bad_commands_are_named_before_a_model_is_opened(tmp_path):
    write_ceval(tmp_path, ["law"])
    ask = {"models": str(tmp_path / "none"), "tasks": ["ceval-valid"], "data": str(tmp_path)}
    for changed, named in (
        ({"protocol": "best"}, "there is no protocol 'best'"),
        ({"tasks": ["hellaswag"]}, "'hellaswag' has no local form"),
        ({"tasks": ["hellaswag"], "protocol": "both"}, "does not know how to ask 'hellaswag'"),
        ({"tasks": ["hellaswag"], "picture": "p.png"}, "there is nothing to draw"),
        ({"json": str(tmp_path / "no" / "s.json")}, "the folder for the scores does not exist"),
        ({"items": str(tmp_path / "no" / "s.json")}, "the folder for the items does not exist"),
        ({"json": str(tmp_path)}, "a folder stands where the scores should go"),
        ({"items": str(tmp_path)}, "a folder stands where the items should go"),
        ({"picture": str(tmp_path)}, "a folder stands where the picture should go"),
        ({"tensorboard": str(tmp_path / "dev" / "law_dev.csv")}, "a file stands where TensorBoard's folder should go"),
        ({"tasks": ["ceval-valid", "cmmlu", "ceval-valid"]}, "the task 'ceval-valid' is named twice"),
        ({"tasks": []}, "no task is named"),
        ({"max_new_tokens": 0}, "0 new tokens are none"),
        ({"tensorboard": str(tmp_path / "board")}, "the step of this export is not known"),
        ({"data": str(tmp_path / "empty")}, "no ceval-valid subject"),
        ({}, r"no config\.json"),
    ):
        with pytest.raises(SteelError, match=named):
            evaluate(**{**ask, **changed})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dev", "val"]


def test_another_models_tokenizer_and_a_missing_template_are_named(tmp_path, capsys):
    import json

    write_ceval(tmp_path / "data", ["law"])
    write_letters(tmp_path / "model", template=None)
    write_letters(tmp_path / "chat")
    both = [str(tmp_path / name) for name in ("chat", "model")]
    with pytest.raises(SteelError, match="the tokenizer has no chat template"):
        evaluate(both, ["ceval-valid"], data=str(tmp_path / "data"), protocol="steel-chat")
    assert "chat" not in capsys.readouterr().out  # said before the first was scored
    file = tmp_path / "model" / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["vocab"] |= {f"extra{i}": 200 + i for i in range(9)}
    file.write_text(json.dumps(tree))
    with pytest.raises(SteelError, match="it is another model's"):
        evaluate(str(tmp_path / "model"), ["ceval-valid"], data=str(tmp_path / "data"))
