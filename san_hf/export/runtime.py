"""Exported folders in place of a model's vision part."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from san_hf.loading import check_processor
from san_hf.messages import one_line
from san_hf.modeling import SANConfig, SANForSemanticSegmentation, SANModelOutput, SANProcessor
from san_hf.modeling.outputs_san import sizes_of_batch
from san_hf.paths import expand_path

from .description import TEXT_FILE, model_digest, read_description
from .errors import ExportError
from .forms import OpenForm
from .targets import find_target


RUNTIMES = ("onnx", "openvino")
OUTPUTS = ("masks_queries_logits", "mask_embeds")
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class ExportedVision(nn.Module):
    """
    The vision part of a model, run by another runtime: what [`SANModel`] is to a predictor. Threads may share it.

    Args:
        folder: of an open export.
        runtime: "onnx" or "openvino", as it was exported for.
        dtype: to compute in; only OpenVINO has others than float32: bfloat16.

    Attributes:
        description: what the folder says about itself.

    Raises:
        ExportError: it is no such folder, or the runtime isn't installed.
    """

    def __init__(self, folder: str | os.PathLike, runtime: str, dtype: torch.dtype = torch.float32):
        super().__init__()
        path = Path(expand_path(folder))
        self.description = read_description(path)
        if runtime not in RUNTIMES:
            raise ExportError(f"Got the runtime {runtime!r:.40}, expected one of {', '.join(RUNTIMES)}.")
        if (target := self.description["target"]) != runtime:
            raise ExportError(f"'{path}' was exported for {target}, got the runtime {runtime!r}: give that, or export.")
        if self.description["form"] != OpenForm.name:
            raise ExportError(
                f"'{path}' is of the closed form, whose classes and post-processing are in the graph. Expected an open "
                "one: `san-hf export --form open`."
            )
        options: dict[str, Any] = {}
        if runtime == "openvino" and dtype in PRECISIONS:
            options["precision"] = PRECISIONS[dtype]
        elif dtype != torch.float32:
            raise ExportError(f"The runtime {runtime!r} computes in float32 here, got {dtype}.")
        self.run = find_target(runtime).Runner(path, **options)

    def forward(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs: Any
    ) -> SANModelOutput:
        """
        Args:
            pixel_values: (B, 3, H, W) float32; H and W are multiples of `description["size_multiple"]`.
            image_sizes: handed through, as [`SANModel`] does.
            **kwargs: options of [`SANModel`] that are not asked for.

        Raises:
            ExportError: another size.
        """
        if unknown := sorted(name for name, value in kwargs.items() if value and name != "return_dict"):
            raise ExportError(f"An exported graph doesn't give {unknown[0]!r}: load the model itself.")
        multiple, smallest = self.description["size_multiple"], self.description["size_min"]
        height, width = pixel_values.shape[-2:]
        if height % multiple or width % multiple or min(height, width) < smallest:
            raise ExportError(
                f"Got images of {height} x {width}, expected sides of at least {smallest} that are multiples of "
                f"{multiple}, as the folder's processor pads them."
            )
        # No class is asked for here; the graph takes at least one.
        classes = np.zeros((1, self.description["embed_dim"]), dtype=np.float32)
        inputs = {"pixel_values": pixel_values.float().cpu().numpy(), "class_embeds": classes}
        masks, embeds = (torch.from_numpy(np.array(part)) for part in self.run(inputs, OUTPUTS))
        patch = self.description["patch_size"]
        return SANModelOutput(
            masks_queries_logits=masks,
            mask_embeds=embeds,
            image_sizes=image_sizes,
            padded_sizes=sizes_of_batch(pixel_values, (height, width)),
            patch_sizes=sizes_of_batch(pixel_values, (patch, patch)),
        )

    def check_model(self, model: SANForSemanticSegmentation) -> None:
        """
        Raises:
            ExportError: the graph is of another model.
        """
        if self.description["digest"] != model_digest(model):
            raise ExportError("The exported folder is of another model than this one: export this one.")


def load_exported(
    folder: str | os.PathLike,
    runtime: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[SANForSemanticSegmentation, SANProcessor]:
    """
    A model whose vision part is an exported graph, and its processor: for prediction, on the CPU.

    Args:
        folder: of an open export.
        runtime: of [`ExportedVision`], as `dtype` is.
        device: the CPU.
        dtype: to compute in.

    Raises:
        ExportError: it is no such folder, is incomplete, or the runtime isn't installed.
    """
    if torch.device(device).type != "cpu":
        raise ExportError(f"Exported graphs run on the CPU here, got the device {str(device)!r}.")
    path = Path(expand_path(folder))
    vision = ExportedVision(path, runtime, dtype)
    try:
        config = SANConfig.from_pretrained(path)
        processor = SANProcessor.from_pretrained(path)
        check_processor(processor, config, path)
        with torch.device("meta"):
            model = SANForSemanticSegmentation(config)
        model.model = vision
        model.load_state_dict(load_file(path / TEXT_FILE), assign=True)
        for module in model.text_model.modules():
            if "position_ids" in dict(module.named_buffers(recurse=False)):  # not among the tensors that are saved
                module.position_ids = torch.arange(config.clip_text_config.max_position_embeddings)[None]
    except Exception as error:
        raise ExportError(
            f"'{path}' lacks what new class names need, or it is damaged: {one_line(error)}. Export the model again."
        ) from error
    return model.eval(), processor
