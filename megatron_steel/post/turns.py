"""A conversation as a model's tokens: the folder's own chat template, and what ends a turn. Must not know what is talked about."""

from typing import Any

from megatron_steel.errors import SteelError
from megatron_steel.post.load import Loaded

_END_OF_TURN = "<|im_end|>"  # ChatML's


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """A conversation as the model reads it before it writes its next turn. Raises SteelError where no template fits."""
    if not getattr(tokenizer, "chat_template", None):
        raise SteelError("the tokenizer has no chat template", getattr(tokenizer, "name_or_path", "tokenizer"),
                         "use a chat model's folder, or add `chat_template` to its tokenizer_config.json")  # fmt: skip
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise SteelError(f"the chat template does not take these turns: {error}", getattr(tokenizer, "name_or_path", "tokenizer"),
                         "use the template that the model was trained with: system, user and assistant turns") from error  # fmt: skip
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_ids(loaded: Loaded) -> list[int]:
    """The tokens that end a turn: the folder's own, the tokenizer's, and <|im_end|> where there is one."""
    named = loaded.model.generation_config.eos_token_id
    found = {*(named if isinstance(named, list) else [named]), loaded.tokenizer.eos_token_id}
    if _END_OF_TURN in (vocabulary := loaded.tokenizer.get_vocab()):
        found.add(vocabulary[_END_OF_TURN])
    return sorted(found - {None})
