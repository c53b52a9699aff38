"""Which task a command is about: segmentation, or the classification of whole images. No heavy imports: the command asks before it loads either.

Each function gets the text of the argument that says it.
"""

from __future__ import annotations

import json
from pathlib import Path

FITTED = "fitted.json"  # in the folder of a training: what was fitted to the data
CLASSIFY = "classify"  # its entry `task` there, and what --task says


def named(task: str) -> bool:
    """Whether --task asks for a classification."""
    return task == CLASSIFY


def is_run(folder: Path | str) -> bool:
    """Whether a folder is that of a classifier's training, or a folder of such folders (fold_0, fold_1, ...)."""
    for file in [Path(folder) / FITTED, *sorted(Path(folder).glob(f"*/{FITTED}"))]:
        if file.is_file():
            return is_fitted(file)
    return False


def is_fitted(file: Path) -> bool:
    """Whether a file is a classifier's fitted.json."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(table, dict) and table.get("task") == CLASSIFY


def is_table(file: Path | str) -> bool:
    """Whether what is to be evaluated is a CSV, as a classifier's predictions are."""
    return Path(file).suffix.lower() == ".csv"
