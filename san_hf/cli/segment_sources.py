"""What `san-hf segment` segments: files, folders, patterns, standard input, and addresses where they are allowed."""

import glob
import os
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import typer

from san_hf.cli.console import fail, show
from san_hf.fetch import FetchError, is_address, read_bounded
from san_hf.messages import join_some, printable, without_passwords
from san_hf.paths import expand_path, list_images


if TYPE_CHECKING:
    from PIL import Image

STANDARD_INPUT = "-"


def find_images(patterns: list[str], output: Path, allow_urls: bool) -> list[tuple[str, Path]]:
    """
    The files that are meant, each once, and for each a relative path to name its outputs after.

    A file is taken as it is; of a folder, everything below it with an image's ending, except for hidden files and the
    output folder: see [`san_hf.paths.list_images`]. "-" is standard input; addresses are taken where they are allowed.
    Anything else is a pattern. What doesn't exist stays, to be reported with the others.
    """
    found: dict[str, tuple[str, Path]] = {}
    for pattern in patterns:
        if pattern == STANDARD_INPUT:
            if sys.stdin.isatty():
                fail('"-" is one image from standard input, which is a terminal: pipe one in, or name a file.')
            found[pattern] = pattern, Path("stdin")
            continue
        if is_address(pattern):
            if not allow_urls:
                fail(f"'{printable(without_passwords(pattern))}' is an address: images are fetched with --allow-urls.")
            address = urlsplit(pattern)
            found[pattern] = pattern, Path(PurePosixPath(unquote(address.path)).name or address.netloc)
            continue
        pattern = expand_path(pattern)
        if os.path.isdir(pattern):
            listing = list_images(pattern, exclude=output)
            left_out = listing.describe_left_out()
            if not listing.files:
                fail(f"There is no image in the folder '{printable(pattern)}'. {left_out}".strip())
            matches = [(str(path), path.relative_to(listing.folder)) for path in listing.files]
        elif not os.path.exists(pattern) and glob.has_magic(pattern):
            all_matches = sorted(glob.glob(pattern, recursive=True))
            matches = [(file, Path(Path(file).name)) for file in all_matches if os.path.isfile(file)]
            others = [printable(file) for file in all_matches if not os.path.isfile(file)]
            left_out = f"Left out of '{printable(pattern)}': no files: {join_some(others, 4)}." if others else ""
            if not matches:
                fail(f"Nothing matches the pattern '{printable(pattern)}'. {left_out}".strip())
        else:
            left_out, matches = "", [(pattern, Path(Path(pattern).name))]
        if left_out:
            show(left_out, error=True)
        for match in matches:
            found.setdefault(os.path.realpath(match[0]), match)
    return list(found.values())


def report_missing(sources: list[tuple[str, Path]], classes: list[str] | None, quiet: bool) -> list[tuple[str, Path]]:
    """The images that exist; the others are said at once, before a model is loaded, if this is not `quiet`."""
    missing = [source for source, _ in sources if not (_is_elsewhere(source) or os.path.lexists(source))]
    for source in () if quiet else missing:
        show(f"Error: {printable(source)}: there is no such file.", error=True)
    words = [source for source in missing if not Path(source).suffix and os.sep not in source]
    if words and classes and not quiet:
        names = ", ".join(name.rstrip(", ") for name in [*classes, *words])
        show(f'Several class names are separated by commas, in quotes: --classes "{printable(names)}"', error=True)
    if len(missing) == len(sources) or (words and classes):
        raise typer.Exit(2)
    return [source for source in sources if source[0] not in missing]


def open_source(source: str) -> "str | Image.Image":
    """
    What a segmenter takes of a source: the image from standard input, anything else as it is.

    Raises:
        ImageError: standard input has no image.
    """
    if source != STANDARD_INPUT:
        return source
    from san_hf.images import ImageError, load_image

    try:
        content = read_bounded(sys.stdin.buffer.read)
    except FetchError as error:
        raise ImageError(str(error)) from error
    return load_image(content)


def _is_elsewhere(source: str) -> bool:
    """Whether a source is no file."""
    return source == STANDARD_INPUT or is_address(source)
