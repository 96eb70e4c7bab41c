"""Two operators that data-juicer loads as custom ones: its own, without what damages Chinese and chats.

Imported in data-juicer's environment alone, never by the package.
"""

import ftfy
from data_juicer.ops.base_op import OPERATORS, Mapper
from data_juicer.ops.mapper.remove_repeat_sentences_mapper import RemoveRepeatSentencesMapper

TURN_MARKERS = ("<|im_start|>", "<|im_end|>")


@OPERATORS.register_module("steel_fix_unicode_mapper")
class FixUnicode(Mapper):
    """ftfy's repair of wrong encodings and nothing else: `fix_unicode_mapper` also turns ，：？（ and “ into ASCII."""

    _batched_op = True
    repairs = ftfy.TextFixerConfig(
        unescape_html=False, remove_terminal_escapes=False, uncurl_quotes=False, fix_character_width=False,
        fix_latin_ligatures=False, fix_line_breaks=False, normalization="NFC", explain=False,
    )  # fmt: skip

    def process_batched(self, samples: dict) -> dict:
        samples[self.text_key] = [ftfy.fix_text(text, self.repairs) for text in samples[self.text_key]]
        return samples


@OPERATORS.register_module("steel_repeat_sentences_mapper")
class RepeatSentences(RemoveRepeatSentencesMapper):
    """`remove_repeat_sentences_mapper`, but rows with turn markers stay as they are: it erases every second marker."""

    def process_batched(self, samples: dict) -> dict:
        before = list(samples[self.text_key])
        after = super().process_batched(samples)[self.text_key]
        samples[self.text_key] = [
            old if any(marker in old for marker in TURN_MARKERS) else new
            for old, new in zip(before, after, strict=True)
        ]
        return samples
