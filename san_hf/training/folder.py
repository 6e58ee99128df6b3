"""The output folder of a run: one run at a time, and a start that fails leaves it as it was."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from san_hf.files import remove_leftovers
from san_hf.locks import InUseError, locked
from san_hf.messages import join_some, one_line
from san_hf.paths import expand_path

from .checkpoint import list_checkpoints, read_checkpoint
from .config import ConfigError, TrainingConfig, changes
from .config_file import save_config
from .errors import TrainingError
from .run_log import LOG_FILE, truncate_log


CONFIG_FILE, LOCK_FILE = "config.yaml", ".lock"


class RunFolder:
    """
    The folder of a run, for `with`: locked from [`open`] to the end of the block. Only the main process opens it.

    Until [`begin`] nothing is written. When the block ends by an error before the first step of a new run, what was
    written is removed again: neither the corrected command nor another one is refused.
    """

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.path = Path(expand_path(config.output))
        self._stack = ExitStack()
        self._made: list[Path] = []
        self._is_new = self._begun = False

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and self._is_new and self._begun:
            self._remove_start()
        self._stack.close()
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # it holds something
                break

    def open(self, resume: bool) -> dict[str, Any] | None:
        """
        Takes the folder for a new run, or to go on with the one in it.

        Returns:
            What the last checkpoint knows of the run; None if it starts from the first step.

        Raises:
            InUseError: another process trains there.
            TrainingError: it isn't empty, holds no run to go on with, or can't be used.
            ConfigError: the run in it has another configuration.
            CheckpointError: its last checkpoint is damaged.
        """
        output, progress = self.path, None
        try:
            self._made = [folder for folder in (*reversed(output.parents), output) if not folder.exists()]
            output.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(locked(output / LOCK_FILE, f"A training in '{output}'"))
            for folder in (output, output / "checkpoints", output / "pictures"):
                remove_leftovers(folder)
            present = sorted(path.name for path in output.iterdir() if path.name != LOCK_FILE)
        except InUseError:
            raise
        except OSError as error:
            raise TrainingError(f"The output folder '{output}' can't be used: {one_line(error)}.") from error
        if present and not resume:
            raise TrainingError(
                f"The output folder '{output}' is not empty: it has {', '.join(present[:5])}"
                f"{' ...' if len(present) > 5 else ''}. Continue its run with --resume, or choose another output."
            )
        if present and CONFIG_FILE not in present:
            raise TrainingError(
                f"'{output}' holds no run to resume: there is no {CONFIG_FILE}, but {join_some(present, 5)}."
            )
        if checkpoints := list_checkpoints(output):
            progress = read_checkpoint(checkpoints[-1])
            if different := changes(progress["config"], self.config.model_dump()):
                listed = "".join(f"\n  {key}: was {old!r}, is {new!r}" for key, (old, new) in different.items())
                raise ConfigError(
                    f"The run in '{output}' was started with another configuration:{listed}\nResume it with "
                    f"--config {output / CONFIG_FILE}, or start a new run in another output."
                )
        self._is_new = not present
        return progress

    def begin(self, progress: dict[str, Any] | None) -> int:
        """
        Writes config.yaml, and makes log.jsonl end where the run goes on. Data and model are there by now.

        Returns:
            How many of the steps taken so far the log lacks, if somebody has changed it.

        Raises:
            TrainingError: they can't be written, or the log is damaged.
        """
        self._begun = True
        try:
            # The configuration first: without it, a run that is killed here would be none to resume.
            save_config(self.config, self.path / CONFIG_FILE)
            step, evaluated = (progress["step"], progress["evaluated"]) if progress else (0, 0)
            kept = truncate_log(self.path, step, evaluated)
        except OSError as error:
            raise TrainingError(f"The output folder '{self.path}' can't be used: {one_line(error)}.") from error
        return step - len({record["step"] for record in kept if "validation" not in record})

    def _remove_start(self) -> None:
        """What a run writes before its first step, into a folder that was empty; nothing if that step was taken."""
        log = self.path / LOG_FILE
        if log.exists() and log.stat().st_size:
            return
        for name in (CONFIG_FILE, LOG_FILE):
            (self.path / name).unlink(missing_ok=True)
        for name in ("wandb", self.config.logging.project):
            if (self.path / name).resolve().parent == self.path.resolve():
                shutil.rmtree(self.path / name, ignore_errors=True)
