"""The command line, `san-hf`."""

from san_hf.cli.main import app


__all__ = ["app"]
