"""Time of SAN at full size, with random weights: text encoding, forward pass, post-processing; and peak memory.

    python scripts/benchmarks/inference.py --release san-vit-b-16 --device cuda --dtype bfloat16

The time does not depend on the weights, so no checkpoint is needed. Each run prints one line of JSON.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import torch

from san_hf.conversion import RELEASES, clip_tokenizer
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from san_hf.vocabularies import load_vocabulary


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", choices=sorted(RELEASES), default="san-vit-b-16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--attn-implementation", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--height", type=int, default=640, help="of the network's input, in pixels")
    parser.add_argument("--width", type=int, default=864)
    parser.add_argument("--vocabulary", default="coco-stuff", help="class names to encode")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="the median of these is reported")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    config = RELEASES[arguments.release].config()
    model = SANForSemanticSegmentation(config).eval().to(device, getattr(torch, arguments.dtype))
    model.set_attn_implementation(arguments.attn_implementation)
    processor = SANProcessor(image_processor=SANImageProcessor(), tokenizer=clip_tokenizer())

    def median_ms(function: Callable[[], object]) -> float:
        times = []
        for i in range(arguments.warmup + arguments.repeats):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if i >= arguments.warmup:
                times.append(1e3 * (time.perf_counter() - start))
        return round(statistics.median(times), 2)

    names = load_vocabulary(arguments.vocabulary)
    text = processor(text=names).to(device)
    pixel_values = torch.randn(arguments.batch_size, 3, arguments.height, arguments.width, device=device)
    forward = torch.compile(model) if arguments.compile else model
    with torch.inference_mode():
        class_embeds = model.get_class_embeds(**text)
        outputs = forward(pixel_values, class_embeds=class_embeds)
        sizes = [(arguments.height, arguments.width)] * arguments.batch_size
        outputs.image_sizes = torch.tensor(sizes)
        result = vars(arguments) | {
            "device_name": name_of(device),
            "torch": torch.__version__,
            "classes": len(names),
            "text_ms": median_ms(lambda: model.get_class_embeds(**text)),
            "forward_ms": median_ms(lambda: forward(pixel_values, class_embeds=class_embeds)),
            "post_process_ms": median_ms(
                lambda: processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            ),
        }
    if device.type == "cuda":
        result["peak_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    else:
        result["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    print(json.dumps(result))


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
