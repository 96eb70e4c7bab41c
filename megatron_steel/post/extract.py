"""What a model answered, read from its reply alone: the letter of a choice, or a number.

What is denied ("A 不对", "not A") is taken out; then the first of these rules that finds anything decides:

1. the last "final answer" (最终答案), else the last sentence that announces a choice: 答案是B, 故选C, the answer is (C),
   with the letter or with the option's text;
2. a letter that is called correct: 选项 D 正确, B is right;
3. a letter that begins the reply ("B", "B. 上海"), or its last line;
4. a letter that is named as an option: 选项 B, (B), option B;
5. the text of an option, where exactly one is quoted.

Two letters at once, a refusal, or the options merely repeated are no answer: None. Nothing is guessed and no text is ever
run. Must not know prompts, models or scores: what a prompt said cannot be taken for an answer here.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

# A letter that stands alone, so that it may name an option: no part of a word or formula, not the article of "A man".
_ALONE = re.compile(
    r"(?<![A-Za-z0-9'\-])(?P<letter>[B-HJb-hj]|[AI](?!\s+(?!(?:because|since|as|and|or|but|is|was|not|which)\b)[a-z])"
    r"|(?<=[(\[])[ai](?=[)\]])|[ai](?=\s*(?:[.,)。,;]|$)))(?![A-Za-z0-9'+\-]|\s*[=<>])|[A-Z]"
)
# In what follows @ stands for such a letter and @@ for one or several of them: "B", "(B)", "选项B", "A和C".
# Every repetition has a bound, so that no reply, however odd, takes long to read.
_OPEN, _CLOSE = r"[\s(\[{【「《\"'“‘]{0,4}", r"[)\]}】」》\"'”’]{0,4}"
_AND = r"\s*(?:、|/|&|和|或者?|与|及|\band\b|\bor\b|,(?=\s*@\s*(?:$|[.。;\n])))\s*"
_ONE = rf"{_OPEN}(?:选项|option|choice)?{_OPEN}@{_CLOSE}"
_IS = r"\s*(?:而|就|也|应该?|当然|显然|最?可能|的?选项|项){0,3}\s*(?:是|为|选择?)?\s*:?\s*"
_BE = r"\s*(?:(?:would|should|must|will) be|is|was|:)?\s*(?:most likely|therefore|clearly|but(?: rather)?)?\s*:?\s*"
_FINAL = rf"最[终后]的?(?:答案|选择|结果){_IS}|\bfinal (?:answer|choice){_BE}"
_SAYS = (
    rf"答案[】\])]?{_IS}|(?:正确|错误|合题意)的?(?:选项|选择|(?=是)){_IS}|选(?:择|定)?(?:的?[是为])?\s*:?\s*"
    rf"|\b(?:answer|(?:correct|right|best) (?:option|choice|one)){_BE}|\b(?:choose|pick|select|go with)\s*:?\s*"
)
_THINKS = (
    r"(?:认为|应该?是|应当是|所以是?|因此是?|而是)\s*:?\s*"
    r"|\b(?:it|that)(?:'s| is| must be| should be)\s+|\bi(?: would)? (?:think|believe|say)\s+(?:it is |it's )?"
)
_ABOUT = r"\s*(?:选?项)?\s*(?:的?(?:说法|描述|表述|叙述|内容))?\s*:?\s*"
_CORRECT = (
    rf"@{_CLOSE}{_ABOUT}(?:是|最|完全){0, 3}(?:正确|对(?=的|了|吧|[\s。.,;:!)]|$)|符合题意)"
    rf"|@{_CLOSE}\s*(?:is|must be|seems)\s+(?:the\s+)?(?:correct|right|true|best)\b"
)
_DENIED = (
    r"(?:不(?:能|应该?|会|可以?|该)?(?:是|选择?|为)|并非|排除(?:了|掉)?)\s*@@(?:选?项)?"
    rf"|@@{_ABOUT}(?:也|都|均|显然|是|则|明显){0, 3}(?:不|错|有误|并非|可以?排除|被排除)[对正确符合题意成立误的]{0, 6}"
    r"|(?:\bnot|n't|\brul\w+ out|\beliminat\w+|\bexclud\w+|\binstead of|\brather than)\s+@@"
    r"|@@\s*(?:is|are)(?: also| clearly)?\s*(?:not\b|n't\b|wrong\b|incorrect\b|false\b)(?:\s+(?:correct|right|true))?"
)
_FIRST = r"\A@@(?=\s*(?:$|[.。,、:;)!\n]|因为|由于|选?项|because\b|since\b|as\b))"
_LAST_LINE = rf"(?m)^{_OPEN}@{_CLOSE}(?=\s*(?:[.。!]?\s*|[.、:]\s*\S.*)\Z)"
_NAMED = r"(?:选项|\boption|\bchoice)\s*[(\[]?@|[(\[【「]\s*@\s*[)\]】」]|@\s*选?项"
_LISTED = r"(?:^|[\s。;,])\(?@\s*[.、:)]"
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\d])")


def extract_choice(reply: str, options: Sequence[str]) -> str | None:
    """The letter ("A" for the first option) that a reply gives as its answer; None: it gives none, or several.

    Args:
        reply: what the model wrote, without its prompt. What it thought aloud (`<think>`) and what follows the end of
            its turn are left out.
        options: the texts of the options in their order, at most ten; an empty text is never looked for.
    """
    letters, text = "ABCDEFGHIJ"[: len(options)], _clean(reply)
    texts = {letter: _clean(option).rstrip(".。") for letter, option in zip(letters, options, strict=True)}
    texts = {letter: option for letter, option in texts.items() if option}
    for option in texts.values():
        text = re.sub(rf"(?:不是|并非|\bnot ){_OPEN}{_whole(option)}", " ", text)
    text = _pattern(_DENIED, letters).sub(" ", text).strip()
    announced = _announced(text, letters, texts)
    if announced:
        return _only(announced)
    listed = len(set(_found(_LISTED, text, letters))) > 1
    for rule in (_CORRECT, _NAMED) if listed else (_CORRECT, _FIRST, _LAST_LINE, _NAMED):
        named = _found(rule, text, letters)
        if named:
            return _only(named)
    return _only(_quoted(text, texts))


def extract_number(reply: str) -> Decimal | None:
    """The number that a reply ends with: behind its last `####` where it has one, else the last one of all.

    Thousands separators are read; units, currency signs and a closing full stop are left out. Nothing is computed.
    """
    text = _clean(reply)
    found = _NUMBER.findall(text.rpartition("####")[2]) or _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _announced(text: str, letters: str, texts: dict[str, str]) -> list[str]:
    """What the last announcement names, of the strongest kind that there is."""
    for announces in (_FINAL, _SAYS):
        said = list(_pattern(f"(?:{announces})@@", letters).finditer(text))
        if said:
            return re.findall(f"[{letters}]", said[-1][0])
        last = list(_pattern(announces, letters).finditer(text))[-1:]
        begun = [x for x, option in texts.items() if last and re.match(_OPEN + _whole(option), text[last[0].end() :])]
        if begun:
            return [max(begun, key=lambda x: len(texts[x]))]
    said = list(_pattern(f"(?:{_THINKS})@@", letters).finditer(text))
    return re.findall(f"[{letters}]", said[-1][0]) if said else []


def _clean(text: str) -> str:
    """The answer itself in plain half-width characters, all small but for letters that stand alone."""
    text = text.rpartition("</think>")[2]
    text = re.split(r"<think>|<\|im_end\|>|<\|endoftext\|>", text)[0]
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\\(?:boxed|text|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1 ", re.sub(r"[*`$]|\\[()\[\]]", "", text))
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text))
    return _ALONE.sub(lambda m: m[0].upper() if m["letter"] else m[0].lower(), text).strip()


@functools.cache
def _pattern(rule: str, letters: str) -> re.Pattern[str]:
    several = rf"{_ONE}(?:{_AND}{_ONE}){{0,9}}"
    return re.compile(rule.replace("@@", several).replace("@", f"[{letters}]"))


def _found(rule: str, text: str, letters: str) -> list[str]:
    return re.findall(f"[{letters}]", " ".join(match[0] for match in _pattern(rule, letters).finditer(text)))


def _only(found: Sequence[str]) -> str | None:
    return found[0] if len(set(found)) == 1 else None


def _whole(option: str) -> str:
    """A pattern of an option's text that is not a part of a longer word or number."""
    left, right = (
        (r"(?<![A-Za-z0-9.])" if option[0].isascii() else ""),
        (r"(?![A-Za-z0-9]|\.\d)" if option[-1].isascii() else ""),
    )
    return left + re.sub(r"\s+", r"\\s+", re.escape(option).replace(r"\ ", " ")) + right


def _quoted(text: str, texts: dict[str, str]) -> list[str]:
    """The options whose text stands in a reply, and in it not only as a part of a longer option's."""
    found = []
    for letter in sorted(texts, key=lambda x: -len(texts[x])):
        pattern = _whole(texts[letter])
        if re.search(pattern, text):
            found.append(letter)
            text = re.sub(pattern, " ", text)
    return found
