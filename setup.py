"""Packaging: `modeling/` and `model_cards/` are installed inside `san_hf`.

The links in `san_hf/` do the same for a checkout; the mapping alone is enough where git makes no links (Windows).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "san_hf" / "version.py").read_text(), re.MULTILINE).group(1)

setup(
    name="san_hf",
    version=VERSION,
    description="SAN, the Side Adapter Network for open-vocabulary semantic segmentation, as a Transformers model",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["semantic segmentation", "open vocabulary", "CLIP", "transformers"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    package_dir={"san_hf.modeling": "modeling", "san_hf.model_cards": "model_cards"},
    packages=sorted({*find_packages(include=["san_hf", "san_hf.*"]), "san_hf.modeling", "san_hf.model_cards"}),
    package_data={
        "san_hf": [
            "py.typed",
            "*.pyi",
            "*/*.pyi",
            "*.md",
            "*/*.md",
            "*/*.png",
            "app/*.js",
            "checkpoints/**/*",
            "conversion/*.gz",
            "training/recipes/*.yaml",
            "conversion/*.json",
            "vocabularies/*.json",
        ],
        "san_hf.modeling": ["*.md", "*.png"],
        "san_hf.model_cards": ["*"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "accelerate>=1.7",
        "datasets>=4.0",
        "evaluate>=0.4.3",
        "ftfy>=6.3",
        "huggingface_hub>=1.31",
        "jinja2>=3.1",
        "lazy_loader>=0.4",
        "numpy>=2.0",
        "pillow>=11.0",
        "pycocotools>=2.0.8",
        "pydantic>=2.6",
        "pyyaml>=6.0",
        "rich>=13.7",
        "safetensors>=0.8",
        "scipy>=1.13",
        "typer>=0.16",
        "xxhash>=3.1",
    ],
    extras_require={
        "app": ["gradio>=6.31", "rasterio>=1.4", "shapely>=2.0"],
        "polygons": ["rasterio>=1.4", "shapely>=2.0"],
        "supervision": ["supervision>=0.25"],
        "video": ["av>=17.0"],
        "tracking": ["tensorboard>=2.18", "wandb>=0.22"],
        "onnx": ["onnx>=1.21", "onnxruntime>=1.23", "onnxscript>=0.7"],
        # Exporting to OpenVINO takes transformers 5.20 or later.
        "openvino": ["nncf>=3.0", "openvino>=2026.1"],
        "test": [
            "gradio>=6.31",
            "av>=17.0",
            "nncf>=3.0",
            "onnx>=1.21",
            "onnxruntime>=1.23",
            "onnxscript>=0.7",
            "openvino>=2026.1",
            "parameterized>=0.9",
            "peft>=0.17",
            "pytest>=8",
            "pytest-timeout>=2.3.1",
            "pytest-xdist>=3.6.1",
            "rasterio>=1.4",
            "setuptools>=77.0.3",
            "shapely>=2.0",
            "supervision>=0.25",
            "tensorboard>=2.18",
            "wandb>=0.22",
        ],
        # Optional for the slow tests of training: DS_BUILD_OPS=0 pip install san_hf[test,deepspeed]
        "deepspeed": ["deepspeed>=0.18"],
        "lint": ["mypy>=1.15", "ruff>=0.9", "types-PyYAML>=6.0"],
        "coverage": ["coverage>=7.10"],
    },
    entry_points={"console_scripts": ["san-hf = san_hf.cli:app"]},
)
