"""Embeddings that are kept: each name is encoded once, and never are they those of anything else."""

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import CLIPTokenizer

import san_hf.inference.embeddings_cache as embeddings_cache
from san_hf.inference import Predictor, Vocabulary
from san_hf.inference.embeddings_cache import FILE_ENDING, VARIABLE, cache_folder, text_tower_digest
from san_hf.modeling import SANImageProcessor, SANProcessor
from san_hf.modeling.fast_linear_san import fast_linear
from tests.forks import Run
from tests.tiny import relative_difference, segmenting_model, tiny_tokenizer


NAMES = ["sky", "red boat", "grass"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder, and none of what another test has left in memory."""
    folder = tmp_path / "embeddings"
    monkeypatch.setenv(VARIABLE, str(folder))
    forget()
    yield folder
    forget()


def forget() -> None:
    """As in a new process."""
    embeddings_cache._in_memory.clear()
    embeddings_cache._text_digests.clear()


@pytest.fixture
def model():
    return segmenting_model()


@pytest.fixture
def encode(model, processor, passes):
    """Encodes, and says how many prompts went through the text tower."""

    def encode(names=NAMES, model=model, processor=processor, **options) -> tuple[Vocabulary, int]:
        passes["prompts"] = 0
        vocabulary = Vocabulary.encode(model, processor, names, **options)
        return vocabulary, passes["prompts"]

    return encode


@torch.no_grad()
def compute(model, processor, names=NAMES) -> torch.Tensor:
    """Embeddings without a cache."""
    with fast_linear("cpu"):
        return model.get_class_embeds(**processor(text=names))


def files(folder) -> list:
    return sorted(folder.glob(f"*{FILE_ENDING}"))


def test_names_are_encoded_once(encode, folder, model, processor):
    """Names that are encoded again, in this process or the next; rows in another order; a digest of something else."""
    first, prompts = encode()
    assert prompts == 3 * 14
    expected = compute(model, processor)
    assert torch.equal(first.class_embeds, expected) and first.text_digest == text_tower_digest(model)
    for _ in range(2):
        again, prompts = encode()
        assert prompts == 0 and torch.equal(again.class_embeds, expected) and again.facts() == first.facts()
        turned, prompts = encode([" Grass", "sky"])  # which are the same to the tokenizer
        assert prompts == 0 and torch.equal(turned.class_embeds, expected[[2, 0]])
        forget()
    more, prompts = encode(["tree", "grass", "a house", "sky"])
    assert prompts == 2 * 14
    fresh = compute(model, processor, ["tree", "grass", "a house", "sky"])
    assert relative_difference(more.class_embeds, fresh) < 1e-6
    forget()
    assert encode([*NAMES, "tree", "a house"])[1] == 0
    # Of its rows nothing is shared with what is kept.
    with torch.inference_mode():
        more.class_embeds.zero_()
    assert torch.equal(encode()[0].class_embeds, expected)


def test_synonyms_and_expansions_are_words_like_others(encode, folder):
    """Words of a synonym or an expansion that are encoded again."""
    first, prompts = encode(["house, home", "sky"], synonyms=True, expand=["tree"])
    assert prompts == 4 * 14
    forget()
    again, prompts = encode(["home, house", "tree"], synonyms=True)
    assert prompts == 0 and torch.equal(again.class_embeds, first.class_embeds[[1, 0, 3]])


def test_predictor_keeps_its_words(encode, folder, model, processor, passes):
    Predictor(model, processor).vocabulary(NAMES)
    passes["prompts"] = 0
    Predictor(model, processor).vocabulary(NAMES[::-1])
    assert passes["prompts"] == 0


def other_tokenizer() -> CLIPTokenizer:
    """Two letters have each other's token."""
    vocabulary = tiny_tokenizer().get_vocab()
    vocabulary["o"], vocabulary["r"] = vocabulary["r"], vocabulary["o"]
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


CHANGES = {
    "weights": lambda model, processor: model.text_model.encoder.layers[1].mlp.fc2.bias[3].add_(1e-7),
    "one bit": lambda model, processor: model.text_projection.weight.view(torch.int32)[0, 0].bitwise_xor_(1),
    "embedding": lambda model, processor: model.text_model.embeddings.position_embedding.weight[76].mul_(1.01),
    "end": lambda model, processor: setattr(model.text_model, "eos_token_id", 2),
    "half": lambda model, processor: model.bfloat16(),
    "attention": lambda model, processor: model.set_attn_implementation("eager"),
    "tokenizer": lambda model, processor: setattr(processor, "tokenizer", other_tokenizer()),
    "limit": lambda model, processor: setattr(processor.tokenizer, "model_max_length", 20),
    "templates": lambda model, processor: setattr(processor, "prompt_templates", ["the {}"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_text_tower_has_its_own(change, encode, folder, model):
    """Embeddings of other weights, other code, another precision, other tokens or other templates."""
    processor = SANProcessor(SANImageProcessor(), tiny_tokenizer())
    before, _ = encode(processor=processor)
    with torch.no_grad():
        CHANGES[change](model, processor)
        after, prompts = encode(processor=processor)
        assert prompts == 3 * len(after.templates)
        forget()
        expected = compute(model, processor)
        again, prompts = encode(processor=processor)
    # Where prompts are cut, the processor warns, each time.
    assert prompts == (3 * 14 if change == "limit" else 0)
    assert torch.equal(after.class_embeds, expected) and torch.equal(again.class_embeds, expected)
    assert again.text_digest == text_tower_digest(model)


def test_autocast_is_another_precision(encode, folder):
    """Embeddings of bfloat16 where float32 is asked for."""
    exact, _ = encode()
    half, prompts = encode(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert prompts == 42 and half.class_embeds.dtype == torch.bfloat16
    forget()
    again, prompts = encode(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert prompts == 0 and torch.equal(again.class_embeds, half.class_embeds)
    assert torch.equal(encode()[0].class_embeds, exact.class_embeds)


def train(model) -> None:
    model.text_model.requires_grad_(True)


def adapt(model) -> None:
    config = LoraConfig(r=2, target_modules=r"text_model\..*q_proj", init_lora_weights=False)
    inject_adapter_in_model(config, model)
    model.requires_grad_(False)


def hook(model) -> None:
    model.text_projection.register_forward_hook(lambda module, inputs, output: output + 1)


@pytest.mark.parametrize("prepare", [train, adapt, hook])
def test_nothing_is_kept_of_a_tower_that_its_weights_do_not_tell(prepare, encode, folder, model, processor):
    """Embeddings of a text tower that is trained, adapted or hooked, kept for what it is next."""
    prepare(model)
    for _ in range(2):
        vocabulary, prompts = encode()
        assert prompts == 42
        assert torch.equal(vocabulary.class_embeds, compute(model, processor))
    assert not folder.exists()


def test_switched_off(encode, folder, monkeypatch, tmp_path):
    """A cache that is used although it is off; or another folder than the user's own."""
    monkeypatch.setenv(VARIABLE, "off")
    assert cache_folder() is None
    assert [encode()[1], encode()[1]] == [42, 42] and not folder.exists()
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "san_hf" / "embeddings"


def test_damaged_files_are_written_anew(encode, folder):
    """Embeddings out of a file that is cut short, empty, something else, or has one wrong bit."""
    expected = encode()[0].class_embeds
    (file,) = files(folder)
    content = file.read_bytes()
    flipped = [bytearray(content) for _ in range(20)]
    for index, copied in enumerate(flipped):
        copied[index * (len(content) - 1) // 19] ^= 1 << index % 8
    for broken in (b"", b"x", content[:10], content[:-1], content + b"\0", content[:200], *map(bytes, flipped)):
        file.write_bytes(broken)
        forget()
        vocabulary, prompts = encode()
        assert prompts == 42 and torch.equal(vocabulary.class_embeds, expected)
        assert file.read_bytes() == content
    file.unlink()
    file.mkdir()
    forget()
    assert torch.equal(encode()[0].class_embeds, expected) and encode()[1] == 0  # in memory, at least


def test_folders_that_cannot_be_written(encode, folder, monkeypatch):
    """A failure, or names that are encoded again, where the disk is full or read-only."""
    encode(["sky"])
    (file,) = files(folder)
    content = file.read_bytes()

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embeddings_cache, "write_file", full)
    forget()
    assert [encode()[1], encode()[1], encode(["tree", "sky"])[1], encode(["tree", "grass"])[1]] == [28, 0, 14, 0]
    assert file.read_bytes() == content and os.listdir(folder) == [file.name]
    folder.rename(folder.with_name("other"))
    folder.write_text("a file")
    forget()
    assert [encode()[1], encode()[1]] == [42, 0]


def test_names_and_files_are_bounded(encode, folder, model, monkeypatch):
    """A cache that grows for ever, or gives up what was used last."""
    monkeypatch.setattr(embeddings_cache, "MOST_NAMES", 4)
    encode(["a", "b", "c"])
    encode(["d", "e"])
    assert encode(["b", "c", "d", "e"])[1] == 0 and encode(["a"])[1] == 14
    forget()
    assert encode(["c", "d", "e", "a"])[1] == 0
    assert encode(["a", "b", "c", "d", "e"])[1] == 70 and len(files(folder)) == 1  # too many to keep
    (first,) = files(folder)
    monkeypatch.setattr(embeddings_cache, "MOST_BYTES", 2 * first.stat().st_size)
    os.utime(first, (0, 0))
    towers = [copy.deepcopy(model) for _ in range(2)]
    for index, tower in enumerate(towers):
        tower.text_projection.weight.data += index + 1
        encode(["c", "d", "e", "a"], tower)
    assert first not in files(folder) and len(files(folder)) == 2
    forget()
    assert encode(["c"], towers[0])[1] == encode(["c"], towers[1])[1] == 0
    monkeypatch.setattr(embeddings_cache, "MOST_IN_MEMORY", 1)
    for tower in (*towers, model):
        encode(["c"], tower)
    assert len(embeddings_cache._in_memory) == 1


def test_names_of_equal_tokens_are_refused(encode, folder):
    """Two names that are known each by itself, and are one to the tokenizer: the second would never get a pixel."""
    # Words are cut apart where letters end, with a space or without.
    names = ["a-b", "a -b"]
    for name in names:
        encode([name])
    for _ in range(2):
        with pytest.raises(ValueError, match="have the same tokens"):
            encode(names)
        with pytest.raises(ValueError, match="have the same tokens"):
            encode(["sky", *names])


def test_what_is_refused_without_a_cache_is_refused(encode, folder):
    """Errors of names and templates that known names pass by."""
    encode()
    for names in ([], "", ["sky", "Sky"], ["sky", 5], ["sky", " "], ["<|endoftext|>"]):
        with pytest.raises(ValueError):
            encode(names)
    with pytest.raises(ValueError, match="template"):
        encode(templates=["nowhere"])


def encode_one_by_one(model, names) -> bool:
    processor = SANProcessor(SANImageProcessor(), tiny_tokenizer())
    for name in names:
        Vocabulary.encode(model, processor, [name])
    return True


def test_two_processes_and_threads_lose_nothing(encode, folder, model):
    """Names that one writer takes from another's file, or a file that is read while it is half written."""
    words = [[f"{letter}{number}" for number in range(8)] for letter in "abcd"]
    runs = [Run(encode_one_by_one, model, group) for group in words[:2]]
    threads = [threading.Thread(target=encode_one_by_one, args=(model, group)) for group in words[2:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.outcomes() for run in runs] == [[True], [True]]
    names = [name for group in words for name in group]
    # What the others have written meanwhile is seen, in memory or not.
    vocabulary, prompts = encode(names)
    assert prompts == 0
    forget()
    assert torch.equal(encode(names)[0].class_embeds, vocabulary.class_embeds)
    assert [path.suffix for path in folder.iterdir()] == [FILE_ENDING]


@pytest.mark.slow
def test_a_new_process_knows_the_names(encode, folder, tmp_path):
    """A key that changes from process to process."""
    encode()
    code = """
import sys, torch
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from san_hf.inference import Vocabulary
from tests.tiny import segmenting_model, tiny_tokenizer
SANForSemanticSegmentation.get_class_embeds = None
vocabulary = Vocabulary.encode(segmenting_model(), SANProcessor(SANImageProcessor(), tiny_tokenizer()), sys.argv[1:])
print(vocabulary.class_embeds.double().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code, *NAMES], capture_output=True, text=True, check=True)
    assert float(done.stdout) == encode()[0].class_embeds.double().sum().item()
