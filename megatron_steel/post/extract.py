"""What a model answered, read from its reply alone: the letter of a choice, or a number.

What is denied ("A 不对", "not A") is taken out; then the first of these rules that finds anything decides:

1. the last "final answer" (最终答案, <answer>), else the last sentence that announces the answer (答案是B, 故选C, the answer
   is (C)), else the last that chooses (选B, I choose B), else that names the wrong option (错误的选项是B: it may be what was
   asked for); with the letter or with the option's text;
2. a letter that is called correct: 选项 D 正确, B is right, B is the answer;
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
_OPEN, _CLOSE = r"[\s(\[{【「『《\"'“‘_]{0,4}", r"[)\]}】」』》\"'”’_]{0,4}"
_AND = (
    r"\s*(?:、|/|&|和|或者?|与|及|\band\b|\bor\b|,?\s*(?:也|又|还)有?可能(?:会?是|为|选)"
    r"|,(?=\s*@\s*(?:$|[.。;\n])))\s*"
)
_ONE = rf"{_OPEN}(?:选项|option|choice)?{_OPEN}@{_CLOSE}"
_IS = r"\s*(?:而|就|也|应该?|当然|显然|最?可能|的?选项|项){0,3}\s*(?:是|为|选择?)?\s*[:=]?\s*"
_BE = r"\s*(?:(?:would|should|must|will) be|is|was|:|=)?\s*(?:most likely|therefore|clearly|but(?: rather)?)?\s*:?\s*"
_FINAL = rf"最[终后]的?(?:答案|选择|结果){_IS}|\bfinal (?:answer|choice){_BE}"
_WHICH = r"的?(?:选项|选择|有(?=[\s:])|(?=是))"
_ANSWER = (
    rf"答案[】\])]?{_IS}|(?<!不)(?<!不符)(?:正确|符?合题意){_WHICH}{_IS}"
    rf"|(?:故|应|应该|应当|所以|因此)\s*,?(?:本题|此题)?(?:应该?)?选(?:择|定)?\s*:?\s*"
    rf"|(?<!incorrect )(?<!wrong )\banswer{_BE}|\b(?:correct|right|best) (?:option|choice|one){_BE}"
    r"|\b(?:correct|right)\s*:\s*"
)
_CHOICE = (
    r"(?<![误错若])(?<!如果)(?<!假如)(?<!因为)选(?:择|定)?(?:的?[是为])?\s*:?\s*"
    r"|(?<!错误)(?<!正确)(?<!题意)(?<!错误的)(?<!正确的)(?<!题意的)选项[是为]\s*:?\s*|\b(?:choose|pick|select|go with)\s*:?\s*"
)
_WRONG_ONE = rf"(?:错误|不正确|不符?合题意){_WHICH}{_IS}"
_THINKS = (
    r"(?:认为|应该?是|应当是|所以是?|因此是?|而是)\s*:?\s*"
    r"|\b(?:it|that)(?:'s| is| must be| should be)\s+|\bi(?: would|'d)? (?:think|believe|say)\s+(?:it is |it's )?"
    rf"|\b(?:so|thus|hence|therefore)\s*,?\s*(?={_ONE}\s*[.!。]?(?:\n|\Z))"
)
_ABOUT = r"\s*(?:选?项)?\s*(?:的?(?:说法|描述|表述|叙述|内容))?\s*:?\s*"
_CORRECT = (
    rf"@{_CLOSE}{_ABOUT}(?:是|最|完全){{0,3}}(?:正确|对(?=的|了|吧|[\s。.,;:!)]|$)|符合题意|最?合适|最符合)"
    rf"|@{_CLOSE}\s*(?:is|must be|seems)\s+(?:the\s+)?(?:correct|right|true|best|answer)\b"
)
_JUDGED = r"(?m)^@\s*[.、)]\s*(?:正确|对)(?=\s*(?:[.。;]|$))"  # "A. 错误\nB. 正确"
_DENIED = (
    r"(?:不(?:能|应该?|会|可以?|该)?(?:是|选择?|为)|并非|排除(?:了|掉)?)\s*@@(?:选?项)?"
    rf"|@@{_ABOUT}(?:也|都|均|显然|是|则|明显){{0,3}}(?:不|错|有误|并非|可以?排除|被排除)[对正确符合题意成立误的]{{0,6}}"
    r"|(?:(?:\bnot|n't)(?:\s+(?:think|believe|say|choose|pick|select)(?:\s+that)?(?:\s+(?:it(?:'s| is)|the answer is))?)?|\brul\w+ out|\beliminat\w+|\bexclud\w+|\binstead of|\brather than)\s+@@"
    r"|@@\s*(?:is|are)(?: also| clearly)?\s*(?:not\b|n't\b|wrong\b|incorrect\b|false\b)(?:\s+(?:correct|right|true))?"
)
_NOT_RIGHT = (
    r"\s*(?:(?:也|都|均|显然|是|明显){0,3}(?:不对|不正确|不符|错误?的?(?:$|[\s,.。;\n]))"
    r"|(?:is|are)(?: also| clearly)?\s*(?:not\b|wrong\b|incorrect\b|false\b))"
)
_FIRST = r"\A@@(?=\s*(?:$|[.。,、:;)!?\n]|因为|由于|选?项|because\b|since\b|as\b))"
_LAST_LINE = rf"(?m)^{_OPEN}@{_CLOSE}(?=\s*(?:[.。!]?\s*|[.、:]\s*\S.*)\Z)"
_NAMED = r"(?:选项|\boption|\bchoice)\s*[(\[]?@|[(\[【「]\s*@\s*[)\]】」]|@\s*选?项"
_LISTED = r"(?:^|[\s。;,])\(?@\s*[.、:)]"
_NUMBER = re.compile(r"(?<![A-Za-z0-9_.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?(?!\d)")
_LATEX = re.compile(r"\\(?:boxed|text|mathrm|mathbf)\s*\{([^{}]*)\}")


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
    for letter, option in texts.items():
        text = re.sub(rf"(?:不是|并非|\bnot ){_OPEN}{_whole(option)}", " ", text)
        text = re.sub(rf"(?:选项\s*)?{letter}\s*[.、:)]?\s*{_whole(option)}{_NOT_RIGHT}", " ", text)
    if re.fullmatch(rf"[{letters}\s.。,、;/()!?]+", text):
        return _only(re.findall(f"[{letters}]", text))  # nothing but letters
    text = _pattern(_DENIED, letters).sub(" ", text).strip()
    announced = _announced(text, letters, texts)
    if announced:
        return _only(announced)
    if "正确" not in texts.values() and "对" not in texts.values():  # or the options are repeated
        judged = _found(_JUDGED, text, letters)
        if judged:
            return _only(judged)
    listed = len(set(_found(_LISTED, text, letters))) > 1
    for rule in (_CORRECT, _NAMED) if listed else (_CORRECT, _FIRST, _LAST_LINE, _NAMED):
        named = _found(rule, text, letters)
        if named:
            return _only(named)
    return _only(_quoted(text, texts))


def extract_number(reply: str) -> Decimal | None:
    """The number that a reply ends with: in the line of its last `####` where it has one, else the last one of all.

    Thousands separators are read; units, currency signs and a closing full stop are left out. Nothing is computed, so a
    fraction behind `####` is no number.
    """
    text = _clean(reply)
    if "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
        if re.search(r"\d\s*[/⁄]\s*\d", text):
            return None
        text = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda found: found[0].replace(" ", ""), text)
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def plain_number(answer: str) -> Decimal | None:
    """The number of an answer key, perhaps behind `####`; None where it is anything else: a fraction, a unit, a word."""
    text = answer.rpartition("####")[2].strip().replace(",", "").replace("\u2212", "-")
    return Decimal(text) if re.fullmatch(r"-?[0-9]*\.?[0-9]+", text) else None


def _announced(text: str, letters: str, texts: dict[str, str]) -> list[str]:
    """What the last announcement names, of the strongest kind that there is."""
    for announces in (_FINAL, _ANSWER, _CHOICE, _WRONG_ONE):
        said = [
            (found.start(), re.findall(f"[{letters}]", found[0]))
            for found in _pattern(f"(?:{announces})@@", letters).finditer(text)
        ]
        for found in _pattern(announces, letters).finditer(text):
            begun = [x for x, option in texts.items() if re.compile(_OPEN + _whole(option)).match(text, found.end())]
            said += [(found.start(), [max(begun, key=lambda x: len(texts[x]))])] if begun else []
        if said:
            return max(said, key=lambda one: one[0])[1]  # the first of equals: a letter before a text
    said = list(_pattern(f"(?:{_THINKS})@@", letters).finditer(text))
    return re.findall(f"[{letters}]", said[-1][0]) if said else []


def _clean(text: str) -> str:
    """The answer itself in plain half-width characters, all small but for letters that stand alone."""
    text = text.rpartition("</think>")[2]
    text = re.split(r"<think>|<\|im_end\|>|<\|endoftext\|>", text)[0]
    text = re.sub(r"</answer>", "\n", re.sub(r"<answer>", "\n最终答案: ", text))
    text = unicodedata.normalize("NFKC", text).translate({0x2212: "-", 0x2013: "-"})  # minus and dash
    text = re.sub(r"(?<=n)’(?=t\b)", "'", text)
    text = re.sub(r"[*`$]|\\[()\[\]]", "", text)
    for _ in range(2):  # \boxed{\text{C}}
        text = _LATEX.sub(r" \1 ", text)
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
