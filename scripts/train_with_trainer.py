"""Fine-tunes a SAN with transformers' `Trainer`, for those who have a set-up around `Trainer` to put SAN into.

    python scripts/train_with_trainer.py --model san-vit-b-16 --data ./my_photos --output ./my_san
    accelerate launch scripts/train_with_trainer.py ...    # several devices

This package's own training, with recipes and exact resuming, is `san-hf train`. What is particular to SAN here:
- the model gets its vocabulary before training, so that it needs images and label maps only;
- `SANTrainer` is `Trainer` with what SAN needs: accumulated gradients are those of one large batch, the examples'
  columns are left alone, and metrics are computed batch by batch, since the predictions of a whole data set don't fit
  into memory;
- norms and embeddings are not weighed down, and the learning rate falls polynomially.
"""

import argparse
import json
import os
import sys

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from san_hf.data import DataError, SegmentationDataset
from san_hf.hub import load_model
from san_hf.training import (
    SegmentationCollator,
    TrainingTransform,
    load_config,
    parameter_groups,
    polynomial_schedule,
)
from san_hf.training.data import load_training_data
from san_hf.training.hf_trainer import EvaluationExamples, SANTrainer, TrainerMetrics, TrainingExamples


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="san-vit-b-16", help="name or folder of the SAN to start from")
    parser.add_argument("--output", required=True, help="folder for checkpoints and, at the end, the model")
    data = parser.add_argument_group("data", "as of san-hf train")
    data.add_argument("--data", required=True, help="a folder, or the name of a data set on the Hub")
    data.add_argument("--train-split", default="train", help="also a part, such as train[:80%%]")
    data.add_argument(
        "--eval-split",
        type=share_or_name,
        default="validation",
        help="or a number between 0 and 1, to set that share of the training split aside, by image and seed",
    )
    data.add_argument(
        "--shared-images",
        choices=["error", "warn"],
        default="error",
        help="what training and evaluation sharing an image is",
    )
    data.add_argument("--class-names", help="a file or a vocabulary, where the data doesn't say")
    data.add_argument("--image-column")
    data.add_argument("--label-column")
    data.add_argument("--ignore-index", type=int, help="label of unlabelled pixels, where the data doesn't say")
    data.add_argument("--label-shift", type=int, default=0, help="-1 where 0 means unlabelled")
    data.add_argument("--label-palette", help="of label maps in colours: binary, voc, cityscapes, or a file")
    recipe = parser.add_argument_group("recipe", "the defaults are the paper's, for one device")
    recipe.add_argument("--steps", type=int, default=60_000)
    recipe.add_argument("--batch-size", type=int, default=32, help="images per device and forward pass")
    recipe.add_argument("--accumulation-steps", type=int, default=1, help="forward passes per step")
    recipe.add_argument("--learning-rate", type=float, default=1e-4)
    recipe.add_argument("--weight-decay", type=float, default=1e-4)
    recipe.add_argument("--max-grad-norm", type=float, default=0.01)
    recipe.add_argument("--crop-size", type=int, default=640)
    recipe.add_argument("--seed", type=int, default=0)
    run = parser.add_argument_group("run")
    run.add_argument("--eval-steps", type=int, default=5_000, help="steps between evaluations and checkpoints")
    run.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    run.add_argument("--num-workers", type=int, default=4)
    run.add_argument("--report-to", default="none", help="tensorboard, wandb, ...")
    run.add_argument("--resume", action="store_true", help="go on from the output folder's last checkpoint, if any")
    return parser.parse_args(argv)


def share_or_name(text: str) -> float | str:
    """A share of the training split as a number, the name of a split as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def read_data(options: argparse.Namespace) -> tuple[SegmentationDataset, SegmentationDataset]:
    """The data to train and to evaluate on, read and compared as `san-hf train` does."""
    keys = {
        "source": options.data,
        "split": options.train_split,
        "validation_split": options.eval_split,
        "shared_images": options.shared_images,
        "image_column": options.image_column,
        "label_column": options.label_column,
        "class_names": options.class_names,
        "ignore_index": options.ignore_index,
        "label_shift": options.label_shift,
        "label_palette": options.label_palette,
    }
    values = {"output": options.output, "model.checkpoint": options.model, "seed": options.seed}
    values |= {f"data.{key}": value for key, value in keys.items()}
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    train_data, eval_data = load_training_data(config.data, config.seed)
    assert eval_data is not None  # there is always a split or a share
    return train_data, eval_data


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = parse_arguments(argv)
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=options.accumulation_steps,
        learning_rate=options.learning_rate,
        max_grad_norm=options.max_grad_norm,
        bf16=options.mixed_precision == "bf16",
        fp16=options.mixed_precision == "fp16",
        seed=options.seed,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_steps=options.eval_steps,
        save_total_limit=2,
        logging_steps=min(20, options.steps),
        report_to=options.report_to,
        dataloader_num_workers=options.num_workers,
        train_sampling_strategy="sequential",  # TrainingExamples shuffles
        eval_use_gather_object=True,  # images differ in size
    )
    set_seed(options.seed)
    try:
        train_data, eval_data = read_data(options)
        model, processor = load_model(options.model, torch.float32)
    except ValueError as error:  # what is wrong with data, model or options, in words
        sys.exit(f"Error: {error}")

    names, ignore_index = train_data.class_names, train_data.ignore_index
    model.set_vocabulary(names, **processor(text=names, return_tensors="pt"))
    model.config.semantic_loss_ignore_index = ignore_index

    examples_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    groups = parameter_groups(model, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
    metrics = TrainerMetrics(processor, len(names), ignore_index)
    try:
        trainer = SANTrainer(
            model,
            arguments,
            data_collator=SegmentationCollator(processor, ignore_index),
            train_dataset=TrainingExamples(
                train_data,
                TrainingTransform(options.crop_size, ignore_index=ignore_index),
                length=options.steps * examples_per_step,
                seed=options.seed,
            ),
            eval_dataset=EvaluationExamples(eval_data, processor),
            optimizers=(optimizer, polynomial_schedule(optimizer, options.steps)),
            compute_metrics=metrics,
        )
    except ValueError as error:  # what SAN and Trainer can't do together
        sys.exit(f"Error: {error}")
    resume = options.resume and os.path.isdir(options.output)
    try:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(options.output) if resume else None)
        results = trainer.evaluate()
    except DataError as error:  # from a worker process, the message comes with a stack trace before it
        sys.exit("Error: " + str(error).splitlines()[-1].rpartition("DataError: ")[2])
    trainer.save_model()
    if trainer.is_world_process_zero():
        processor.save_pretrained(options.output)
        print(json.dumps(results, indent=2))
    return results


if __name__ == "__main__":
    main()
