"""The stream of fp32 weights equals the weights that were trained, for every ZeRO stage, 1 and 2 ranks, tied or not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import free_port, one_thread

from megatron_steel.checkpoint.zero import stream_weights
from megatron_steel.errors import SteelError

CASES = [(0, "bf16", 2, False), (1, "bf16", 2, True), (3, "bf16", 2, True)]


@pytest.mark.parametrize(("stage", "precision", "ranks", "tied"), CASES)
def test_stream_equals_the_weights_in_the_engine(stage, precision, ranks, tied, tiny_recipe, tmp_path):
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    script = str(Path(__file__).with_name("train_and_dump.py"))
    words = [str(tiny_recipe), str(tmp_path), f"deepspeed.config=zero{stage}.json", f"train.precision={precision}",
             f"model.config.tie_word_embeddings={str(tied).lower()}"]  # fmt: skip
    launcher = (
        [deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port())] if ranks > 1 else [sys.executable]
    )
    done = subprocess.run([*launcher, script, *words], capture_output=True, text=True, env=one_thread())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    trained = torch.load(tmp_path / "trained.pt")
    streamed = dict(stream_weights(tmp_path / "checkpoint"))
    assert sorted(streamed) == sorted(trained)
    assert ("lm_head.weight" in streamed) is not tied
    for name, weight in trained.items():
        assert streamed[name].dtype == torch.float32
        assert torch.equal(streamed[name], weight), name
    assert (
        json.loads((tmp_path / "moved.json").read_text()) > 1e-3
    )  # training changed them, so equality means something


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(SteelError, match="no engine/ folder"):
        next(stream_weights(tmp_path))
    (tmp_path / "engine").mkdir()
    with pytest.raises(SteelError, match="no DeepSpeed model states"):
        next(stream_weights(tmp_path))
