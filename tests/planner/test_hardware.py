"""Clusters from their names; an unknown GPU, a missing link and nonsense are named."""

import pytest

from megatron_steel.errors import SteelError
from megatron_steel.model.flops import peak_flops
from megatron_steel.planner.hardware import GPUS, parse_cluster, parse_speed


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "gpu", "peak"),
    [
        ("8xA100-80G", 1, 8, "A100-80G", 312e12), ("A100", 1, 1, "A100-80G", 312e12),
        ("a100-40gb", 1, 1, "A100-40G", 312e12), ("4xRTX 4090", 1, 4, "RTX-4090", 165.2e12),
        ("2x4090", 1, 2, "RTX-4090", 165.2e12), ("RTX3090", 1, 1, "RTX-3090", 71e12),
        ("8xH200", 1, 8, "H200", 989.5e12), ("4x8xH800", 4, 8, "H800", 989.5e12), ("L40S", 1, 1, "L40S", 362.05e12),
        ("8xV100", 1, 8, "V100", 15.7e12), ("H100-PCIe", 1, 1, "H100-PCIe", 756.5e12),
    ],
)  # fmt: skip
def test_names(text, nodes, per_node, gpu, peak):
    cluster = parse_cluster(text, link="200Gb/s")
    assert (cluster.nodes, cluster.gpus_per_node, cluster.gpu.name) == (nodes, per_node, gpu)
    assert cluster.gpu.peak == peak
    assert cluster.ranks == nodes * per_node


def test_every_peak_is_the_one_that_training_reports():
    for name, row in GPUS.items():
        assert name == "V100" or peak_flops(row.device) == parse_cluster(name).gpu.peak


@pytest.mark.parametrize(("text", "speed"), [("200Gb/s", 25e9), ("25GB/s", 25e9), ("1.6Tbps", 200e9), ("800Mb/s", 1e8)])
def test_speeds(text, speed):
    assert parse_speed(text) == speed


def test_the_slowest_link_of_a_ring():
    assert parse_cluster("8xH100").slowest_link == 450e9
    assert parse_cluster("2x8xH100", "1600Gb/s").slowest_link == 200e9  # the node's whole network
    assert parse_cluster("2x8xH100", "6400Gb/s").slowest_link == 450e9  # no faster than NVLink
    assert parse_cluster("2x1x4090", "1600Gb/s").slowest_link == 32e9  # no faster than PCIe
    assert parse_cluster("1xH100").slowest_link == float("inf")


def test_an_unknown_gpu_names_the_nearest_and_how_to_give_it_by_hand():
    with pytest.raises(SteelError, match="no GPU 'H20O'") as caught:
        parse_cluster("8xH20O")
    assert "nearest: H200" in caught.value.remedy
    assert "--peak-tflops" in caught.value.remedy
    assert "--memory-gb" in caught.value.remedy
    by_hand = parse_cluster("2xB300", peak_tflops=2500, memory_gb=288).gpu
    assert (by_hand.peak, by_hand.memory_bytes) == (2500e12, 288e9)
    assert "not in the table" in by_hand.note
    with pytest.raises(SteelError, match="no GPU 'B300'"):
        parse_cluster("2xB300", peak_tflops=2500)
    assert parse_cluster("A100", memory_gb=64).gpu.memory_bytes == 64e9  # instead of the table's


@pytest.mark.parametrize("text", ["", "0xA100", "8x", "x8", "8xA100x4x2", "2x0xA100", "eight A100!"])
def test_what_is_no_number_of_gpus(text):
    with pytest.raises(SteelError):
        parse_cluster(text, "100Gb/s")


def test_several_nodes_need_their_link():
    with pytest.raises(SteelError, match="4 nodes need the speed") as caught:
        parse_cluster("4x8xA100")
    assert "--link 200Gb/s" in caught.value.remedy
    for text in ("200", "fast", "0Gb/s", "-5Gb/s"):
        with pytest.raises(SteelError, match="is no speed"):
            parse_cluster("4x8xA100", text)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SteelError, match="above 0"):
            parse_cluster("A100", peak_tflops=wrong)
