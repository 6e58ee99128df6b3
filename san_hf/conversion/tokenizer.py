"""CLIP's byte-pair tokenizer, which the original's checkpoints need but do not hold.

Only the merges are kept (`clip_merges.txt.gz`, in order of rank): the vocabulary follows from them, as in the release
of CLIP (Radford et al., 2021, MIT licence): the 256 bytes, the 256 bytes at the end of a word, one entry per merge,
and the two special tokens.
"""

import gzip
from importlib.resources import files

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer


END_OF_WORD = "</w>"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
CLIP_VOCABULARY_SIZE = 49408


def clip_tokenizer(max_length: int = 77) -> CLIPTokenizer:
    """The tokenizer of every released CLIP, 49,408 tokens.

    Args:
        max_length: longest prompt in tokens, the two special ones included; 77 in every released CLIP.
    """
    packed = files("san_hf.conversion").joinpath("clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()[1:]  # the first line names the format's version
    merges = [tuple(line.split(" ")) for line in lines]

    # Bytes in order of code point: those that print stand for themselves, the others got the code points from 256 on.
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *map("".join, merges), *SPECIAL_TOKENS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)  # type: ignore[arg-type]  # pairs
