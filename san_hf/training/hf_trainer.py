"""Data sets and metrics for transformers' `Trainer`, as `scripts/train_with_trainer.py` uses them."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from san_hf.cards import render_card
from san_hf.data import DataError, SegmentationDataset
from san_hf.evaluation.metrics import ConfusionMatrixMetrics
from san_hf.evaluation.published import SOURCES
from san_hf.files import write_file
from san_hf.hub import push_folder
from san_hf.messages import escape_markdown, join_some
from san_hf.modeling import SANForSemanticSegmentationOutput, SANProcessor
from san_hf.modeling.adapter_folder_san import LORA_FOLDER, active_lora, restore_lora
from san_hf.modeling.card_san import CARD_FILE, describe_contents
from san_hf.modeling.fast_linear_san import fast_linear
from san_hf.training.augmentation import TrainingTransform
from san_hf.training.run_card import CLASSES_LISTED, is_on_the_hub, name_in_text
from san_hf.training.sharding import check_engine, give_temperature_a_dimension
from san_hf.training.stream import AugmentedSamples, SampleStream


class TrainingExamples(Dataset):
    """
    All augmented examples of a training, in the order in which they are drawn: those that `san-hf train` sees with the
    same seed. For `Trainer`, the whole training is thus one epoch.

    The n-th example depends on the data, the transform, the seed and n only: neither on workers and processes nor on
    where a training was resumed.

    Args:
        data: the images; not streamed.
        transform: the augmentation.
        length: how many examples are drawn in the whole training: optimiser steps times images in each.
        seed: of the order and the augmentation.

    Raises:
        ValueError: a transform that pads with another label than the data's `ignore_index`.
    """

    def __init__(self, data: SegmentationDataset, transform: TrainingTransform, length: int, seed: int = 0):
        padding = getattr(transform, "ignore_index", data.ignore_index)
        if padding != data.ignore_index:
            raise ValueError(
                f"The transform pads with the label {padding}, but unlabelled pixels of the data have "
                f"{data.ignore_index}: expected TrainingTransform(..., ignore_index={data.ignore_index})."
            )
        self.samples = AugmentedSamples(data, transform, seed)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        """
        `image`, (H, W, 3) uint8, and `label_map`, (H, W) int32, of the transform's size; and `name`.

        Raises:
            DataError: the example can't be used.
        """
        samples = self.samples
        [sample] = next(iter(SampleStream(samples.data, samples.seed, batch_size=1, first=position)))
        example = samples[sample]
        if isinstance(example, DataError):
            raise example
        return example


class EvaluationExamples(Dataset):
    """
    The examples as the model sees them in use: resized by the processor's rule, whole, not augmented.

    Args:
        data: the images; not streamed.
        processor: the model's.
    """

    def __init__(self, data: SegmentationDataset, processor: SANProcessor):
        self.data = data
        self.image_processor = processor.image_processor

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`image`, (H, W, 3) uint8, and `label_map`, (H, W) int64."""
        image, label_map, _ = self.data[index]
        # Only the resizing: the rest is the collator's.
        resized = self.image_processor(
            image,
            segmentation_maps=label_map,
            ignore_index=self.data.ignore_index,
            do_rescale=False,
            do_normalize=False,
            do_pad=False,
            return_tensors=None,
        )
        return {"image": np.moveaxis(np.asarray(resized["pixel_values"][0]), 0, -1), "label_map": resized["labels"][0]}


class TrainerMetrics:
    """
    `compute_metrics` for [`SANTrainer`], or for `Trainer` with `batch_eval_metrics=True`, and [`label_maps`] as its
    `preprocess_logits_for_metrics`. Between batches it keeps a confusion matrix, never predictions.

    Labels are compared at the size at which the model sees the image; `san-hf evaluate` compares them at the
    original's, as is done for published results, which differ a little. On several processes, images of different
    sizes need `eval_use_gather_object=True`, which [`SANTrainer`] sets.

    Args:
        processor: the model's.
        num_labels: number of classes.
        ignore_index: label of unlabelled pixels.
        ignore_index_is_class: whether it is meant to be one of the classes.

    Raises:
        ValueError: an `ignore_index` that is a class.
    """

    def __init__(
        self,
        processor: SANProcessor,
        num_labels: int,
        ignore_index: int = 255,
        ignore_index_is_class: bool = False,
    ):
        self.processor = processor
        self.ignore_index = ignore_index
        self._start = ConfusionMatrixMetrics(num_labels, ignore_index, ignore_index_is_class=ignore_index_is_class)
        self._counts: ConfusionMatrixMetrics | None = None

    def label_maps(self, logits: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
        """
        Label maps of a batch, which `Trainer` keeps instead of the logits.

        Args:
            logits: what `Trainer` takes of SAN's outputs: `class_queries_logits` (B, Q, C + 1),
                `masks_queries_logits` (B, Q, h, w), `padded_sizes` and `patch_sizes` (B, 2).
            labels: (B, H, W); not used, but without them nothing would be measured.

        Returns:
            The predicted label maps, (B, Hp, Wp) int64, of the padded input.

        Raises:
            ValueError: other logits, or no labels.
        """
        if labels is None:
            raise ValueError(
                "Trainer hands on no labels, so that it would measure nothing: the examples need labels, and "
                "label_names=['labels'] in TrainingArguments, if it is given."
            )
        names = ("class_queries_logits", "masks_queries_logits", "padded_sizes", "patch_sizes")
        if not isinstance(logits, tuple | list) or len(logits) != len(names):
            raise ValueError(f"Expected SAN's outputs as Trainer takes them, {', '.join(names)}, got {type(logits)}.")
        fields: dict[str, Any] = dict(zip(names, logits))
        outputs = SANForSemanticSegmentationOutput(**fields)
        return torch.stack(self.processor.post_process_semantic_segmentation(outputs))

    def __call__(self, prediction: EvalPrediction, compute_result: bool | None = None) -> dict[str, float]:
        """
        Counts a batch.

        Args:
            prediction: label maps as `predictions` and `label_ids`: (B, H, W), or a list of (H, W).
            compute_result: whether it was the last.

        Returns:
            After the last batch, the averages of [`ConfusionMatrixMetrics`], in percent; nothing before.

        Raises:
            ValueError: `Trainer` doesn't compute metrics batch by batch, or its labels can't be.
        """
        if compute_result is None:
            raise ValueError("TrainerMetrics needs batch_eval_metrics=True in TrainingArguments; SANTrainer sets it.")
        if self._counts is None:
            self._counts = self._start.new()
        counts = self._counts
        for label_map, labels in zip(prediction.predictions, prediction.label_ids):
            # `Trainer` adds rows where the heights differ between processes.
            counts.update(label_map, labels[: len(label_map)])
        if not compute_result:
            return {}
        self._counts = None
        return counts.compute().metrics


class SANTrainer(Trainer):
    """
    transformers' `Trainer`, with what SAN needs of it:
    - gradients accumulated over several batches are those of one large batch: the losses are divided by what all of
      them show (see [`~SANForSemanticSegmentation.count_targets`]);
    - CLIP's temperature has a dimension where FSDP or DeepSpeed spreads the model, and none in what is saved;
    - `remove_unused_columns` is off, as the collator needs columns that the model doesn't have;
    - with [`TrainerMetrics`] as `compute_metrics`, its [`~TrainerMetrics.label_maps`] and `batch_eval_metrics` are set;
    - what it saves has the collator's processor, and what it pushes with `push_to_hub=True` is complete: weights, code,
      processor and a card that says what was trained and measured, in one commit. `Trainer` itself would also upload
      its arguments, with paths of this machine.

    Args:
        model: a SAN, perhaps in PEFT's.
        args: of which those above are changed.
        data_collator, **kwargs: of `Trainer`. `processing_class` is by default the collator's processor.

    Raises:
        ValueError: label smoothing, GPUs that share a process, parts that don't agree on the label of unlabelled
            pixels, or an engine (FSDP, DeepSpeed) that was asked for and is not in force, or comes with `optimizers`.
    """

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, data_collator: Any = None, **kwargs):
        args = TrainingArguments() if args is None else args
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, but SAN classifies masks, not pixels: leave "
                "it at 0."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"One process would share its batches among {args.n_gpu} GPUs, each of which would divide the loss by "
                "its own masks: start it with accelerate launch or torchrun, a process for each GPU."
            )
        engine = _engine_asked_for(args)
        if engine is not None and any(part is not None for part in kwargs.get("optimizers", ())):
            # With DeepSpeed, Trainer (transformers 5.23) would quietly train with others.
            raise ValueError(
                f"optimizers were given, but with {engine} Trainer makes an optimiser and a schedule of its own: leave "
                "them out and set those of TrainingArguments, leave the engine out, or train with san-hf train."
            )
        args.remove_unused_columns = False
        if isinstance(metrics := kwargs.get("compute_metrics"), TrainerMetrics):
            args.batch_eval_metrics = True
            # Images of several processes differ in size.
            args.eval_use_gather_object = args.eval_use_gather_object or args.world_size > 1
            kwargs.setdefault("preprocess_logits_for_metrics", metrics.label_maps)
        if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy is '{HubStrategy(args.hub_strategy).value}', which would upload the optimiser's state "
                "with paths of this machine: choose 'every_save' or 'end'."
            )
        if kwargs.get("processing_class") is None:
            metrics_processor = getattr(kwargs.get("compute_metrics"), "processor", None)
            kwargs["processing_class"] = getattr(data_collator, "processor", None) or metrics_processor
        super().__init__(model, args, data_collator, **kwargs)
        check_same_ignore_index(self)
        check_engine(self.accelerator)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            give_temperature_a_dimension(self.accelerator.unwrap_model(model))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one step, each with the `target_counts` of all of them, over all processes."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) > 1:
            targets = [{name: batch.get(name) for name in ("labels", "class_labels")} for batch in batches]
            model: Any = self.model
            counts = torch.stack([model.count_targets(**target) for target in targets]).sum(0)
            counts = self.accelerator.reduce(counts.to(device), "sum")
            batches = [{**batch, "target_counts": counts} for batch in batches]
        return batches, num_items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[`Trainer.training_step`], by the faster library's float32 products on a CPU."""
        with fast_linear(self.args.device):
            return super().training_step(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore_lora(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._restore_lora(Path(str(self.state.best_model_checkpoint)))

    def _restore_lora(self, checkpoint: Path) -> None:
        """LoRA's weights are saved beside the model's, where `Trainer` doesn't look for them."""
        model = self.accelerator.unwrap_model(self.model)
        # Under an engine they are in its own state; PEFT's own models have them where `Trainer` looks.
        elsewhere = self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(model, PreTrainedModel)
        if not elsewhere and (lora := active_lora(model)):
            restore_lora(model, checkpoint / LORA_FOLDER, lora[0])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the card of the model in `output_dir`: what was trained on, how, and what was measured of it."""
        if self.is_world_process_zero():
            self._write_card(self._output, self.hub_model_id, kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Saves the model in `output_dir`, complete, and uploads it in one commit.

        Args:
            commit_message: of the commit.
            blocking: must be True: nothing changes the files while they are sent.
            token, revision, private: as `Trainer` has them.
            **kwargs: `license`, `dataset` (names on the Hub) and `model_name`, for the card.

        Returns:
            The commit; None in all processes but the first.

        Raises:
            san_hf.hub.PushError, ValueError: see [`san_hf.hub.push_folder`].
        """
        if not blocking:
            raise ValueError("blocking is False, but the model's files must not change while they are sent: leave it.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._write_card(self._output, self.hub_model_id or self.args.hub_model_id, kwargs)
        return self._push(self._output, commit_message, token, revision, private)

    @property
    def _output(self) -> Path:
        return Path(str(self.args.output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads the model of a checkpoint: what `Trainer` does after each save, with `hub_strategy` "every_save"."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = Path(checkpoint_folder)
        self._write_card(folder, self.hub_model_id, {})
        self._push(folder, f"Training in progress, step {self.state.global_step}", None, None, None)

    def _push(
        self, folder: Path, message: str | None, token: str | None, revision: str | None, private: bool | None
    ) -> CommitInfo:
        return push_folder(
            folder,
            self.hub_model_id or self.args.hub_model_id or self._output.resolve().name,
            private=self.args.hub_private_repo if private is None else private,
            token=self.args.hub_token if token is None else token,
            revision=self.args.hub_revision if revision is None else revision,
            commit_message=message,
        )

    def _write_card(self, folder: Path, name: str | None, options: dict[str, Any]) -> None:
        name = name or folder.resolve().name
        model: Any = self.accelerator.unwrap_model(self.model)
        # After a training with load_best_model_at_end, the model is that of another step than the last.
        best = self.state.best_global_step if self.args.load_best_model_at_end and folder == self._output else None
        options = {"model_name": name.split("/")[-1], "step": best or self.state.global_step} | options
        card = render_card(self._card_facts(model, options), name)
        write_file(folder / CARD_FILE, str(card))

    def _card_facts(self, model: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Facts for the card, see [`san_hf.cards.render_card`], as far as `Trainer` knows them."""
        names = [model.config.id2label[label] for label in range(model.config.vocabulary_size or 0)]
        start = str(getattr(model, "name_or_path", "") or "")
        training = (
            f"Trained by transformers' Trainer for {options['step']} of {self.state.max_steps} steps of "
            f"{self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size} images"
            + (f", from {name_in_text(start)}" if start else "")
            + f", at a learning rate of {self.args.learning_rate:g} at the start. CLIP was "
            f"{'frozen' if model.config.freeze_clip else 'trained, too'}. Seed {self.args.seed}."
        )
        datasets = options.get("dataset") or []
        facts: dict[str, Any] = {
            "title": options["model_name"],
            "license": options.get("license"),
            "training": training,
            "contents": describe_contents(model.config, adapter_only=False),
            "datasets": [datasets] if isinstance(datasets, str) else datasets or None,
            "base_model": start if is_on_the_hub(start) else None,
            "base_model_relation": "finetune" if is_on_the_hub(start) else None,
        }
        if names:
            listed = join_some(map(escape_markdown, names), CLASSES_LISTED)
            facts |= {"data": f"The model carries {len(names)} classes: {listed}.", "sample_classes": names[:3]}
        logged = [log for log in self.state.log_history if log["step"] == options["step"] and "eval_mIoU" in log]
        if logged and isinstance(self.eval_dataset, EvaluationExamples):
            data = self.eval_dataset.data
            row: dict[str, Any] = {"dataset": f"{data.name} {data.split}", "images": len(data)}
            known = ((title, logged[-1].get(f"eval_{metric}", math.nan)) for metric, (title, _) in SOURCES.items())
            facts["results"] = [row | {title: round(value, 2) for title, value in known if not math.isnan(value)}]
            facts["results_note"] = (
                "In percent, of this training's own evaluation, at the size at which the model sees the images; "
                "published results compare them at the images' own size."
            )
        return facts


def _engine_asked_for(args: TrainingArguments) -> str | None:
    if args.deepspeed_plugin is not None:
        return "DeepSpeed"
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return "FSDP" if by_launcher or args.fsdp_plugin_args is not None else None


def check_same_ignore_index(trainer: Trainer) -> None:
    """
    Raises:
        ValueError: model, augmentation, collator and metrics take other labels for that of unlabelled pixels.
    """
    model: Any = trainer.model
    found = {"model.config.semantic_loss_ignore_index": model.config.semantic_loss_ignore_index}
    for name, part in (
        ("data_collator.ignore_index", trainer.data_collator),
        ("compute_metrics.ignore_index", trainer.compute_metrics),
        ("train_dataset's ignore_index", getattr(trainer.train_dataset, "samples", None)),
        ("eval_dataset's ignore_index", getattr(trainer.eval_dataset, "data", None)),
    ):
        part = getattr(part, "data", part) if name.startswith("train") else part
        if isinstance(value := getattr(part, "ignore_index", None), int):
            found[name] = value
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} is {value}" for name, value in found.items())
        raise ValueError(f"Unlabelled pixels have one label, but {listed}: set all of them to that of the data.")
