"""Host files, nodes that do not answer, and nodes that differ, without any node."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_steel import cli, hosts, node
from megatron_steel.errors import SteelError
from megatron_steel.hosts import Host, read_hostfile
from megatron_steel.nodes_agree import differences, facts_of


def _file(tmp_path, text):
    path = tmp_path / "hostfile"
    path.write_text(text)
    return str(path)


def test_a_host_file_is_deepspeeds(tmp_path):
    path = _file(tmp_path, "# two nodes\nnode-b slots=8\n\nuser@10.0.0.7   slots=4 # the old one\n")
    assert read_hostfile(path) == [Host("node-b", 8), Host("user@10.0.0.7", 4)]
    assert read_hostfile(path, num_gpus=2) == [Host("node-b", 2), Host("user@10.0.0.7", 2)]


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("a slots=2\nb\n", "this is no line of a host file: 'b'", ":2"),
        ("a slots=0\n", "this is no line of a host file", ":1"),
        ("-oProxyCommand=x slots=1\n", "this is no line of a host file", ":1"),  # ssh would take it for an option
        ("a slots=1\n\na slots=2\n", "a stands there twice", ":3"),
        ("# none\n", "names no node", ""),
    ],
)
def test_a_bad_host_file_is_named_with_its_line(text, what, line, tmp_path):
    path = _file(tmp_path, text)
    with pytest.raises(SteelError, match=what) as told:
        read_hostfile(path)
    assert told.value.where == path + line


@pytest.mark.skipif(not shutil.which("ssh"), reason="no ssh here (Debian: openssh-client)")
def test_an_unreachable_node_is_named_within_15_seconds_before_anything_starts(tiny_recipe, tmp_path, capsys):
    """One that refuses, one whose name nobody knows, and one that never answers."""
    with socket.socket() as silent:  # takes the connection and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        (tmp_path / "bin").mkdir()
        ssh = tmp_path / "bin" / "ssh"
        port = silent.getsockname()[1]
        ssh.write_text(f'#!/bin/sh\ncase "$*" in *127.0.0.8*) set -- -p 1 "$@";; *) set -- -p {port} "$@";; esac\n'
                       f'exec {shutil.which("ssh")} -F none "$@"\n')  # fmt: skip
        ssh.chmod(0o755)
        file = _file(tmp_path, "127.0.0.8 slots=1\nno-such-node.invalid slots=1\n127.0.0.1 slots=2\n")
        begin = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
            patch.delenv("SLURM_JOB_ID", raising=False)
            code = cli.main(["launch", "--hostfile", file, str(tiny_recipe), f"run.dir={tmp_path}/run"])
        assert time.monotonic() - begin < 15
    told = capsys.readouterr().err
    assert code == 78
    assert "3 of 3 nodes cannot be used" in told
    assert "127.0.0.8: unreachable: ssh: connect to host 127.0.0.8 port 1: Connection refused" in told
    assert "no-such-node.invalid: unreachable: ssh: Could not resolve hostname" in told
    assert "127.0.0.1: unreachable:" in told
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_nodes_cannot_cut_is_named_before_anything_starts(tiny_recipe, tmp_path, capsys):
    assert cli.main(["launch", "--hostfile", _file(tmp_path, "a slots=3\n"), str(tiny_recipe)]) == 78
    assert "a global batch of 8 samples cannot be cut" in capsys.readouterr().err


def test_nodes_get_the_launchers_environment_and_deepspeeds_file(tmp_path, monkeypatch):
    (tmp_path / "more").write_text('# mine\n\nNCCL_DEBUG=INFO\nEQUATION="a=b"\n')
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "more"))
    for name, value in {"NCCL_SOCKET_IFNAME": "ib0", "SECRET_TOKEN": "x", "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)
    passed = hosts.passed_environment()
    assert passed["NCCL_SOCKET_IFNAME"] == "ib0"
    assert (passed["NCCL_DEBUG"], passed["EQUATION"]) == ("INFO", '"a=b"')
    assert not {"SECRET_TOKEN", "CUDA_VISIBLE_DEVICES"} & passed.keys()


def test_nodes_that_differ_are_named_with_both_values():
    same = {"version of torch": "2.13.0", "data.train, /data/x: digest": "aa11", "tokenizer.path: fingerprint": "ff"}
    assert differences([("a (rank 0)", same), ("b (rank 8)", dict(same))]) is None
    other = same | {"data.train, /data/x: digest": "bb22"}
    older = {**same, "version of torch": "2.12.1"}
    told = differences([("a (rank 0)", same), ("b (rank 8)", other), ("c (rank 16)", older)])
    assert told.exit_code == 78
    assert told.where == "b (rank 8), c (rank 16)"
    assert "data.train, /data/x: digest\n        aa11 on a (rank 0)\n        bb22 on b (rank 8)" in told.what
    assert "version of torch\n        2.13.0 on a (rank 0)\n        2.12.1 on c (rank 16)" in told.what
    lacking = differences([("a", same), ("b", {})])
    assert "2.13.0 on a\n        not there on b" in lacking.what


def test_what_each_node_says_of_a_run(tiny_recipe):
    from megatron_steel import preflight
    from megatron_steel.recipe import load_recipe

    recipe = load_recipe(str(tiny_recipe), [])
    plan = preflight.plan_run(recipe)
    facts = facts_of(recipe, plan, {"zero_optimization": {"stage": 3}})
    assert facts[f"data.train, {recipe.data.train}: digest"] == plan.train[0].digest
    assert facts[f"data.validation, {recipe.data.validation}: tokens"] == f"{plan.validation[0].tokens:,}"
    assert facts["tokenizer.path: fingerprint"] == plan.tokenizer["fingerprint"]
    assert facts["model configuration: hidden_size"] == "32"
    assert {"version of torch", "version of deepspeed", "version of megatron_steel"} <= facts.keys()
    other = facts_of(load_recipe(str(tiny_recipe), ["optim.lr=2e-2"]), plan, {"zero_optimization": {"stage": 2}})
    told = differences([("a", facts), ("b", other)]).what
    assert "recipe: optim.lr\n        0.01 on a\n        0.02 on b" in told
    assert "deepspeed.config: zero_optimization.stage\n        3 on a\n        2 on b" in told
    assert told.count(" on b") == 2


def test_a_node_ends_what_its_own_supervisor_has_left_and_nothing_else(tmp_path):
    """Another supervisor that was started by mistake on the same run folder must not kill a job that trains there."""
    names = (".launch-a-17-1-x_y", ".launch-a-170-1-zz", ".launch-b-17-1-x_y", ".launch-a-17-2-now")
    code = "import time; time.sleep(60)"
    started = [subprocess.Popen([sys.executable, "-c", code, f"--reports={tmp_path}/{name}"]) for name in names]
    try:
        assert node.kill_earlier(tmp_path / names[-1]) == [started[0].pid]
        assert [process.poll() is None for process in started] == [False, True, True, True]
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """In place of ssh: the command that it would hand to the node's shell runs in this one."""
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text('#!/bin/sh\nfor word; do :; done\nexec sh -c "$word"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(hosts.__file__).resolve().parents[1]))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(hosts, "_SEES_IN", 0.0)


def test_a_node_says_what_it_lacks(shell, tmp_path, monkeypatch):
    (tmp_path / "run" / ".launch-x").mkdir(parents=True)
    question = {"first": "127.0.0.1", "folder": str(tmp_path / "run"), "name": ".launch-x"}
    here = Host("here", 1)
    answer = hosts._ask(here, question)
    assert (answer["sees"], answer["first"]) == (True, "127.0.0.1")
    assert 0 < int(answer["port"]) < 65536
    assert "must lie on a disk that all nodes share" in hosts._ask(here, question | {"name": ".launch-y"})
    assert "cannot resolve no-such-node.invalid" in hosts._ask(here, question | {"first": "no-such-node.invalid"})
    monkeypatch.setattr(hosts.sys, "executable", "/no/such/python")
    assert "it answers, but /no/such/python -m megatron_steel.node fails there" in hosts._ask(here, question)
