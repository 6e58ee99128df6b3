"""The app as a Space on the Hugging Face Hub: `san-hf app`, with the options in the Space's variable APP_OPTIONS."""

import os
import shlex

from san_hf.cli import app


if __name__ == "__main__":
    options = os.environ.get("APP_OPTIONS", "--model san-vit-b-16")
    app(["app", "--host", "0.0.0.0", "--port", "7860", *shlex.split(options)])
