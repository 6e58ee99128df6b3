"""The one way to the Hub: a complete model folder, in one commit, without what is only of this machine."""

import fnmatch
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.hf_api import RepoFile

from .adapter_folder_san import INDEX_FILE, LORA_FILE, LORA_FOLDER, SIDE_ADAPTER_FILE, WEIGHT_FILES, WHOLE_FILE
from .card_san import CARD_FILE, PICTURE_FILE, RESULTS_FOLDER, is_hub_id, linked_pictures, name_example


WEIGHTS = (*WEIGHT_FILES, "model-*-of-*.safetensors", SIDE_ADAPTER_FILE, f"{LORA_FOLDER}/*")
NEEDED = ("config.json", "processor_config.json", "tokenizer_config.json", CARD_FILE)
TRAVELS = (
    *NEEDED,
    *(WHOLE_FILE, INDEX_FILE, "model-*-of-*.safetensors", SIDE_ADAPTER_FILE),
    *(f"{LORA_FOLDER}/adapter_config.json", f"{LORA_FOLDER}/{LORA_FILE}", f"{RESULTS_FOLDER}/*.yaml"),
    *("preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "*_san.py", "LICENSE*", "NOTICE*"),
)
# What an earlier commit may have of another model, and this one replaces.
REPLACED = (*WEIGHTS, f"{RESULTS_FOLDER}/*", PICTURE_FILE, "*_san.py")
# Texts of people's and of ours; class names and tokens are in files of others.
CHECKED = ("*.md", "*config.json", "*.yaml", "LICENSE*", "NOTICE*")


def upload_model_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    replacements: Mapping[str, bytes] | None = None,
) -> CommitInfo:
    """
    Uploads a model folder's files in one commit: all of them or none. What the repository has of another model's
    weights, results and picture goes in the same commit. In the card, the example loads the repository.

    What is uploaded: weights, configuration, code, processor, tokenizer, card, pictures that the card shows, results;
    and no other file.

    Args:
        folder: as `save_pretrained` makes it, with a processor and a card.
        repo_id: "name" or "owner/name"; it is made if it isn't there.
        private: whether a repository that is made is private; by default as the account has it.
        token: see `huggingface_hub.HfApi`.
        revision: branch; it is made if it isn't there.
        create_pr: whether to open a pull request.
        commit_message, commit_description: of the commit.
        replacements: content of files, by name, that takes the place of the folder's.

    Raises:
        ValueError: the folder isn't complete, its side adapter names a base that others can't load, or a file names a
            path of this machine or an access token. Nothing was sent.
        OSError: a file can't be read, or the Hub refuses or can't be reached.
    """
    folder, replacements = Path(folder), dict(replacements or {})
    files = model_files(folder, replacements)
    check_complete(folder, files)
    check_texts(folder, files, replacements, token)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    card = replacements.get(CARD_FILE) or (folder / CARD_FILE).read_bytes()
    replacements[CARD_FILE] = name_example(card.decode("utf-8"), repo_id, revision).encode("utf-8")
    added = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=replacements.get(name, str(folder / name)))
        for name in files
    ]
    removed = [CommitOperationDelete(path_in_repo=name) for name in _stale_files(api, repo_id, revision, added)]
    return api.create_commit(
        repo_id,
        [*added, *removed],
        commit_message=commit_message or "Upload SAN",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def model_files(folder: Path, replacements: Mapping[str, bytes]) -> list[str]:
    """The files of a folder that belong to its model, by their path in it, and those that are to be added."""
    card = replacements.get(CARD_FILE) or ((folder / CARD_FILE).read_bytes() if (folder / CARD_FILE).is_file() else b"")
    shown = linked_pictures(card.decode("utf-8", errors="replace"), str(folder))
    present = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    travelling = {name for name in present if name in shown or matches(name, TRAVELS)}
    return sorted(travelling | set(replacements))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path is of one of the patterns, whose stars stand for no slash."""
    return any(fnmatch.fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns)


def check_complete(folder: Path, files: list[str]) -> None:
    """
    Raises:
        ValueError: files are missing, or the CLIP under a side adapter is a folder of this machine.
    """
    missing = [name for name in NEEDED if name not in files]
    weights = [name for name in (WHOLE_FILE, INDEX_FILE, SIDE_ADAPTER_FILE) if name in files]
    if INDEX_FILE in weights:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        missing += sorted({*index["weight_map"].values()} - {*files})
    if not weights:
        missing.insert(0, f"{WHOLE_FILE} or {SIDE_ADAPTER_FILE}")
    if missing:
        raise ValueError(
            f"'{folder}' is no complete model folder: it has no {', '.join(missing)}. Save model and processor there "
            "first (san_hf.hub.save_pretrained writes both, and a card)."
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if SIDE_ADAPTER_FILE in weights and not is_hub_id(base):
        raise ValueError(
            f"The side adapter in '{folder}' is on the CLIP '{base}' (base_model_name_or_path in config.json), a "
            "folder of this machine that nobody else can load: name the same CLIP on the Hub, base_model='owner/name' "
            "(--base owner/name), which is compared; or push the whole model: adapter_only=False (--whole)."
        )
    if config.get("lora_folder") and f"{LORA_FOLDER}/{LORA_FILE}" not in files:
        raise ValueError(f"'{folder}' lacks {LORA_FOLDER}/{LORA_FILE}, which its config.json names (lora_folder).")


def check_texts(folder: Path, files: list[str], replacements: Mapping[str, bytes], token: str | bool | None) -> None:
    """
    Raises:
        ValueError: a text that is to be uploaded has a path of this machine, or an access token.
    """
    tokens = {secret for secret in (token, get_token()) if isinstance(secret, str) and len(secret) > 6}
    paths = {f"{path}{os.sep}" for path in _machine_paths(folder)}
    for name in files:
        if not matches(name.rpartition("/")[2], CHECKED):
            continue
        content = replacements[name] if name in replacements else (folder / name).read_bytes()
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            place = f"{folder / name}, line {number}"
            if any(secret in line for secret in tokens):
                raise ValueError(f"{place}, has an access token of the Hub: remove it.")
            if found := [path for path in paths if path in line or path.rstrip(os.sep) + '"' in line]:
                raise ValueError(
                    f"{place}, has a path of this machine ('{max(found, key=len)}...'), which others would see: remove "
                    "it."
                )


def _machine_paths(folder: Path) -> Iterator[Path]:
    """Folders whose names would tell of this machine: of the user, of now, and those around the model's."""
    for path in (Path.home(), Path.cwd(), folder.resolve()):
        for part in (path, *path.parents):
            if len(part.parts) > 2 or part == Path.home() != Path(part.anchor):
                yield part


def _stale_files(api: HfApi, repo_id: str, revision: str | None, added: list[CommitOperationAdd]) -> list[str]:
    """What the repository has of another model. Results that others have added stay with the same weights."""
    stored = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision)
        if isinstance(entry, RepoFile)
    }
    weights = [operation for operation in added if matches(operation.path_in_repo, WEIGHTS)]
    same_weights = all(
        (entry := stored.get(operation.path_in_repo)) is not None
        and entry.lfs is not None
        and entry.lfs.sha256 == operation.upload_info.sha256.hex()
        for operation in weights
        if operation.path_in_repo.endswith(".safetensors")
    )
    kept = {operation.path_in_repo for operation in added}
    kept |= {name for name in stored if same_weights and name.startswith(f"{RESULTS_FOLDER}/")}
    return [name for name in stored if name not in kept and matches(name, REPLACED)]
