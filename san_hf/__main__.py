"""`python -m san_hf`."""

from san_hf.cli import app


app()
