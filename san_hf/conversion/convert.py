"""Conversion of checkpoints in the original's layout to Transformers folders, and back."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils.sha import sha_fileobj

from san_hf.cards import load_facts, render_card
from san_hf.files import DISK_ERRORS, check_replaceable, new_file, new_folder, remove_leftovers
from san_hf.json_files import JSONError, read_json
from san_hf.loading import ModelError, load_complete
from san_hf.locks import locked
from san_hf.messages import join_some, one_line
from san_hf.modeling import SANConfig, SANForSemanticSegmentation, SANImageProcessor, SANProcessor

from .errors import ConversionError
from .keys import ATTENTION_MASK, EMPTY_WEIGHT, LOGIT_SCALE, layout, pixel_scale_problems
from .original import read_original
from .releases import HUB_REPO, RELEASES, Release
from .tokenizer import CLIP_VOCABULARY_SIZE, clip_tokenizer


logger = logging.getLogger(__name__)

PATCH_EMBEDDING = "clip_visual_extractor.conv1.weight"
COCO_STUFF_CLASSES = 171  # what the released checkpoints were trained on


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    config: SANConfig | str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    release: Release | None = None,
    base: str | Path | None = None,
) -> Path:
    """Writes a complete Transformers folder for a checkpoint in the original's layout.

    The folder holds the weights (safetensors), the configuration, the processor, the tokenizer, the model's code and
    a card. It appears at `output` only when it is complete.

    Args:
        source: the checkpoint, a `.pth` file (read without running any code in it) or `.safetensors` with the same
            names.
        output: the folder to write.
        config: a configuration, or a JSON file or folder with a saved one. Not needed for the sizes of the two
            released models, which are recognised from the shapes.
        dtype: floating-point type of the written weights.
        overwrite: whether `output` may be a model folder already, which is then replaced.
        release: which released file `source` is known to be. Its card then claims the published results; otherwise
            it only quotes them.
        base: to write the side adapter alone: the CLIP that the checkpoint was trained on, a folder or a repository in
            Transformers format. Its tensors are compared with the checkpoint's frozen ones, and have to be equal.

    Returns:
        `output`, absolute.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file `source`.
        FileExistsError: `output` is there already.
        ConversionError: a file that can't be read, a configuration that is needed or doesn't fit, keys that are
            missing or left over, wrong shapes, another base. The message names them.
        OSError: it can't be written. What was there before is unchanged.
        san_hf.locks.InUseError: another conversion writes to it.
    """
    source, output = Path(source), Path(output).resolve()
    with writing_to(output):
        check_output(output, overwrite, source)
        with new_folder(output) as folder:
            _write_model(source, folder, config, dtype, release, model_id=output.name, base=base)
    return output


def _write_model(
    source: Path,
    folder: Path,
    config: SANConfig | str | Path | None,
    dtype: torch.dtype,
    release: Release | None,
    model_id: str,
    base: str | Path | None,
) -> None:
    original = read_original(source)
    recognized = None
    if config is None:
        recognized = release or recognize_release(original)
        config = recognized.config()
    elif not isinstance(config, SANConfig):
        config = read_config(config)
    if config.vocabulary_size:
        raise ConversionError(
            f"The configuration carries a vocabulary of {config.vocabulary_size} classes, which the original's "
            "layout has no place for. Convert with vocabulary_size 0, then call model.set_vocabulary."
        )
    try:
        state_dict = convert_state_dict(original, config, dtype)
    except ConversionError as error:
        raise ConversionError(f"'{source}' doesn't fit the configuration. {error}") from error

    model = build_empty(config)
    model.load_state_dict(state_dict, strict=True, assign=True)
    processor = build_processor(config)
    if base is None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    else:
        try:
            model.save_pretrained(folder, adapter_only=True, base_model=str(base), processor=processor)
        except (OSError, ValueError) as error:
            raise ConversionError(f"'{source}' can't be converted without its CLIP: {error}") from error
    with source.open("rb") as file:
        checksum = sha_fileobj(file).hex()
    render_card(
        load_facts(recognized.name) if recognized else {"title": model_id},
        model_id=model_id,
        provenance=(
            f"Converted from `{source.name}` (SHA-256 `{checksum}`)"
            + (f" of the Hub repository [{HUB_REPO}](https://huggingface.co/{HUB_REPO})" if release else "")
            + f", stored here as {str(dtype).removeprefix('torch.')}."
        ),
        facts_are_of_these_weights=release is not None or recognized is None,
    ).save(folder / "README.md")


@contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """
    One conversion at a time writes to a file or folder, and says what keeps it from writing.

    Args:
        output: absolute.

    Raises:
        san_hf.locks.InUseError: another one writes to it.
        OSError: the disk is full, or refuses; the message names it.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(output.with_name(f".{output.name[:200]}.lock"), f"A conversion to '{output}'"):
            # What a killed one has left, which may be the old folder under another name.
            remove_leftovers(output.parent)
            yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise OSError(f"'{output}' can't be written: {one_line(error)}. Make room, or choose another place.") from error


def build_empty(config: SANConfig) -> SANForSemanticSegmentation:
    """
    A model without values.

    Raises:
        ConversionError: the configuration describes none that can be built.
    """
    try:
        with torch.device("meta"):
            return SANForSemanticSegmentation(config)
    # Sizes that don't fit make torch and Transformers fail in ways of their own.
    except Exception as error:
        raise ConversionError(
            f"The configuration describes no model that can be built: {one_line(error)} ({type(error).__name__}). "
            "Expected the one that the checkpoint was trained with."
        ) from error


def export_checkpoint(
    model: SANForSemanticSegmentation | str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    num_classes: int = COCO_STUFF_CLASSES,
    overwrite: bool = False,
) -> Path:
    """Writes a model as a checkpoint in the original's layout, `{"model": state dict}`, which the original can load.

    Args:
        model: the model, or a Transformers folder, or a repository on the Hub.
        output: the `.pth` file to write.
        dtype: floating-point type of the weights; the model's own by default. The temperature stays in float32, as
            the original keeps it.
        num_classes: number of classes for the original's criterion (its weights are stored, but follow from this).
        overwrite: whether `output` may be a file already.

    Returns:
        `output`, absolute.

    Raises:
        FileExistsError: `output` is there already.
        ConversionError: the folder doesn't hold a complete SAN, or the model's parameters aren't a SAN's own, e.g.
            with adapters of PEFT not yet merged.
    """
    output = Path(output).resolve()
    if output.is_dir() or (output.exists() and not overwrite):
        raise FileExistsError(f"'{output}' exists already. Choose another name, or allow overwriting a file.")
    if not isinstance(model, SANForSemanticSegmentation):
        folder = model
        try:
            model = load_complete(folder)
        except ModelError as error:
            raise ConversionError(str(error)) from error
        except Exception as error:  # safetensors, torch and transformers each have errors of their own
            raise ConversionError(f"'{folder}' can't be loaded as a SAN: {error}") from error
    if model.class_embeds is not None:
        logger.warning(
            "The original's layout has no place for the %d class names the model carries: they are left out.",
            model.config.vocabulary_size,
        )
    original = export_state_dict(model.state_dict(), model.config)
    original[EMPTY_WEIGHT] = torch.ones(num_classes + 1)
    original[EMPTY_WEIGHT][-1] = model.config.no_object_weight
    context = model.config.clip_text_config.max_position_embeddings
    original[ATTENTION_MASK] = torch.full((context, context), float("-inf")).triu(1)
    original = {
        key: tensor.to("cpu", torch.float32 if key == LOGIT_SCALE else dtype or model.dtype)
        for key, tensor in original.items()
    }
    with writing_to(output), new_file(output) as file:
        torch.save({"model": original}, file)
    return output


def convert_state_dict(
    original: dict[str, torch.Tensor], config: SANConfig, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The state dict of SANForSemanticSegmentation from the original's, which is emptied on the way.

    Raises:
        ConversionError: keys that are missing or left over, shapes or types that don't fit; the message names them.
    """
    expected = build_empty(config).state_dict()
    converted: dict[str, torch.Tensor] = {}
    missing, misshapen = [], []
    for entry in layout(config):
        tensor = original.pop(entry.original, None)
        if tensor is None:
            missing.append(entry.original)
            continue
        shape = tuple(entry.to_original([expected[name] for name in entry.ours]).shape)
        if tuple(tensor.shape) != shape:
            misshapen.append(f"{entry.original} (got {tuple(tensor.shape)}, expected {shape})")
        elif not tensor.is_floating_point():
            misshapen.append(f"{entry.original} (got {tensor.dtype}, expected a floating-point type)")
        else:
            # Copies, contiguous: what was read may be a strided view of a large file.
            parts = [part.to(dtype, copy=True).contiguous() for part in entry.to_ours(tensor)]
            converted.update(zip(entry.ours, parts, strict=True))
    # These two hold nothing that was learned, and their absence is no loss.
    original.pop(EMPTY_WEIGHT, None)
    original.pop(ATTENTION_MASK, None)
    misshapen += pixel_scale_problems(original)
    problems = [
        f"{label}: {join_some(keys)}."
        for label, keys in (
            ("Missing keys", missing),
            ("Unknown keys", list(original)),
            ("Wrong shapes, types or values", misshapen),
        )
        if keys
    ]
    if problems:
        raise ConversionError(
            " ".join(problems) + " A model of other sizes needs its configuration: pass a saved SANConfig as config."
        )
    return converted


def export_state_dict(state_dict: dict[str, torch.Tensor], config: SANConfig) -> dict[str, torch.Tensor]:
    """The original's state dict from that of SANForSemanticSegmentation, without the two that it could compute."""
    state_dict = dict(state_dict)
    state_dict.pop("class_embeds", None)
    original, missing = {}, []
    for entry in layout(config):
        tensors = {name: state_dict.pop(name) for name in entry.ours if name in state_dict}
        missing += [name for name in entry.ours if name not in tensors]
        if len(tensors) == len(entry.ours):
            original[entry.original] = entry.to_original([t.detach() for t in tensors.values()]).contiguous()
    if missing or state_dict:
        raise ConversionError(
            "These are not the parameters of a SAN as it was built: "
            f"{join_some(missing) or 'none'} missing, {join_some(list(state_dict)) or 'none'} left over. "
            "Merge adapters into the weights first (PEFT: merge_and_unload)."
        )
    return original


def recognize_release(original: dict[str, torch.Tensor]) -> Release:
    """Which released model a state dict has the sizes of, by CLIP's patch convolution.

    Raises:
        ConversionError: neither, or no state dict of the original at all.
    """
    patch_embedding = original.get(PATCH_EMBEDDING)
    if patch_embedding is None:
        raise ConversionError(
            f"This is no checkpoint of the original SAN: it has no {PATCH_EMBEDDING}, but {join_some(list(original))}."
        )
    for release in RELEASES.values():
        if tuple(patch_embedding.shape) == release.patch_embedding:
            return release
    known = ", ".join(f"{release.patch_embedding} ({release.name})" for release in RELEASES.values())
    raise ConversionError(
        f"Unknown sizes: {PATCH_EMBEDDING} is {tuple(patch_embedding.shape)}, known are {known}. "
        "Pass the configuration: a SANConfig, or a JSON file with a saved one."
    )


def read_config(path: str | Path) -> SANConfig:
    """A saved SANConfig, from its JSON file or from the folder that holds it as config.json.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: it isn't JSON, or not the configuration of a SAN.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"There is no configuration '{path}'.")
    try:
        values = read_json(path)
    except JSONError as error:
        raise ConversionError(str(error)) from error
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != SANConfig.model_type:
        raise ConversionError(
            f"'{path}' isn't the configuration of a SAN: its model_type is {model_type!r}, expected "
            f"{SANConfig.model_type!r}. SANConfig(...).save_pretrained(folder) writes one."
        )
    try:
        return SANConfig.from_dict(values)
    except Exception as error:  # values that no size can have fail where they are first used
        expected = isinstance(error, StrictDataclassError | TypeError | ValueError)
        reason = one_line(error) if expected else repr(error)
        raise ConversionError(f"'{path}' isn't a valid configuration: {reason}") from error


def build_processor(config: SANConfig) -> SANProcessor:
    """The processor the original's checkpoints go with: CLIP's tokenizer, images resized as in its evaluation.

    Raises:
        ConversionError: the text tower has another vocabulary than CLIP's.
    """
    text_config = config.clip_text_config
    if text_config.vocab_size != CLIP_VOCABULARY_SIZE:
        raise ConversionError(
            f"The configuration's text tower has {text_config.vocab_size} tokens, CLIP's tokenizer has "
            f"{CLIP_VOCABULARY_SIZE}: expected a checkpoint of the original, which always uses CLIP's."
        )
    return SANProcessor(
        image_processor=SANImageProcessor(
            size={"shortest_edge": config.image_size, "longest_edge": 4 * config.image_size},
            ignore_index=config.semantic_loss_ignore_index,
        ),
        tokenizer=clip_tokenizer(text_config.max_position_embeddings),
    )


def check_output(output: Path, overwrite: bool, source: Path) -> None:
    """
    Before anything is computed: nothing is lost by writing.

    Args:
        output: the folder to write, absolute.
        overwrite: whether it may be a model folder already.
        source: a file that must not be lost by that.

    Raises:
        FileExistsError: something is there that is not to be replaced.
    """
    check_replaceable(output, overwrite, "config.json", "a model folder")
    if source.resolve().is_relative_to(output):
        raise FileExistsError(f"'{output}' holds '{source}' itself: it is not overwritten. Choose another folder.")
