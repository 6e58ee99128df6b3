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

from san_hf.data import DataError, load_segmentation_dataset
from san_hf.hub import load_model
from san_hf.training import SegmentationCollator, TrainingTransform, parameter_groups, polynomial_schedule
from san_hf.training.hf_trainer import EvaluationExamples, SANTrainer, TrainerMetrics, TrainingExamples


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="san-vit-b-16", help="name or folder of the SAN to start from")
    parser.add_argument("--output", required=True, help="folder for checkpoints and, at the end, the model")
    data = parser.add_argument_group("data", "see san_hf.data.load_segmentation_dataset")
    data.add_argument("--data", required=True, help="a folder, or the name of a data set on the Hub")
    data.add_argument("--train-split", default="train")
    data.add_argument("--eval-split", default="validation")
    data.add_argument("--class-names", help="a file or a vocabulary, where the data doesn't say")
    data.add_argument("--image-column")
    data.add_argument("--label-column")
    data.add_argument("--ignore-index", type=int, help="label of unlabelled pixels, where the data doesn't say")
    data.add_argument("--label-shift", type=int, default=0, help="-1 where 0 means unlabelled")
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
        model, processor = load_model(options.model, torch.float32)
        train_data, eval_data = (
            load_segmentation_dataset(
                options.data,
                split,
                image_column=options.image_column,
                label_column=options.label_column,
                class_names=options.class_names,
                ignore_index=options.ignore_index,
                label_shift=options.label_shift,
            )
            for split in (options.train_split, options.eval_split)
        )
    except ValueError as error:  # ModelError or DataError: what is wrong with what was asked for, in words
        sys.exit(f"Error: {error}")

    names, ignore_index = train_data.class_names, train_data.ignore_index
    model.set_vocabulary(names, **processor(text=names, return_tensors="pt"))
    model.config.semantic_loss_ignore_index = ignore_index

    examples_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    groups = parameter_groups(model, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
    metrics = TrainerMetrics(processor, len(names), ignore_index)
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
