"""What the commands `medssm export onnx`, `openvino` and `aoti` have in common: what they read, what they refuse, what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from medssm.errors import UserError
from medssm.export import card
from medssm.export.check import Shape
from medssm.export.metadata import KEY, metadata, read_run, text
from medssm.files import protect
from medssm.segment import networks


class Job(NamedTuple):
    """What is to be exported. shape: (1, channels, *patch)."""

    run: Path
    file: Path
    network: nn.Module
    shape: Shape
    options: dict[str, Any]  # of `metadata`

    @classmethod
    def of(cls, run: Path | str, file: Path, overlap: float, mirror: bool) -> Job:
        """Raises UserError for a folder that is no finished training, and for a wrong option."""
        if not 0 <= overlap < 1:
            raise UserError(f"overlap: expected 0 to less than 1, got {overlap}")
        fitted, _ = read_run(run)
        return cls(Path(run), file, networks.load(Path(run)), (1, len(fitted.channels), *fitted.patch), {"overlap": overlap, "mirror": mirror})

    def metadata(self, custom_ops: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the file says of itself."""
        return metadata(self.run, **self.options, custom_ops=custom_ops)

    def finish(self, table: Mapping[str, Any], license: Path | str | None, operators: list[str], error: float) -> dict[str, Any]:
        """The model card beside the file that is written, and the command's result."""
        written = card.write(self.file, self.run, table, license=license)
        parameters = sum(p.numel() for p in self.network.parameters())
        return {
            "file": str(self.file),
            "card": str(written),
            "model": table["model"],
            "parameters": parameters,
            "operators": operators,
            "error": error,
        }


def write_portable(
    run: Path | str,
    file: Path,
    write: Callable[[nn.Module, Path, Shape, Mapping[str, str]], float],
    *,
    overlap: float,
    mirror: bool,
    license: Path | str | None,
    compression: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a file that needs no operators of medssm, and its model card; the command's result.

    write: (network, file, (1, channels, *patch), texts by name that the file carries) -> its difference from PyTorch
    compression: kinds of steps that `write` does itself
    """
    job = Job.of(run, file, overlap, mirror)
    table = job.metadata()
    table["compression"] += compression
    return job.finish(table, license, [], write(job.network, file, job.shape, {KEY: text(table)}))


def check_target(file: Path, ending: str, made: Callable[[Path], bool], overwrite: bool) -> None:
    """UserError where a file cannot be written under this name, or where that would lose one that is there."""
    if file.suffix.lower() != ending:
        raise UserError(f"file: {file}: expected a name that ends in {ending}")
    if file.is_dir():
        raise UserError(f"file: {file}: expected a file, got a folder")
    protect(file, made=made, overwrite=overwrite, argument="file")


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print what was written."""
    needs = f"; needs medssm's operators {', '.join(result['operators'])}" if result["operators"] else ""
    print(f"{result['model']}, {result['parameters']:,} parameters{needs}")
    where = "on average on patches of training cases" if options.get("int8") else "at two sizes"
    print(f"differs from PyTorch by {result['error']:.1e} of the output's spread {where}")
    print(f"written: {result['file']} and {result['card']}")
