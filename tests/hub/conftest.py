"""A Hub on loopback, with a small checkpoint under the name of a release."""

import dataclasses

import pytest
from huggingface_hub import constants

from san_hf.conversion import HUB_REPO, RELEASES, export_checkpoint
from san_hf.modeling import SANForSemanticSegmentation
from tests.hub.server import Hub
from tests.tiny import tiny_config


ALIAS = "san-vit-b-16"


@pytest.fixture(scope="session")
def small_config():
    """The tiny configuration with CLIP's own vocabulary, which the original's checkpoints always have."""
    clip_config = tiny_config().clip_config.to_dict()
    clip_config["text_config"] |= {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    return tiny_config(clip_config=clip_config)


@pytest.fixture(scope="session")
def checkpoint(small_config, tmp_path_factory) -> bytes:
    """A checkpoint in the original's layout."""
    model = SANForSemanticSegmentation(small_config)
    return export_checkpoint(model, tmp_path_factory.mktemp("original") / "small.pth").read_bytes()


@pytest.fixture
def connect(monkeypatch, tmp_path):
    """What the variables HF_ENDPOINT and HF_HUB_OFFLINE do, and a cache of its own for each test."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def connect(address: str, offline: bool = False):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        url_template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url_template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        # Transformers' own client keeps the address that it was made with.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)

    return connect


@pytest.fixture
def hub(checkpoint, small_config, connect, monkeypatch):
    """The Hub, connected, with the release's repository. The release is 630 MB; a small model stands in for it."""
    sizes = {key: value for key, value in small_config.to_diff_dict().items() if key != "model_type"}
    monkeypatch.setitem(RELEASES, ALIAS, dataclasses.replace(RELEASES[ALIAS], config_kwargs=sizes))
    hub = Hub()
    hub.commit(HUB_REPO, {RELEASES[ALIAS].filename: checkpoint, "README.md": b"SAN"})
    hub.address = hub.start()
    connect(hub.address)
    yield hub
    hub.stop()
