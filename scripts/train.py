"""Trains a SAN: what `accelerate launch` takes. The same as `san-hf train`.

    accelerate launch scripts/train.py --config scripts/recipes/coco_stuff_vit_b16.yaml
"""

from san_hf.training.command import app


if __name__ == "__main__":
    app()
