"""Text as the original reads it before CLIP's tokenizer sees it, and the rules for lists of class names.

OpenAI's tokenizer of CLIP (and OpenCLIP's, which the original uses) repairs text by ftfy, undoes HTML's escapes twice,
and drops capitals and superfluous spaces; Transformers' does the last two only. So the same words would have other
tokens: with typographic quotes, `&amp;`, full-width letters, ligatures, control characters, or letters that were read
in a wrong encoding.
"""

import html
import re
import unicodedata
from collections.abc import Iterable, Iterator, KeysView, Mapping, Set
from html.entities import html5


try:
    import ftfy
except ImportError:  # a checkpoint's code runs without it, see `may_be_misread`
    ftfy = None  # type: ignore[assignment]  # else a module


# Far beyond what 77 tokens can hold.
LONGEST_NAME = 10_000
# A hundred times the longest list of a benchmark; more would not fit into memory with their templates.
MOST_NAMES = 100_000

# What ftfy 6 makes plain, one character at a time. C1 controls are taken for what Windows-1252 has there.
_C1 = {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
_PLAIN = dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
_PLAIN |= {0x3000: " "} | {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)}
# Latin ligatures and digraphs; of the long s and t only the ligature is undone.
_PLAIN |= {ord(letter): unicodedata.normalize("NFKC", letter) for letter in "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"} | {0xFB05: "ſt"}
_BREAKS = re.compile("\r\n|[\r\u2028\u2029]")
_TERMINAL = re.compile(r"\x1b\[[\d;]*[a-zA-Z]")
_CONTROLS = dict.fromkeys([*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)])
_ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")
_ENTITIES = {f"&{name}": value for name, value in html5.items() if name.endswith(";")}
# ftfy also takes names in capitals, &EACUTE;, where HTML has only the small ones.
_ENTITIES |= {
    entity.upper(): value.upper()
    for entity, value in _ENTITIES.items()
    if entity.islower() and html.unescape(entity.upper()) == entity.upper()
}


def clean_text(text: str) -> str:
    """
    A text as CLIP's own tokenizer has it before it cuts it into tokens: repaired, unescaped, in lower case, without
    superfluous spaces.

    With ftfy installed, equal to the original on every string; without it, on every string that [`may_be_misread`]
    isn't true of.
    """
    if text.isascii() and text.isprintable() and "&" not in text:
        fixed = text  # most names: nothing below changes them
    else:
        fixed = html.unescape(html.unescape(ftfy.fix_text(text) if ftfy is not None else _fix_text(text)))
    return " ".join(fixed.split()).lower()


def may_be_misread(text: str) -> bool:
    """
    Whether a text may hold UTF-8 that was read in another encoding ("cafÃ©"), which only ftfy repairs. Without
    it, true of all such texts and a few others, such as "É»"; with it, always false.
    """
    if ftfy is not None or text.isascii() and "&" not in text:
        return False
    return any(map(_looks_misread, _steps(text)))


def check_class_names(names: Iterable[str], what: str) -> list[str]:
    """
    The names as a list, composed (Unicode's NFC) and without spaces around them.

    Args:
        names: in the order of the labels: a list, a tuple, an array, or anything else that has an order.
        what: what to call them in errors.

    Raises:
        ValueError: a text, a set or a mapping instead of a list; no names, or more than 100,000; one that is no text,
            blank, or longer than 10,000 letters; or two that are one to the tokenizer: after [`clean_text`] they are
            equal.
    """
    if isinstance(names, str):
        parts = [name.strip() for name in names.split(",")]
        raise ValueError(f"Got {what}={names!r:.80}, expected a list of class names: {parts!s:.200}?")
    if isinstance(names, Mapping | Set) and not isinstance(names, KeysView):
        hint = "list(mapping.values())?" if isinstance(names, Mapping) else "sorted(names)?"
        raise ValueError(
            f"Got a {type(names).__name__} as {what}, expected a list: the names' order is that of the labels. {hint}"
        )
    if not isinstance(names, Iterable) or isinstance(names, bytes):
        raise ValueError(f"Got {names!r:.80} as {what}, expected a list of class names.")
    names = list(names)
    if not names:
        raise ValueError(f"Got an empty list for {what}, expected at least one class name.")
    if len(names) > MOST_NAMES:
        raise ValueError(
            f"Got {len(names):,} names as {what}, expected at most {MOST_NAMES:,}: their token ids alone would take "
            f"{len(names) * 8 * 14 * 77 / 1e9:.0f} GB. Is it a list of class names?"
        )
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"Got {name!r:.80} at position {index} of {what}, expected a class name as a string.")
        if len(name) > LONGEST_NAME:
            raise ValueError(
                f"Got a class name of {len(name):,} letters at position {index} of {what}, expected a few words: "
                f"{name!r:.80}"
            )
        key = clean_text(name)
        if not key:
            raise ValueError(f"Got a blank class name at position {index} of {what}, expected a word or more.")
        if (other := first.setdefault(key, index)) != index:
            twins = f"names {names[other]!r:.80} and {name!r:.80}, which are one to the tokenizer,"
            raise ValueError(
                f"Got the class {f'name {name!r:.80}' if name == names[other] else twins} at the positions {other} and "
                f"{index} of {what}, expected each name once: leave one out."
            )
    return [unicodedata.normalize("NFC", name.strip()) for name in names]


def _fix_text(text: str) -> str:
    """What `ftfy.fix_text` (6.3) makes of a text, but for letters that were read in a wrong encoding."""
    *_, fixed = _steps(text)
    return fixed


def _steps(text: str) -> Iterator[str]:
    """Each line of a text on its way to being plain, as the search for wrong encodings sees it; last, the whole."""
    fixed, unescape = "", True
    for line in re.split("(?<=\n)", text):
        unescape = unescape and "<" not in line  # HTML, whose escapes are meant; and so are those that follow
        before = None
        while line != before:
            before = line
            if unescape:
                line = _ENTITY.sub(_unescape, line)
            yield line
            line = line.translate(_C1)
            yield line
            line = _BREAKS.sub("\n", line.translate(_PLAIN))
            line = line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # joins pairs of surrogates
            line = _TERMINAL.sub("", line).translate(_CONTROLS)
            line = unicodedata.normalize("NFC", line)
        fixed += line
    yield fixed


def _unescape(match: re.Match) -> str:
    entity = match[0]
    if not entity.startswith("&#"):
        return _ENTITIES.get(entity, entity)
    letter = html.unescape(entity)
    return entity if ";" in letter else letter


def _letters(encodings: Iterable[str], first: int, last: int) -> str:
    """What these bytes stand for in any of the encodings; where they stand for nothing, for themselves."""
    codes = range(first, last + 1)
    found = {bytes([code]).decode(name, "ignore") or chr(code) for name in encodings for code in codes}
    return re.escape("".join(sorted(found)))


def _sequences(encodings: Iterable[str], spaces: str) -> str:
    """
    A pattern of UTF-8's sequences of bytes as they look when read in these encodings. Instead of a byte after the first
    there may be one of `spaces`, what else became of it; but not instead of all.
    """
    one, two, three = (_letters(encodings, *codes) for codes in ((0xC2, 0xDF), (0xE0, 0xEF), (0xF0, 0xF4)))
    sure = f"[{_letters(encodings, 0x80, 0xBF)}\ufffd]"
    some = f"(?:{sure}|[{spaces}])"
    return f"[{one}]{sure}|[{two}](?=.?{sure}){some}{{2}}|[{three}](?=.?.?{sure}){some}{{3}}"


# The encodings that ftfy looks for: in all of a text, and the first ones also in a part of it. It mends nothing unless
# the text is odd: has signs beside letters, small letters before capitals and the like.
_WINDOWS = ("latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1254", "cp1257")
_PART = re.compile(f"{_sequences(_WINDOWS, ' ?')}|[ÂÃ][ ?]|\ufffd[{_letters(_WINDOWS, 0xC2, 0xF4)}]")
_WHOLE = [
    re.compile(f"(?:[\0-\x7f\ufffd]|{_sequences([name], ' ?')}|[{_letters([name], 0xC2, 0xDF)}][ ?])*")
    for name in (*_WINDOWS, "iso-8859-2", "mac-roman", "cp437")
]
_ODD = re.compile("[ƒµªºˆˇŒœ]|[ÂÃ][ ?]|[ÂÃÎÐØÙ][ŠšŸŽž]")


def _looks_misread(text: str) -> bool:
    if text.replace("\ufffd", "").isascii():
        return False
    if not _PART.search(text) and not any(pattern.fullmatch(text) for pattern in _WHOLE):
        return False
    foreign = [letter if letter > "\x7f" else "" for letter in text]
    return bool(_ODD.search(text)) or any(
        before and (not before.isalpha() or after and before.islower() and after.isupper())
        for before, after in zip(foreign, [*foreign[1:], ""])
    )
