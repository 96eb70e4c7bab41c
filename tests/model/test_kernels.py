"""What the recipe's `kernels` section comes to on a device, and what is said where a kernel cannot run."""

import sys

import pytest
import torch

from megatron_steel.errors import SteelError
from megatron_steel.model import kernels as kernels_of
from megatron_steel.model.attention import Attention
from megatron_steel.model.build import build_config, construct
from megatron_steel.model.kernels import Choice, apex_problem, choose
from megatron_steel.recipe import Kernels, Model

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def model(kind="steel", **fields):
    with torch.device("meta"):
        return construct(build_config(Model(kind, (SIZES if kind != "gpt2" else {}) | fields)), torch.float32)


def test_auto_on_a_cpu_is_the_plain_road_and_the_default():
    for documents in (False, True):
        assert choose(Kernels(), model(), CPU, "fp32", documents) == Choice()
    assert str(Choice()) == "head chunked, attention the class's own, norm, rope and swiglu by torch"


@pytest.mark.parametrize(
    ("kernels", "documents", "said"),
    [
        (
            Kernels(attention="cudnn"),
            False,
            "attention by cudnn cannot run here: it needs a CUDA device, and this is cpu",
        ),
        (Kernels(attention="efficient"), False, "it needs a CUDA device"),
        (Kernels(attention="flex"), True, "it needs a CUDA device"),
        (Kernels(attention="flash_attention_2"), False, "it needs a CUDA device"),
        (Kernels(attention="flash_attention_3"), False, "it needs a CUDA device"),
        (Kernels(head="liger"), False, "Liger's kernels need a CUDA device, and this is cpu"),
        (Kernels(fused="liger"), False, "Liger's kernels need a CUDA device"),
        (Kernels(fused="apex"), False, "NVIDIA apex's kernels need a CUDA device, and this is cpu"),
        (Kernels(fused="liger", compile=True), False, "inductor fuses it"),
    ],
)
def test_a_kernel_that_cannot_run_says_why_and_where(kernels, documents, said):
    with pytest.raises(SteelError, match=said) as raised:
        choose(kernels, model(), CPU, "fp32", documents)
    assert "kernels." in str(raised.value)
    assert "auto" in str(raised.value)
    assert "pip install" not in raised.value.remedy  # nothing to install makes it run here


def test_what_a_cpu_can_do_by_name():
    chosen = choose(Kernels(head="plain", attention="math", fused="torch", compile=False), model(), CPU, "fp32")
    assert chosen == Choice("plain", Attention("sdpa", ("math",)))
    assert choose(Kernels(attention="flash"), model(), CPU, "bf16").attention.backends == ("flash",)


def test_compile_by_name_needs_a_compiler(monkeypatch):
    assert choose(Kernels(compile=True), model(), CPU, "fp32").compile
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SteelError, match=r"a C\+\+ compiler .* is not on the path"):
        choose(Kernels(compile=True), model(), CPU, "fp32")


def test_classes_outside_the_graphs_are_named():
    lagged = model(FFN_type="softmoe_causal", causal_slots="lagged", n_experts=2, mlp_div_ratio=2)
    assert "compiled layer by layer but for SteelLaggedMixture" in str(choose(Kernels(compile=True), lagged, CPU))


def test_liger_that_is_not_installed_says_how_to_get_it(monkeypatch):
    """A device of type cuda is named, not used. On a CPU nothing that could be installed would help."""
    monkeypatch.setattr(kernels_of.importlib.util, "find_spec", lambda name: None)
    problem = kernels_of.liger_problem(torch.device("cuda"))
    assert problem == "liger-kernel is not installed"
    with pytest.raises(SteelError, match="pip install liger-kernel"):
        kernels_of._require(problem, kernels_of._LIGER, "kernels.fused", "liger")
    with pytest.raises(SteelError, match="Liger's kernels need a CUDA device") as raised:
        choose(Kernels(fused="liger"), model(), CPU, "fp32")
    assert "pip install" not in str(raised.value)


def test_the_apex_of_pypi_is_known_for_another_program(tmp_path, monkeypatch):
    """A device of type cuda is named, not used."""
    cuda = torch.device("cuda")
    assert apex_problem(cuda) == "NVIDIA apex is not installed"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex-0.9.10.dev0.dist-info").mkdir()
    (tmp_path / "apex-0.9.10.dev0.dist-info" / "METADATA").write_text("Name: apex\nVersion: 0.9.10.dev0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert apex_problem(cuda) == "the installed apex 0.9.10.dev0 is another program (PyPI's), not NVIDIA apex"
        (tmp_path / "apex" / "normalization").mkdir()
        (tmp_path / "apex" / "normalization" / "__init__.py").write_text("")
        kernels_of.importlib.invalidate_caches()
        assert "built without its CUDA extensions" in apex_problem(cuda)
        del sys.modules["apex.normalization"]
        (tmp_path / "apex" / "normalization" / "__init__.py").write_text("raise ImportError('undefined symbol')")
        assert apex_problem(cuda).endswith("built for another torch (undefined symbol)")
        with pytest.raises(SteelError, match=r"github\.com/NVIDIA/apex"):
            kernels_of._require(apex_problem(cuda), kernels_of._APEX, "kernels.fused", "apex")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            del sys.modules[name]


def test_classes_that_flex_attention_does_not_know_are_named():
    from megatron_steel.model import attention

    assert attention._flex_problem(model("gpt2"))[0] == "GPT2LMHeadModel does not know it"
    assert attention._flex_problem(model(attention_dropout=0.1))[0] == "it has no dropout"
    nanogpt = build_config(Model("nanogpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dropout": 0.1}))
    with torch.device("meta"):
        assert attention._flex_problem(construct(nanogpt, torch.float32))[0] == "it has no dropout"
