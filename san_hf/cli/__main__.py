"""`python -m san_hf.cli`."""

from san_hf.cli.main import app


app()
