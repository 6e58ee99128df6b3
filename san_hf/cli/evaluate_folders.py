"""The folders that `san-hf evaluate` writes to: their names, what may be replaced in them, and their locks."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from san_hf.files import remove_files


if TYPE_CHECKING:
    from accelerate import Accelerator

PICTURES_FILE, COMPARED_FOLDER, PROGRESS_FOLDER = "pictures.png", "compared", "progress"


def open_folders(
    folders: Sequence[Path], resume: bool, overwrite: bool, accelerator: "Accelerator | None", locks: ExitStack
) -> None:
    """Makes the results' folders, locked while `locks` is open; all are checked before the first is written to."""
    from san_hf.evaluation.resume import evaluation_lock

    for folder in folders:
        check_folder(folder, resume, overwrite)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if accelerator is None or accelerator.is_main_process:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(evaluation_lock(folder))


def remove_drawings(folders: Sequence[Path]) -> None:
    """What this run may not replace; evaluate and write_results replace the rest."""
    from san_hf.evaluation.evaluator import PROGRESS_FILES

    for folder in folders:
        (folder / PICTURES_FILE).unlink(missing_ok=True)
        remove_files(folder / COMPARED_FOLDER / PROGRESS_FOLDER, PROGRESS_FILES)
        remove_files(folder / COMPARED_FOLDER, written_files())


def written_files() -> tuple[str, ...]:
    """The files of an evaluation's results."""
    from san_hf.evaluation.evaluator import PREDICTIONS_FILE
    from san_hf.evaluation.report import CLASSES_FILE, RESULTS_FILE, TABLE_FILE

    return RESULTS_FILE, CLASSES_FILE, TABLE_FILE, PREDICTIONS_FILE, PICTURES_FILE


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """
    Before anything is computed: nothing is lost by writing.

    Raises:
        ValueError: there are results, or a part of them.
    """
    if resume or overwrite:
        return
    for name, what in (*((name, "results") for name in written_files()), (PROGRESS_FOLDER, "an interrupted run")):
        if (folder / name).exists():
            raise ValueError(
                f"'{folder}' holds {what} ({name}). Go on with them by --resume, replace them by --overwrite, or "
                "choose another --output."
            )
