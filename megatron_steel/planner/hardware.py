"""The machines a run is planned for: `8xA100-80G`, `4x8xH100`, and what a GPU of that name can do.

Figures are per GPU, from NVIDIA's data sheets (links: half of what a sheet calls bidirectional, since a ring sends one
way). Peaks are `model.flops.peak_flops`. Knows nothing of models.
"""

import difflib
import re
from dataclasses import dataclass
from typing import NamedTuple

from megatron_steel.errors import SteelError


@dataclass(frozen=True)
class Gpu:
    name: str
    generation: str
    """`ampere` or `hopper`: whose measured efficiency applies; others have none of their own in the published rows."""
    memory_bytes: float
    """GB as sold (10^9 bytes); a driver shows slightly more or less."""
    bandwidth: float
    """Of its memory, bytes/s."""
    link: float
    """To the other GPUs of the node, bytes/s one way: NVLink, or PCIe where there is none."""
    link_kind: str
    peak: float
    """Dense bf16 FLOP/s with fp32 accumulation."""
    note: str = ""
    fp16_peak: float | None = None
    """Where it is another than `peak`."""


class _Row(NamedTuple):
    device: str  # a name that `peak_flops` knows
    generation: str
    memory_gb: float
    bandwidth_gb: float
    link_gb: float
    link_kind: str
    note: str = ""


_NO_ROWS = "no published row of this generation: Ampere's efficiency is assumed"
# name -> data sheet. A800 and H800 are an A100 and an H100 with NVLink cut to 400 GB/s (both directions).
GPUS = {
    "A100-40G": _Row("A100", "ampere", 40, 1555, 300, "NVLink 3"),
    "A100-80G": _Row("A100", "ampere", 80, 2039, 300, "NVLink 3"),
    "A800": _Row("A800", "ampere", 80, 2039, 200, "NVLink 3, cut"),
    "H100": _Row("H100", "hopper", 80, 3350, 450, "NVLink 4"),
    "H100-PCIe": _Row("H100 PCIe", "hopper", 80, 2000, 64, "PCIe 5 x16"),
    "H800": _Row("H800", "hopper", 80, 3350, 200, "NVLink 4, cut"),
    "H200": _Row("H200", "hopper", 141, 4800, 450, "NVLink 4"),
    "L40S": _Row("L40S", "ada", 48, 864, 32, "PCIe 4 x16", _NO_ROWS),
    "RTX-4090": _Row("RTX 4090", "ada", 24, 1008, 32, "PCIe 4 x16", _NO_ROWS),
    "RTX-3090": _Row("RTX 3090", "ampere-consumer", 24, 936, 32, "PCIe 4 x16", _NO_ROWS),
    "V100": _Row("V100", "volta", 32, 900, 150, "NVLink 2",
                 "has no bf16 tensor cores: planned at its fp32 peak; train.precision=fp16 is planned at its fp16 peak"),
}  # fmt: skip
_V100_FP32, _V100_FP16 = 15.7e12, 125e12  # of the SXM2 card: fp32 cores, tensor cores
_MOST_GPUS = 65_536
_ALIASES = {"A100": "A100-80G", "A100-40GB": "A100-40G", "A100-80GB": "A100-80G", "H100-80G": "H100", "H200-141G": "H200",
            "A800-80G": "A800", "H800-80G": "H800", "4090": "RTX-4090", "3090": "RTX-3090", "V100-32G": "V100"}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    gpu: Gpu
    gpus_per_node: int
    nodes: int
    node_link: float
    """Between two nodes, bytes/s one way, of the whole node."""

    @property
    def ranks(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def slowest_link(self) -> float:
        """bytes/s along a ring over all ranks. NCCL lays as many rings as a node has network cards, each with a part of
        the tensor, and every ring leaves a node once: the node's whole network counts, not one GPU's share of it."""
        if self.ranks == 1:
            return float("inf")
        if self.nodes == 1:
            return self.gpu.link
        return min(self.gpu.link, self.node_link)

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus_per_node} x {self.gpu.name}"


def parse_cluster(
    gpus: str, link: str | None = None, peak_tflops: float | None = None, memory_gb: float | None = None
) -> Cluster:
    """`8xA100-80G` or `NODESxGPUSxNAME`, with `200Gb/s` or `25GB/s` of each node's link.

    Args:
        peak_tflops, memory_gb: of a GPU that the table does not have (both), or instead of the table's.

    Raises:
        SteelError: unreadable, an unknown name without both figures, several nodes without a link.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z][\w .-]*|\d{4})", gpus.strip())
    if match is None or 0 in (int(n) for n in match.groups()[:2] if n):
        raise SteelError(f"{gpus!r} is no number of GPUs", "--gpus", "write 8xA100-80G, or 4x8xA100-80G for four nodes")
    first, second, name = match.groups()
    nodes, per_node = (int(first), int(second)) if second else (1, int(first or 1))
    if nodes * per_node > _MOST_GPUS:
        raise SteelError(
            f"{nodes * per_node:,} GPUs are more than anybody has joined", "--gpus", f"give at most {_MOST_GPUS:,}"
        )
    for value, option in ((peak_tflops, "--peak-tflops"), (memory_gb, "--memory-gb")):
        if value is not None and not 0 < value < float("inf"):
            raise SteelError(f"{value} is not above 0 and finite", option, "give the data sheet's figure")
    if nodes > 1 and link is None:
        raise SteelError(f"{nodes} nodes need the speed of what joins them", "--link",
                         "say how fast one node's network is, as in --link 200Gb/s (all its cards together)")  # fmt: skip
    speed = parse_speed(link) if link is not None else float("inf")
    return Cluster(_gpu(name, peak_tflops, memory_gb), per_node, nodes, speed)


def parse_speed(text: str) -> float:
    """`200Gb/s`, `1600Gbps` (bits) or `25GB/s` (bytes) in bytes/s. Raises SteelError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])(b|B)(?:/s|ps|it/s)?", text.strip())
    if match is None or float(match.group(1)) <= 0:
        raise SteelError(f"{text!r} is no speed", "--link", "write 200Gb/s (bits) or 25GB/s (bytes)")
    value, scale, unit = match.groups()
    return float(value) * {"M": 1e6, "G": 1e9, "T": 1e12}[scale] / (8 if unit == "b" else 1)


def gpu_names() -> list[str]:
    return list(GPUS)


def _gpu(name: str, peak_tflops: float | None, memory_gb: float | None) -> Gpu:
    from megatron_steel.model.flops import peak_flops

    known = _known(name)
    if known is None:
        if peak_tflops is None or memory_gb is None:
            near = difflib.get_close_matches(name.upper().removeprefix("RTX"), GPUS, n=3, cutoff=0.3) or list(GPUS)
            raise SteelError(
                f"there is no GPU {name!r} in the table", "--gpus",
                f"nearest: {', '.join(near)}; or give it by hand: --peak-tflops N (dense bf16) --memory-gb N")  # fmt: skip
        note = "not in the table: bandwidth as an A100 has it for its peak, PCIe 4, Ampere's efficiency"
        return Gpu(name, "other", memory_gb * 1e9, peak_tflops * 1e12 * 2039e9 / 312e12, 32e9, "PCIe 4 x16 (assumed)",
                   peak_tflops * 1e12, note)  # fmt: skip
    row = GPUS[known]
    known_peak = peak_tflops * 1e12 if peak_tflops else peak_flops(row.device)
    peak, fp16 = (known_peak, None) if known_peak else (_V100_FP32, _V100_FP16)
    memory = (memory_gb or row.memory_gb) * 1e9
    return Gpu(
        known, row.generation, memory, row.bandwidth_gb * 1e9, row.link_gb * 1e9, row.link_kind, peak, row.note, fp16
    )


def _known(name: str) -> str | None:
    plain = re.sub(r"[ _]", "-", name.strip()).upper()
    table = {n.upper(): n for n in GPUS} | {n.upper(): full for n, full in _ALIASES.items()}
    table |= {n.upper().replace("RTX-", "RTX"): n for n in GPUS}
    return table.get(plain)
