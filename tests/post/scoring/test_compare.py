"""Several exports in one call: their order, the table, what TensorBoard gets, and the picture beside published scores."""

import json
import shutil

import pytest
from toy_models import write_cmmlu, write_letters

from megatron_steel import cli
from megatron_steel.errors import SteelError
from megatron_steel.post.scoring.compare import model_folders, require_steps, step_of
from megatron_steel.post.scoring.picture import bars, draw
from megatron_steel.post.scoring.published import PUBLISHED

TASK = "cmmlu"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with three exports, the last of a model that its audit says sees the future."""
    folder = tmp_path_factory.mktemp("run")
    for step in (20, 3, 100):
        write_letters(folder / "exports" / f"step-{step:08}", seed=step)
    report = {"causal": False, "verdict": "NOT CAUSAL: found last week"}
    (folder / "exports" / "step-00000100" / "audit.json").write_text(json.dumps(report))
    for step in (3, 20):
        (folder / "exports" / f"step-{step:08}" / "audit.json").write_text(
            json.dumps({"causal": True, "verdict": "causal: yes"})
        )
    return folder


def test_exports_are_scored_in_order_and_read_back_from_tensorboard(run, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_cmmlu(tmp_path, ["agronomy", "virology"])
    files = [tmp_path / name for name in ("s.json", "i.jsonl", "p.png")]
    command = ["evaluate", str(run), "--tasks", TASK, "--data", str(tmp_path), "--json", str(files[0]), "--items", str(files[1]),
               "--picture", str(files[2]), "--tensorboard", str(tmp_path / "board"), "--protocol", "both", "--max-new-tokens", "2"]  # fmt: skip
    assert cli.main(command) == 0
    said = capsys.readouterr()
    results = json.loads(files[0].read_text())["checkpoints"]
    assert [result[TASK]["protocol"]["step"] for result in results] == [3, 20, 100]
    assert [result[TASK]["protocol"]["causal"] for result in results] == [True, True, False]
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    for result in results:
        for score in (result[TASK], result[TASK][("steel-chat")]):
            mine = [
                x["right"]
                for x in lines
                if (x["model"], x["protocol"]) == (score["protocol"]["model"], score["protocol"]["name"])
            ]
            assert (sum(mine) / len(mine), len(mine)) == (score["acc"], score["n"])
    assert len({result[TASK]["acc"] for result in results}) > 1  # so that an exchange would be seen

    board = EventAccumulator(str(tmp_path / "board")).Reload()
    found = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    for protocol, scores in (
        ("loglikelihood", [result[TASK] for result in results]),
        ("steel-chat", [result[TASK]["steel-chat"] for result in results]),
    ):
        tag = f"evaluate/{TASK}/{protocol}"
        assert [step for step, _ in found[tag]] == [3, 20]
        assert [step for step, _ in found[f"{tag} (sees future)"]] == [100]
        values = [value for _, value in [*found[tag], *found[f"{tag} (sees future)"]]]
        assert values == pytest.approx([score["acc"] for score in scores], abs=1e-7)
        assert [value for _, value in found[f"{tag}/STEM"]] == pytest.approx(
            [score["categories"]["STEM"]["acc"] for score in scores[:2]], abs=1e-7
        )
    table = said.out[said.out.index("model  ") :].splitlines()
    assert [line.split()[1] for line in table[1:4]] == ["3", "20", "100"]
    assert [f"{result[TASK]['acc']:.2%}" == line.split()[2] for result, line in zip(results, table[1:4], strict=True)]
    assert table[3].endswith("sees the future")
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["board", "dev", "i.jsonl", "p.png", "s.json", "test"]


def test_published_bars_are_marked_and_never_ours(tmp_path):
    about = {"model": "mine", "step": 7, "loss_sees_future": True}
    score = {"acc": 0.5, "protocol": {"name": "loglikelihood", **about}, "few_shot": 5, "truncated": 2, "absent": ["x"]}
    chat = {"acc": 0.25, "protocol": {"name": "steel-chat", **about}, "few_shot": 0, "absent": ["x"]}
    result = {TASK: {**score, "steel-chat": chat}}
    found = bars([result], TASK)
    assert [(bar["label"], bar["percent"]) for bar in found if bar["ours"]] == [("mine", 50.0), ("mine", 25.0)]
    sources = [bar["source"] for bar in found if bar["ours"]]
    assert sources == [
        "this project: loglikelihood, 5-shot, 2 prompts cut off, 1 subjects left out, SEES THE FUTURE",
        "this project: steel-chat, 0-shot, 1 subjects left out, SEES THE FUTURE",
    ]
    others = {bar["label"]: bar["percent"] for bar in found if not bar["ours"]}
    assert others == {row.model: row.scores[TASK] for row in PUBLISHED}
    assert all(bar["source"].startswith("published: Steel-LLM README") for bar in found if not bar["ours"])
    with pytest.raises(SteelError, match="the picture could not be written"):
        draw([result], tmp_path / "none" / "p.png")


def test_steps_come_from_the_name_or_the_model_card(tmp_path):
    def export(name: str, card: str = "") -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "README.md").write_text(card)

    export("chat", "| training | 1,200 steps, 9 tokens |")
    export("checkpoint-90")
    export("other")
    assert [step_of(tmp_path / name) for name in ("chat", "checkpoint-90", "other")] == [1200, 90, None]
    assert [path.name for path in model_folders([str(tmp_path)])] == ["other", "checkpoint-90", "chat"]
    with pytest.raises(SteelError, match="the step of this export is not known"):
        require_steps(model_folders([str(tmp_path)]))
    shutil.copytree(tmp_path / "chat", tmp_path / "step-1200")
    with pytest.raises(SteelError, match="two exports are of step 1200"):
        require_steps([tmp_path / "chat", tmp_path / "step-1200"])
    with pytest.raises(SteelError, match="named twice"):
        model_folders([str(tmp_path / "chat"), str(tmp_path)])
