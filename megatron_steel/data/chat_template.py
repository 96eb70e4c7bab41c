"""The chat template for training: ChatML as `chatml` writes it, with marks around what the assistant says.

Between `{% generation %}` and `{% endgeneration %}` lie an assistant's words and the `<|im_end|>` that ends them: what a
loss on the assistant alone is of (TRL's `assistant_only_loss`). In pretraining that token ended the document. The template
is given only for a tokenizer whose own template renders the same text, or that has ChatML's tokens and no template.
Must not know models or trainers.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from megatron_steel.data.chatml import SYSTEM
from megatron_steel.errors import SteelError

TRAINING_FILE = "chat_template_training.jinja"
"""Where it lies beside a tokenizer that has a template without marks; transformers reads `chat_template.jinja` alone."""
START, END = "<|im_start|>", "<|im_end|>"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_USER, _ASSISTANT = {"role": "user", "content": " 问\n"}, {"role": "assistant", "content": "\n答 "}
_SYSTEM = {"role": "system", "content": "S"}
_PROBES = ([_USER], [_USER, _ASSISTANT], [_SYSTEM, _USER, _ASSISTANT, _USER], [_USER, _ASSISTANT, _USER, _ASSISTANT])
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}  # fmt: skip
_CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- OPENING }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def chatml_template(system: str | None = SYSTEM) -> str:
    """ChatML in Jinja, the assistant's words marked. `system`: the line of a conversation without one; None for none."""
    return _with_opening("" if system is None else f"{START}system\n{system}{END}\n")


def training_template(folder: str | os.PathLike[str]) -> str | None:
    """The template to train with on a Hugging Face tokenizer folder: `training_template_of` its tokenizer.

    None also for a sentencepiece model. Raises SteelError where the folder does not load.
    """
    if not Path(folder).is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken folder makes it raise
        what = f"transformers cannot load this tokenizer: {type(error).__name__}: {error}"
        raise SteelError(what, folder, "give a folder with tokenizer.json or the files of its class") from None
    return training_template_of(hf)


def training_template_of(tokenizer: Any) -> str | None:
    """A template that marks the assistant's words and renders what the tokenizer's own template renders.

    Args:
        tokenizer: a transformers tokenizer.

    Returns: the tokenizer's own where it has marks; ours where that gives the same text (whatever system line the
        tokenizer's puts first) or where it has none and knows ChatML's tokens; None where another one is needed.
    """
    own = _own(tokenizer)
    if own and _MARKED.search(own):
        return own
    vocab = tokenizer.get_vocab()
    if START not in vocab or END not in vocab:
        return None
    if not own:
        return chatml_template()
    opening, found, _ = (_rendered(tokenizer, None, [_USER]) or "").partition(f"{START}user\n")
    if not found or "strftime_now" in own:  # an opening that changes from day to day
        return None
    template = _with_opening(opening)
    same = all(
        _rendered(tokenizer, None, turns, **how) == _rendered(tokenizer, template, turns, **how)
        for turns in _PROBES for how in ({}, {"add_generation_prompt": True}, {"tools": [_TOOL]})
    )  # fmt: skip
    return template if same else None


def _with_opening(opening: str) -> str:
    return _CHATML.replace("OPENING", json.dumps(opening, ensure_ascii=False))


def _own(tokenizer: Any) -> str | None:
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own  # named templates


def _rendered(tokenizer: Any, template: str | None, turns: list[dict[str, str]], **how: Any) -> str | None:
    """None where the template refuses the turns."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **how))
    except (TemplateError, TypeError, ValueError, KeyError):  # templates may call anything
        return None
