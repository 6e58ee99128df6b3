"""Offline, deterministic, fast: what holds for every test."""

import os


# Before anything imports transformers: no test may reach the network, and two workers share the machine's cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests count what is encoded; and the user's cache is the user's.
os.environ["SAN_HF_EMBEDDINGS_CACHE"] = "off"

import pytest
import torch

from tests.tiny import tiny_config, tiny_tokenizer


RUN_SLOW = os.environ.get("RUN_SLOW", "0") not in ("", "0")


def pytest_collection_modifyitems(items):
    if not RUN_SLOW:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: runs with RUN_SLOW=1"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def config():
    return tiny_config()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def passes(monkeypatch):
    """Counts images through the vision tower and prompts through the text tower: {"images": n, "prompts": n}."""
    from san_hf.modeling import SANForSemanticSegmentation, SANModel

    counts = {"images": 0, "prompts": 0}
    see, encode = SANModel.forward, SANForSemanticSegmentation.get_class_embeds

    def count_images(self, pixel_values, *args, **kwargs):
        counts["images"] += len(pixel_values)
        return see(self, pixel_values, *args, **kwargs)

    def count_prompts(self, input_ids, *args, **kwargs):
        counts["prompts"] += input_ids.shape[0] * input_ids.shape[1]
        return encode(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(SANModel, "forward", count_images)
    monkeypatch.setattr(SANForSemanticSegmentation, "get_class_embeds", count_prompts)
    return counts
