"""How to publish an export: the commands for the Hugging Face hub and for ModelScope. Nothing is uploaded here.

The commands are those of `huggingface_hub` and of `modelscope-hub`; both make the repository where there is none.
"""

import os
import re
import shlex
from pathlib import Path

from megatron_steel.data.checksums import SUMS


def upload_commands(folder: str | os.PathLike[str], licensed: bool) -> str:
    """What to type, as text for the terminal.

    Args:
        folder: the export, as the user named it.
        licensed: the card names a licence.
    """
    path = shlex.quote(os.fspath(folder))
    name = f"ORG/{_repository(Path(folder).absolute().name)}"
    first = "" if licensed else "  first: choose a licence and export with --license ID\n"
    return (
        "to publish it, with your user name or organisation for ORG:\n"
        f"{first}"
        f"  hf auth login; hf upload {name} {path}\n"
        f"  modelscope login; modelscope upload {name} {path}\n"
        f"whoever has downloaded it checks every file, in its folder, by: sha256sum --check {SUMS}"
    )


def _repository(name: str) -> str:
    """What the hubs take for it: at most 96 of their characters, no two of `-.` in a row or at an end; else NAME."""
    plain = re.sub(r"[-.]{2,}", "-", re.sub(r"[^A-Za-z0-9._-]+", "-", name)).strip("-.")[:96]
    return plain.removesuffix(".git").strip("-.") or "NAME"
