"""Paths as people write them, names from data as names of files, and the images below a folder."""

import os
import re
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from san_hf.messages import join_some, printable


_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")
# Separators, control characters, halves of surrogate pairs, and what Windows refuses.
_NO_NAME = re.compile('[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\ud800-\udfff<>:"|?*\\\\/]')
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])( *\..*)?", re.IGNORECASE)
# Formats that Pillow recognises, but decodes with the help of other libraries only.
_STUBS = {"BUFR", "GRIB", "HDF5", "MPEG"}
# Endings of images that Pillow can't read, or only when it was built or extended to.
_OTHER_IMAGES = set(
    ".heic .heif .hif .avif .avifs .jxl .jp2 .j2k .webp .svg .svgz .exr .hdr .psb .xcf .ai .pdf .raw .dng .cr2 .cr3 "
    ".crw .nef .nrw .arw .srf .sr2 .raf .orf .rw2 .pef .srw .x3f .3fr .djvu .dcm .nii .bpg .jxr .wdp".split()
)
# What systems put into folders.
_CLUTTER = {"thumbs.db", "desktop.ini"}


def expand_path(path: str | os.PathLike) -> str:
    """
    A path with a leading `~` or `~user` replaced by the home folder, and `$NAME` or `${NAME}` by the environment's
    value. A file whose name has such a letter is taken as it is.

    Raises:
        ValueError: a variable isn't set.
    """
    text = os.path.expanduser(os.fspath(path))
    if "$" not in text or os.path.lexists(text):
        return text
    for match in _VARIABLE.finditer(text):
        name = match[1] or match[2]
        if name not in os.environ and not name.isdigit():
            raise ValueError(
                f"The path '{printable(path)}' has the environment variable {name or '${}'}, which isn't set."
            )
    return os.path.expandvars(text)


def folder_name(name: str) -> str:
    """
    A name from data, such as a data set's, as the name of one file or folder on any system: no separators, no control
    characters or others that Windows refuses, none of Windows's devices, not hidden, at most 200 bytes long, not empty.
    Ordinary names stay as they are, but for "/", which becomes "--".
    """
    tidy = _NO_NAME.sub("_", name.strip().strip("/").replace("/", "--"))
    tidy = tidy.encode("utf-8")[:200].decode("utf-8", "ignore").rstrip(" .")
    if not tidy or tidy.startswith(".") or _DEVICE.fullmatch(tidy):
        tidy = f"_{tidy}"
    return tidy


def paths_for(names: Iterable[Sequence[str]], folder: Path) -> list[Path]:
    """
    A path of its own below a folder for each name from data, whatever it is: see [`folder_name`].

    Args:
        names: folders' names and at last the own one of each. Of names that a file system may take for equal (capitals,
            accents as letters of their own), the later ones get a number.
        folder: above all of them.
    """
    taken, paths = set(), []
    for name in names:
        *above, own = map(folder_name, name)
        path, number = Path(*above, own), 1
        while (key := unicodedata.normalize("NFC", str(path)).casefold()) in taken:
            number += 1
            path = Path(*above, f"{own}-{number}")
        taken.add(key)
        paths.append(folder / path)
    return paths


@dataclass
class ImageListing:
    """
    The images below a folder.

    Attributes:
        files: the images, in the order of their paths.
        left_out: all other files, but for hidden ones, by the reason.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def describe_left_out(self) -> str:
        """What was left out, counted and named, in one line; empty if nothing was."""
        parts = []
        for reason, paths in sorted(self.left_out.items()):
            names = join_some((printable(path.relative_to(self.folder)) for path in paths), 4)
            parts.append(f"{reason}: {len(paths)} ({names})")
        return f"Left out of '{printable(self.folder)}': {'; '.join(parts)}." if parts else ""


def list_images(folder: str | os.PathLike, exclude: str | os.PathLike | None = None) -> ImageListing:
    """
    The image files of a folder and of all folders below it, those that are links included: each folder once, however
    many links lead to it, and none that lies above. Hidden files and folders, whose names begin with a dot, are passed
    over.

    Args:
        folder: where to look.
        exclude: a folder below that is passed over.

    Raises:
        OSError: a folder can't be read.
    """
    listing = ImageListing(Path(folder))
    excluded = os.path.realpath(exclude) if exclude is not None else None
    readable = readable_endings()
    for path in _walk(listing, excluded):
        ending = path.suffix.lower()
        if not os.path.exists(path):
            reason = "links to nothing"
        elif not stat.S_ISREG(path.stat().st_mode):
            reason = "pipes, sockets or devices"
        elif ending in readable:
            listing.files.append(path)
            continue
        elif ending in _OTHER_IMAGES:
            reason = "images that Pillow can't read, to be converted to JPEG or PNG"
        else:
            reason = "files without an image's ending"
        listing.left_out[reason].append(path)
    listing.files.sort()
    for paths in listing.left_out.values():
        paths.sort()
    return listing


def readable_endings() -> frozenset[str]:
    """Endings of the image files that Pillow can open, in small letters and with their dot."""
    from PIL import Image

    Image.init()
    # A JPEG file opens as MPO where it has several images.
    formats = {*Image.OPEN, "MPO"} - _STUBS
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def _walk(listing: ImageListing, excluded: str | None) -> Iterator[Path]:
    """All files that aren't hidden. Links to folders wait until all real folders were seen."""
    root = os.path.realpath(listing.folder)
    seen: set[str] = set()
    folders = [listing.folder]
    links: list[Path] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real == excluded:
            continue
        above = root != real and os.path.join(root, "").startswith(os.path.join(real, ""))
        if real in seen or above:
            listing.left_out["linked folders that were seen already"].append(folder)
            continue
        seen.add(real)
        inside = []
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = folder / entry.name
                if entry.name.startswith(".") or entry.name.lower() in _CLUTTER:
                    continue
                # entry.is_dir() would raise for a link to itself.
                if not os.path.isdir(path):
                    yield path
                elif entry.is_symlink():
                    links.append(path)
                else:
                    inside.append(path)
        folders += reversed(inside)
