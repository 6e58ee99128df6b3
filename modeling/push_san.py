"""`model.push_to_hub`: model, processor and card together, where Transformers uploads the model alone."""

import os
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, ModelCard
from transformers import PreTrainedModel

from .adapter_folder_san import find_processor
from .card_san import copy_shown_files, known_card, name_example, new_card, write_card
from .configuration_san import SANConfig
from .processing_san import SANProcessor
from .upload_san import upload_model_folder


class CompletePushMixin(PreTrainedModel):
    """The methods of `SANForSemanticSegmentation` that keep a model, its processor and its card together."""

    config: SANConfig

    def push_to_hub(  # type: ignore[override]  # the base's arguments, and what SAN has beside
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        processor: SANProcessor | None = None,
        tags: list[str] | None = None,
        **save_options: Any,
    ) -> CommitInfo:
        """
        Uploads the complete model to the Hub in one commit: weights, configuration, code, processor, tokenizer, card.

        The card is that of where the model was loaded from. Where its weights, configuration or processor have changed
        since, the card says that training and results are of the model that it started from; without one, it claims
        nothing.

        Args:
            repo_id: "name" or "owner/name"; it is made if it isn't there.
            commit_message, commit_description, private, token, create_pr: see `huggingface_hub.HfApi`.
            revision: branch; it is made if it isn't there.
            processor: the model's; by default that of where it was loaded from, else a new one with the tokenizer of
                the CLIP it was made from.
            tags: more tags for the card.
            **save_options: of [`save_pretrained`], such as `adapter_only` with `base_model`, or `max_shard_size`.

        Raises:
            ValueError: the processor isn't known, the side adapter's base can't be loaded by others, or a file names a
                path of this machine. Nothing was sent.
            OSError: the Hub refuses or can't be reached.
        """
        processor = processor or find_processor(self.config, self.name_or_path, token=token)
        with TemporaryDirectory() as temporary:
            folder = os.path.join(temporary, repo_id.split("/")[-1])
            self.save_complete(folder, processor, name=repo_id, tags=tags, token=token, **save_options)
            return upload_model_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                commit_description=commit_description,
            )

    def save_complete(
        self,
        folder: str | os.PathLike,
        processor: SANProcessor,
        *,
        name: str | None = None,
        card: str | None = None,
        tags: list[str] | None = None,
        adapter_only: bool = False,
        **save_options: Any,
    ) -> None:
        """
        [`save_pretrained`], with processor and card.

        Args:
            folder: it is made if need be.
            processor: the model's.
            name: what the card's example loads; by default the folder's name.
            card: its text; by default that of where the model was loaded from, see [`push_to_hub`].
            tags: more tags for the card.
            adapter_only, **save_options: of `save_pretrained`.
        """
        folder = os.fspath(folder)
        state_dict: Mapping[str, torch.Tensor] = save_options.get("state_dict") or self.state_dict()
        name = name or os.path.basename(os.path.abspath(folder))
        known = None if card else known_card(self, folder, state_dict, processor, title=name.split("/")[-1])
        card = card or known
        if adapter_only:
            save_options["processor"] = processor
        self.save_pretrained(folder, adapter_only=adapter_only, card=card or "", **save_options)
        processor.save_pretrained(folder)
        if known is not None:
            copy_shown_files(known, str(self.name_or_path), folder)
        text = name_example(card or new_card(self.config, name, adapter_only), name)
        if tags:
            parsed = ModelCard(text, ignore_metadata_errors=True)
            parsed.data["tags"] = list(dict.fromkeys([*(parsed.data.get("tags") or []), *tags]))
            text = str(parsed)
        write_card(text, folder, self.config, adapter_only)
