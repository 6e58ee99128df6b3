"""An exported graph against the model it came from.

What torch gives is computed in the way of the model's users, by `forward` and the processor's post-processing, and not
by the code that was exported.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from san_hf.inference.vocabulary import Vocabulary
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.modeling.outputs_san import SANForSemanticSegmentationOutput

from .errors import ExportError
from .forms import ClosedForm, OpenForm, size_rule


# Of an output's largest value; a label may be another one where its score is that close to the highest.
TOLERANCE = 1e-3

Run = Callable[[Mapping[str, np.ndarray], Sequence[str]], list[np.ndarray]]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """
    What torch gives in place of a graph.

    Attributes:
        form: of the graph.
        model: the model it is from, in evaluation mode.
        processor: the model's.
        vocabulary: of a closed graph.
    """

    form: OpenForm | ClosedForm
    model: SANForSemanticSegmentation
    processor: SANProcessor
    vocabulary: Vocabulary | None

    @torch.inference_mode()
    def outputs(self, inputs: Tensors) -> SANForSemanticSegmentationOutput:
        """The model's outputs for a graph's inputs."""
        class_embeds = inputs.get("class_embeds")
        if class_embeds is None:
            class_embeds = cast(Vocabulary, self.vocabulary).class_embeds
        return self.model(inputs["pixel_values"], class_embeds=class_embeds, return_dict=True)

    def results(self, outputs: SANForSemanticSegmentationOutput) -> dict[str, torch.Tensor]:
        """The graph's outputs, from the model's."""
        if isinstance(self.form, OpenForm):
            return {name: outputs[name] for name in self.form.outputs}
        logits, first = outputs.logits, self.form.num_labels
        if first < logits.shape[1]:
            logits = torch.cat([logits[:, :first], logits[:, first:].amax(1, keepdim=True)], dim=1)
        return {"logits": logits}

    def scores(self, outputs: SANForSemanticSegmentationOutput) -> torch.Tensor:
        """The scores that [`labels`] are the highest of, (B, L, height, width)."""
        if "logits" in self.form.outputs and "labels" not in self.form.outputs:
            return self.results(outputs)["logits"].exp()
        processed: list[Any] = self.processor.post_process_semantic_segmentation(
            outputs, num_labels=getattr(self.form, "num_labels", None), return_segmentation_scores=True
        )
        return torch.stack([image["segmentation_scores"] for image in processed])

    def labels(self, results: Tensors, outputs: SANForSemanticSegmentationOutput) -> torch.Tensor:
        """Label maps from a graph's outputs, (B, height, width), at the size of the input or of the masks."""
        if "labels" in results:
            return results["labels"]
        if "logits" in results:
            return results["logits"].argmax(1)
        sizes = {"padded_sizes": outputs.padded_sizes, "patch_sizes": outputs.patch_sizes}
        whole: Any = SANForSemanticSegmentationOutput(**{**results, **sizes})  # type: ignore[arg-type]  # by name
        return torch.stack(self.processor.post_process_semantic_segmentation(whole))


def run_graph(run: Run, form: OpenForm | ClosedForm, inputs: Tensors) -> dict[str, torch.Tensor]:
    """A graph's outputs, as torch has them."""
    results = run(to_arrays(inputs), form.outputs)
    return {name: torch.from_numpy(np.array(result)) for name, result in zip(form.outputs, results)}


def verify(run: Run, reference: Reference) -> dict[str, Any]:
    """
    Compares a graph with torch over several batches, sizes and numbers of classes, on noise.

    Returns:
        For the description: what was compared, and the largest difference found, of an output's largest value.

    Raises:
        ExportError: they differ.
    """
    largest, compared = 0.0, []
    for inputs in verification_inputs(reference):
        shapes = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in inputs.items())
        got, outputs = run_graph(run, reference.form, inputs), reference.outputs(inputs)
        for name, expected in reference.results(outputs).items():
            difference = relative_difference(name, got[name], expected)
            if not difference <= TOLERANCE:  # nor if it is no number
                raise ExportError(
                    f"The exported graph isn't the model: its {name} for {shapes} differ by {difference:.1e} of the "
                    f"largest value, expected at most {TOLERANCE:.0e}."
                )
            largest = max(largest, difference)
        labels, scores = reference.labels(got, outputs), reference.scores(outputs)
        missed = scores.amax(1) - scores.gather(1, labels[:, None])[:, 0]
        if missed.max() > TOLERANCE * scores.max():
            raise ExportError(
                f"The exported graph isn't the model: {(missed > 0).float().mean():.1%} of its labels for {shapes} "
                "are others."
            )
        compared.append(shapes)
    return {"inputs": compared, "largest_difference": largest, "tolerance": TOLERANCE}


def verification_inputs(reference: Reference) -> Iterator[dict[str, torch.Tensor]]:
    """Noise: the smallest size, wide and high ones, and those that each position embedding was made for."""
    config = reference.model.config
    multiple, smallest = size_rule(config)
    # Where CLIP's position embeddings need not be resized.
    native = round(cast(int, config.clip_vision_config.image_size) / config.clip_image_scale / multiple) * multiple
    sizes = [
        (1, smallest, smallest, 1),
        (2, smallest, 2 * smallest + multiple, 7),
        (3, smallest + multiple, smallest, 2),
        (1, max(native, smallest), max(native, smallest), 3),
        (1, config.image_size, config.image_size + multiple, 5),
        (1, config.image_size, config.image_size, 4),
    ]
    generator = torch.Generator().manual_seed(0)
    for batch, height, width, classes in sizes:
        inputs = {"pixel_values": torch.randn(batch, config.num_channels, height, width, generator=generator)}
        if isinstance(reference.form, OpenForm):
            class_embeds = torch.randn(classes, config.clip_embed_dim, generator=generator)
            inputs["class_embeds"] = F.normalize(class_embeds, dim=-1)
        yield inputs


def relative_difference(name: str, got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, of the largest value expected; not a number for another shape."""
    if got.shape != expected.shape:
        return float("nan")
    if name == "logits":  # logarithms of scores, of which the smallest decide nothing
        got, expected = got.exp(), expected.exp()
    return ((got - expected).abs().max() / expected.abs().max()).item()


def agreement(run: Run, reference: Reference, inputs: Sequence[Tensors]) -> dict[str, Any]:
    """
    Labels of a graph against torch's, for images that are padded to the model's input.

    Args:
        run: runs the graph.
        reference: torch.
        inputs: of the graph, each of one image, with `image_sizes` beside them.

    Returns:
        For the description: the number of images, the share of pixels of the same label, and that of the worst image.
    """
    shares = []
    for image in inputs:
        outputs = reference.outputs(image)
        height, width = image["image_sizes"][0].tolist()
        got = reference.labels(run_graph(run, reference.form, graph_inputs(image)), outputs)
        expected = reference.labels(_with_labels(reference, outputs), outputs)
        # On the masks' grid, what is beside the image is left out, too.
        height, width = (
            -(-side * cells // padded)
            for side, cells, padded in zip((height, width), got.shape[-2:], image["pixel_values"].shape[-2:])
        )
        same = got[:, :height, :width] == expected[:, :height, :width]
        shares.append(same.double().mean().item())
    return {"images": len(shares), "mean": sum(shares) / len(shares), "worst": min(shares)}


def to_arrays(tensors: Tensors) -> dict[str, np.ndarray]:
    """The same for NumPy."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def graph_inputs(image: Tensors) -> dict[str, torch.Tensor]:
    """Without what the graph doesn't take."""
    return {name: value for name, value in image.items() if name in ("pixel_values", "class_embeds")}


def _with_labels(reference: Reference, outputs: SANForSemanticSegmentationOutput) -> dict[str, torch.Tensor]:
    results = reference.results(outputs)
    if "labels" in reference.form.outputs:
        results["labels"] = reference.scores(outputs).argmax(1)
    return results
