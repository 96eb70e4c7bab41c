"""The command blocks of README and docs, and what their first line says of them.

```bash             runs here: tests/docs/test_run.py runs the blocks of a page in order, in one folder
```bash gpus        needs GPUs, terabytes or weeks     }
```bash network     downloads                          }  parsed only: tests/docs/test_parse.py
```bash elsewhere   other people's files or programs   }
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARKS = ("", "gpus", "network", "elsewhere")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    mark: str
    text: str


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "tools" / "benchmarks" / "README.md"]


def blocks(page: Path) -> list[Block]:
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```bash *([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 1
        found.append(Block(str(page.relative_to(ROOT)), line, match[1].strip(), match[2]))
    return found


def commands(text: str) -> list[list[str]]:
    """The simple commands of a block, in words; what the shell would fill in stands for itself."""
    joined = text.replace("\\\n", " ")
    joined = re.sub(r"\$\([^()]*\)", "FILLED", joined)
    found = []
    for line in joined.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                found.append(words)
                words = []
            elif word not in ("do", "done", "then"):
                words.append(word)
    return [words for words in found if words]
