"""Trains a SAN: what `accelerate launch` takes. The same as `san-hf train`.

accelerate launch scripts/train.py --config coco_stuff_vit_b16
"""

from san_hf.cli.train import app


if __name__ == "__main__":
    app()
