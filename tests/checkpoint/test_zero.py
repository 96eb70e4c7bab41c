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


def test_streaming_holds_no_more_than_a_tensor(tmp_path):
    """64 MB of weights and twice as much of moments in two shards of ZeRO-2; anonymous memory grows by less than three
    tensors of 4 MB (mapped pages of the files are the kernel's to drop). In pieces the mapped pages do not stay either
    (given back here after every 8 MB), and what is read a second time is the same."""
    engine = tmp_path / "engine"
    engine.mkdir()
    shapes = {f"w{n}": torch.Size([1024, 1024]) for n in range(16)}
    half = torch.arange(8 * 2**20, dtype=torch.float32)
    states = {"exp_avg": half + 1, "exp_avg_sq": half + 2, "step": torch.tensor(7.0)}
    for rank in range(2):
        inner = {"state": {0: states}, "param_groups": [{"params": [0]}]}
        part = {"single_partition_of_fp32_groups": [half + 2.0**23 * rank], "base_optimizer_state": inner}
        torch.save({"optimizer_state_dict": part}, engine / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    first = {"param_shapes": [shapes], "module": {}, "buffer_names": [], "global_steps": 7, "global_samples": 56,
             "skipped_steps": 0}  # fmt: skip
    torch.save(first, engine / "mp_rank_00_model_states.pt")
    del half, states, inner, part
    code = """
import sys
from pathlib import Path
import torch
from megatron_steel.checkpoint import zero
from megatron_steel.checkpoint.zero import contents, stream_pieces, stream_weights
zero._KEPT_PIECES = 2
def anonymous(kind="RssAnon"):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(kind))
torch.cat([torch.zeros(9), torch.zeros(9)])
before, most = anonymous(), 0.0
for number, (name, weight) in enumerate(stream_weights(Path(sys.argv[1]))):
    assert name == f"w{number}" and float(weight[0, 0]) == number * 2.0**20
    most = max(most, anonymous() - before)
opened = contents(Path(sys.argv[1]))
assert opened.step == 7
for parameter in opened.trained:
    parameter.read("exp_avg_sq")
    most = max(most, anonymous() - before)
files = 0.0
del opened, parameter, weight
before = anonymous("RssFile")
opened = contents(Path(sys.argv[1]))
for _ in range(2):
    for number, (name, weight) in enumerate(stream_pieces(opened)):
        at = number * 2**20
        for piece in weight.pieces:
            assert torch.equal(piece, torch.arange(at, at + len(piece), dtype=torch.float32)), name
            at += len(piece)
            files = max(files, anonymous("RssFile") - before)
        assert at == (number + 1) * 2**20
print(most, files)
"""
    # glibc keeps what large tensors leave behind unless its threshold is fixed: then each goes back at once.
    exact = one_thread() | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=exact)
    assert done.returncode == 0, done.stderr
    own, mapped = map(float, done.stdout.split())
    assert own < 12
    assert mapped < 24
