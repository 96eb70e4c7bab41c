"""Build what of NVIDIA apex can be measured here, from a checkout of its repository: FusedAdam's kernels, and its norms'.

The whole of apex takes long to compile; these two modules do not. Which files make them up is read from apex's own
`setup.py`. Whatever goes wrong is a reason why `apex: not run`, never the end of the suite. No GPU was at hand when this was
written: it has not compiled anything yet.
"""

import contextlib
import re
import shutil
from pathlib import Path

ADAM, NORM = "amp_C", "fused_layer_norm_cuda"


def sources(checkout: Path, module: str = ADAM) -> list[Path]:
    """The files that apex's `setup.py` names for a module; none where it is not apex."""
    file = checkout / "setup.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(rf"name=[\"']{module}[\"'],\s*sources=\[(.*?)\]", text, re.DOTALL)
    names = re.findall(r"[\"'](csrc/[^\"']+)[\"']", found[1]) if found else []
    return [checkout / name for name in names]


def build(checkout: Path, folder: Path) -> list[str]:
    """Compile into `folder` for this GPU. Returns what to put on the Python path. Raises RuntimeError with the reason."""
    if not sources(checkout):
        raise RuntimeError(f"{checkout} is no checkout of NVIDIA's apex (its setup.py names no {ADAM})")
    missing = [tool for tool in ("nvcc", "ninja", "c++") if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not on the path")
    import torch

    if torch.version.cuda is None:
        raise RuntimeError("this torch was built without CUDA")
    _compile(checkout, ADAM, folder / ADAM, [])
    with contextlib.suppress(RuntimeError):  # the norm is one row of the ablation, which then says what is missing
        _compile(checkout, NORM, folder / NORM, ["-maxrregcount=50"])
    return [str(folder / ADAM), str(folder / NORM), str(checkout)]


def _compile(checkout: Path, module: str, folder: Path, flags: list[str]) -> None:
    from torch.utils.cpp_extension import load

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock").unlink(missing_ok=True)  # a build that was killed leaves it, and torch would wait for ever
    load(
        module,
        [str(file) for file in sources(checkout, module)],
        extra_cflags=["-O3"],
        extra_cuda_cflags=["-O3", "--use_fast_math", *flags],
        extra_include_paths=[str(checkout / "csrc")],
        build_directory=str(folder),
    )
