"""Class names as the original reads them: the same token ids, whatever the text, with ftfy and without."""

import gzip
import html
import random
import re
from importlib.resources import files

import ftfy
import pytest
import regex
from transformers.utils import logging

from san_hf.conversion.tokenizer import clip_tokenizer
from san_hf.modeling import SANImageProcessor, SANProcessor, text_san
from san_hf.modeling.text_san import check_class_names, clean_text, may_be_misread


# What the tokenizer of CLIP's release cuts a text into (Radford et al., 2021).
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
# Repaired alike with ftfy and without.
ODD = [
    "they\u2019re",
    "\u201cred\u201d \u201bhouse\u201f",
    "salt &amp; pepper",
    "a &amp;amp; b",
    "caf&eacute;",
    "CAF&EACUTE;",
    "BUNDESSTRA&SZLIG;E",
    "&lt;b&gt; tag",
    "<b> caf&eacute;\nx &rsquo;",
    "&#x2019;s, &#8217, &rsquo",
    "&notit; &nosuch; &#59; &semi; &#0; &#x110000; &#xd800;",
    "\uff33\uff2b\uff39\u3000\uff76\uff9e",
    "\ufb02u\ufb03\ufb06 \u01c4 \u0149",
    "a\x00b\x07c\x7f \x1b[31mred\x1b[0m",
    "\ufeffsky\u206a\ufffc",
    "red\r\nhouse\u2028x\x0by\x85z",
    "cafe\u0301, \u1e9b\u0323, \u212b",
    "\ud83d\ude00 \ud83d",
    "1\xa0000 \xbd \u0663 \u2167",
    "\u0130stanbul \u039f\u0394\u039f\u03a3 STRASSE \u1e9e",
    "\u041a\u0438\u0457\u0432 \u041c\u0415\u0422\u0420\u041e \u0414\u041e\u041c",
    "\u732b \U0001f408\u200d\u2b1b \u0e41\u0e21\u0e27 \u05d7\u05ea\u05d5\u05dc",
    "it's 'll Cat'S don't",
    "C++ (x) --- ...!!!",
]
# UTF-8 read as Windows-1252, Latin-1, MacRoman, Windows-1251, twice, in a part, with what got lost.
MISREAD = [
    "caf\xc3\xa9",
    "they\xe2\u20ac\u2122re",
    "\xe2\x80\x9cred\xe2\x80\x9d",
    "caf\u221a\xa9",
    "\u0432\u0402\u201dsky",
    "caf\xc3\u0192\xc2\xa9",
    "voil\xc3 le travail",
    "\u4e2d caf\xc3\xa9",
    "\xe2\u20ac\u0153 like this \xe2\u20ac\ufffd",
]


def original_text(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


@pytest.fixture(scope="module")
def original_tokens():
    """Text -> token ids by merging pairs of symbols in the order of their ranks, as Sennrich et al. (2016) say."""
    packed = files("san_hf.conversion").joinpath("clip_merges.txt.gz").read_bytes()
    merges = [tuple(line.split(" ")) for line in gzip.decompress(packed).decode().splitlines()[1:]]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbol = {byte: chr(byte) for byte in plain}
    symbol |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in plain)}
    alphabet = sorted(symbol.values())
    vocabulary = [*alphabet, *(s + "</w>" for s in alphabet), *map("".join, merges)]
    ids = {token: index for index, token in enumerate(vocabulary)}

    def encode(text: str) -> list[int]:
        found = []
        for word in WORDS.findall(original_text(text)):
            *parts, last = (symbol[byte] for byte in word.encode())
            parts.append(f"{last}</w>")
            while (pair := min(zip(parts, parts[1:]), key=lambda p: ranks.get(p, 1e9), default=None)) in ranks:
                merged, rest = [], parts
                while rest:
                    size = 2 if tuple(rest[:2]) == pair else 1
                    merged.append("".join(rest[:size]))
                    rest = rest[size:]
                parts = merged
            found += [ids[part] for part in parts]
        return [49406, *found[:75], 49407]

    return encode


@pytest.fixture(scope="module")
def processor() -> SANProcessor:
    return SANProcessor(SANImageProcessor(), clip_tokenizer())


@pytest.fixture
def without_ftfy(monkeypatch):
    monkeypatch.setattr(text_san, "ftfy", None)


@pytest.fixture
def warnings(caplog):
    logging.enable_propagation()
    with caplog.at_level("WARNING"):
        yield caplog
    logging.disable_propagation()


def check(processor, original_tokens, texts):
    templates = ["a photo of a {}.", "{}", "\u201cThe\u201d {} &amp; more"]
    for text in texts:
        inputs = processor(text=[text], prompt_templates=templates, return_tensors="np")
        for template, ids, mask in zip(templates, inputs.input_ids[0], inputs.attention_mask[0]):
            prompt = template.replace("{}", text.strip())
            assert ids[mask == 1].tolist() == original_tokens(prompt), ascii(prompt)


def test_token_ids_of_odd_texts(processor, original_tokens):
    """Catches names, or templates around them, that get other tokens than from the original: other classifiers."""
    check(processor, original_tokens, [*ODD, *MISREAD])


def test_without_ftfy(processor, original_tokens, without_ftfy, warnings):
    """Catches a checkpoint's own code that reads such names otherwise where ftfy isn't installed."""
    check(processor, original_tokens, ODD)
    assert not warnings.records


@pytest.mark.parametrize("text", MISREAD, ids=ascii)
def test_what_only_ftfy_mends(processor, without_ftfy, warnings, text):
    """Catches other tokens than the original's without a word."""
    processor(text=["sky", text])
    (record,) = warnings.records
    assert f"{text!r} may hold letters that were read in a wrong encoding" in record.getMessage()


def test_no_warning_where_nothing_is_wrong(without_ftfy):
    """Catches warnings about correct names in other languages."""
    names = "café naïve Straße Übermut señal São Łódź Žluťoučký Đống œuf Κάστρο ГОРОД Київ Їжак Љубав 猫 ねこ ½ 20°C"
    assert not [name for name in (*names.split(" "), "¡Olé!", "“école”", "L’ŒUVRE") if may_be_misread(name)]


def random_texts(count: int):
    """Pieces of words, signs, escapes and of UTF-8 in wrong encodings."""
    draw = random.Random(0)
    words = [
        "caf\xe9",
        "\u201cquote\u201d",
        "Stra\xdfe",
        "\u041a\u0438\u0457\u0432",
        "\u732b",
        "\u0141\xf3d\u017a",
        "10 \u20ac",
    ]
    encodings = ["latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1257", "mac-roman", "cp437"]
    signs = [*map(chr, range(0x80, 0x180)), *map(chr, range(0x2010, 0x2030)), *"\x1b[0m\r\n?\ufffd\ufb01\uff21&;<"]
    signs += ["&amp;", "&eacute;", "&#x92;", "&EACUTE;", "\u0301", "\u0410", "\u0456", "\u03a3"]
    for _ in range(count):
        text = ""
        for _ in range(draw.randrange(1, 5)):
            word = draw.choice(words)
            kind = draw.random()
            if kind < 0.3:
                word = word.encode().decode(draw.choice(encodings), "replace")
            elif kind < 0.7:
                word = "".join(draw.choices(signs, k=draw.randrange(1, 4)))
            text += word + draw.choice(["", "", " "])
        yield text


def test_random_texts_without_ftfy(monkeypatch):
    """Catches a text that is read otherwise without ftfy, and isn't warned of."""
    texts = list(random_texts(2000))
    expected = [clean_text(text) for text in texts]
    assert expected == [original_text(text) for text in texts]
    monkeypatch.setattr(text_san, "ftfy", None)
    differ = [text for text, right in zip(texts, expected) if clean_text(text) != right]
    assert len(differ) > 50 and all(map(may_be_misread, differ))


def test_more_names_than_any_list_has():
    """A file of a few megabytes whose token ids fill the memory."""
    names = [f"class {i}" for i in range(100_001)]
    with pytest.raises(ValueError, match=r"100,001 names as classes, expected at most 100,000"):
        check_class_names(names, "classes")
    assert len(check_class_names(names[:-1], "classes")) == 100_000
