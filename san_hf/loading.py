"""Loading a model that has all of its weights, or saying why not."""

import os
from typing import Any

from san_hf.messages import join_some
from san_hf.modeling import SANConfig, SANForSemanticSegmentation


class ModelError(ValueError):
    """A model that can't be loaded; the message says why, and what to do."""


def load_complete(
    location: str | os.PathLike, *, hub_options: dict[str, Any] | None = None, **kwargs: Any
) -> SANForSemanticSegmentation:
    """
    A SAN from a folder or a repository; complete, where Transformers would fill what is missing at random.

    Args:
        location: what `from_pretrained` of Transformers takes.
        hub_options: `cache_dir`, `revision`, `token`, `local_files_only`.
        **kwargs: for the model's `from_pretrained` (`dtype`, `device_map`, ...), or fields of its configuration.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: it is another kind of model, or its weights are incomplete.
        OSError: there is no such model, or it can't be reached.
    """
    location = os.fspath(location)
    hub_options = hub_options or {}
    model_type = SANConfig.get_config_dict(location, **hub_options)[0].get("model_type")
    if model_type != SANConfig.model_type:
        raise ModelError(
            f"'{location}' is no SAN: expected a config.json of model_type {SANConfig.model_type!r}, got "
            f"{model_type!r}."
        )
    model, info = SANForSemanticSegmentation.from_pretrained(
        location, output_loading_info=True, ignore_mismatched_sizes=True, **hub_options, **kwargs
    )
    wrong = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if wrong:
        raise ModelError(
            f"'{location}' doesn't hold a complete SAN: its weights lack these, or have them in another shape: "
            f"{join_some(wrong)}. Get the folder again, or load it with SANForSemanticSegmentation.from_pretrained to "
            "train what is missing."
        )
    return model
