"""Released models by name: from a Hub, converted once, kept."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from san_hf import from_pretrained
from san_hf import hub as san_hub
from san_hf.conversion import HUB_REPO, ConversionError, convert_state_dict, read_original
from san_hf.hub import resolve
from san_hf.loading import ModelError
from tests.hub.conftest import ALIAS


NOBODY = "http://127.0.0.1:9"  # nothing answers there


def test_names_that_stay(tmp_path, monkeypatch):
    """Catches a folder or a repository on the Hub that is taken for a release's name."""
    assert resolve(tmp_path) == str(tmp_path)
    assert resolve("someone/san-vit-b-16") == "someone/san-vit-b-16"
    (tmp_path / ALIAS).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve(ALIAS) == ALIAS  # the folder is meant


def test_the_output_of_a_training(tmp_path):
    """Catches a folder with a model in it that is called none, and no word on where the model is."""
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="It is a training's output, and holds one: '.*best'"):
        from_pretrained(tmp_path)


def test_download_convert_keep(hub, connect, tmp_path):
    """Catches a model that is downloaded or converted again, with the network or without."""
    folder = Path(resolve(ALIAS))
    assert folder.is_relative_to(tmp_path / "hf_home" / "san_hf") and folder.name == ALIAS
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert len(hub.downloads()) == 1

    assert resolve(ALIAS) == str(folder)
    for address, offline in ((hub.address, True), (NOBODY, False)):
        connect(address, offline)
        assert resolve(ALIAS) == str(folder)
    assert resolve(ALIAS, local_files_only=True) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert len(hub.downloads()) == 1


def test_from_pretrained(hub, checkpoint, tmp_path):
    """Catches another model than the one on the Hub, a processor that doesn't go with it, options that get lost."""
    model, processor = san_hub.from_pretrained(ALIAS, dtype=torch.float64)
    assert model.dtype == torch.float64 and not model.training
    (tmp_path / "original.pth").write_bytes(checkpoint)
    expected = convert_state_dict(read_original(tmp_path / "original.pth"), model.config, torch.float64)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    inputs = processor(text=["cat", "grass"])
    assert model.get_class_embeds(torch.as_tensor(inputs["input_ids"])).shape == (2, 16)


def test_revisions_and_cache_folder(hub, tmp_path):
    """Catches a new release that is never seen, an old one that can't be asked for, a cache folder that is ignored."""
    old = hub.sha(HUB_REPO)
    new = hub.commit(HUB_REPO, {"README.md": b"SAN, second edition"})
    folders = [Path(resolve(ALIAS, cache_dir=tmp_path / "cache", revision=revision)) for revision in (None, old)]
    for folder, commit in zip(folders, (new, old)):
        assert folder.is_relative_to(tmp_path / "cache" / "san_hf") and commit in str(folder)
    assert folders[0] != folders[1] and not (tmp_path / "hf_home" / "san_hf").exists()
    # The file comes from the release's repository: the published results are its own.
    card = (folders[0] / "README.md").read_text()
    assert "name: SAN ViT-B/16" in card and "value: 27.56" in card and "was not checked" not in card


def test_at_the_same_time(hub, monkeypatch):
    """Catches two that convert at once: one of them would find the folder there already, and fail."""
    calls, convert = [], san_hub.load.convert_checkpoint

    def counted(*args, **kwargs):
        calls.append(args)
        return convert(*args, **kwargs)

    monkeypatch.setattr(san_hub.load, "convert_checkpoint", counted)
    barrier = threading.Barrier(4)

    def together(_):
        barrier.wait()
        return resolve(ALIAS)

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(together, range(4)))
    assert len(set(folders)) == 1 and len(calls) == 1


def test_a_cache_that_is_only_read(hub, tmp_path, monkeypatch):
    """Catches a converted release that needs to write, and an error that doesn't say what a new one needs it for."""
    folder = resolve(ALIAS)

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(san_hub.load, "locked", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert resolve(ALIAS) == resolve(ALIAS, local_files_only=True) == folder


def test_a_release_that_cannot_be_kept(hub, monkeypatch):
    """As above, where nothing is converted yet."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(san_hub.load, "locked", refuse)
    with pytest.raises(OSError, match="has to be converted once, but '.*san_hf' can't be written: Read-only file syst"):
        resolve(ALIAS)


def test_interrupted_conversion(hub, monkeypatch):
    """Catches half a conversion that is taken for a whole one later."""

    def interrupt(config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("san_hf.conversion.convert.build_processor", interrupt)
        with pytest.raises(KeyboardInterrupt):
            resolve(ALIAS)
    assert (Path(resolve(ALIAS)) / "tokenizer.json").is_file()


@pytest.mark.parametrize("offline", [False, True])
def test_out_of_reach(connect, offline, monkeypatch):
    """Catches an error that doesn't say what was looked for, where, and what to do."""
    connect(NOBODY, offline)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # it tries several times
    with pytest.raises(OSError, match=f"'{ALIAS}' stands for san_vit_b_16.pth of {NOBODY}/{HUB_REPO}") as caught:
        resolve(ALIAS)
    assert "could not be downloaded" in str(caught.value) and "san-hf convert" in str(caught.value)


def test_no_such_revision_file_or_repository(hub):
    """As above, for what the Hub doesn't have."""
    with pytest.raises(OSError, match="at revision 'v9', which could not be downloaded: .*404"):
        resolve(ALIAS, revision="v9")
    with pytest.raises(OSError, match="'san-vit-large-14' stands for san_vit_large_14.pth.*404"):
        resolve("san-vit-large-14")
    del hub.repositories[HUB_REPO]
    with pytest.raises(OSError, match="could not be downloaded: .*404"):
        resolve(ALIAS)


def test_something_else_under_the_name(hub, tmp_path):
    """Catches a page of a proxy that is kept as if it were a conversion."""
    hub.repositories[HUB_REPO][-1]["san_vit_b_16.pth"] = b"<html>please log in</html>"
    with pytest.raises(ConversionError, match="san_vit_b_16.pth' is a web page"):
        resolve(ALIAS)
    assert not list((tmp_path / "hf_home" / "san_hf").rglob("config.json"))
