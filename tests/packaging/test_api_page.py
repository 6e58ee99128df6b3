"""The page of public names is that of the code."""

import importlib
import importlib.util
import pkgutil

import san_hf
from tests.packaging.test_sources import ROOT


def script():
    spec = importlib.util.spec_from_file_location("make_api_page", ROOT / "scripts" / "make_api_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    """Catches a public name that is missing on the page, or whose description there is of an earlier one."""
    page = script()
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run: python scripts/make_api_page.py"


def test_every_package_with_public_names_is_on_it():
    """Catches a new package that the page doesn't know."""
    packages = {
        f"san_hf.{info.name}"
        for info in pkgutil.iter_modules(san_hf.__path__)
        if info.ispkg and getattr(importlib.import_module(f"san_hf.{info.name}"), "__all__", None)
    }
    assert packages - {"san_hf.cli"} <= set(script().PACKAGES)
