"""What the commands `medssm export onnx`, `openvino` and `aoti` have in common: what they read, what they refuse, what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from medssm.classify import calibration
from medssm.classify.images import Fitted as Classifies
from medssm.errors import UserError
from medssm.export import card, card_classifier
from medssm.export.check import Shapes, Tempered, shapes
from medssm.export.metadata import KEY, metadata, read_run, text
from medssm.files import begins_with, protect, read_json
from medssm.segment import networks
from medssm.segment.inference import OVERLAP
from medssm.tasks import CLASSIFY


class Job(NamedTuple):
    """What is to be exported. images: of a network that segments in any size, of a classifier in the shape that every image is brought to."""

    run: Path
    file: Path
    network: nn.Module
    images: Shapes
    options: dict[str, Any]  # of `metadata`

    @classmethod
    def of(cls, run: Path | str, file: Path, overlap: float | None, mirror: bool) -> Job:
        """Raises UserError for a folder that is no finished training, and for a wrong option."""
        if overlap is not None and not 0 <= overlap < 1:
            raise UserError(f"overlap: expected 0 to less than 1, got {overlap}")
        run = Path(run)
        fitted, _ = read_run(run)
        network = networks.load(run)
        if isinstance(fitted, Classifies):
            if overlap is not None or mirror:
                raise UserError(f"{'mirror' if mirror else 'overlap'}: {run} classifies: its network sees each image once, as a whole")
            network = Tempered(network, calibration.load(run, "last") or 1.0)
            return cls(run, file, network, shapes(network, (1, len(fitted.channels), *fitted.shape), "fixed"), {})
        options = {"overlap": OVERLAP if overlap is None else overlap, "mirror": mirror}
        return cls(run, file, network, shapes(network, (1, len(fitted.channels), *fitted.patch)), options)

    def metadata(self, custom_ops: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the file says of itself."""
        return metadata(self.run, **self.options, custom_ops=custom_ops)

    def finish(
        self, table: Mapping[str, Any], license: Path | str | None, operators: list[str], error: float, use: str = "", needs: str = ""
    ) -> dict[str, Any]:
        """The model card beside the file that is written, and the command's result; use and needs as `card.write` has them."""
        write = card_classifier.write if table["task"] == CLASSIFY else card.write
        written = write(self.file, self.run, table, license=license, use=use, needs=needs)
        parameters = networks.count_parameters(read_json(self.run / networks.CONFIG))
        return {
            "file": str(self.file),
            "card": str(written),
            "model": table["model"],
            "parameters": parameters,
            "bytes": sum(part.stat().st_size for part in card.parts(self.file)),
            "operators": operators,
            "error": error,
        }


def write_portable(
    run: Path | str,
    file: Path,
    write: Callable[[nn.Module, Path, Shapes, Mapping[str, str]], float],
    *,
    overlap: float | None,
    mirror: bool,
    license: Path | str | None,
    compression: Sequence[str] = (),
    use: str = "",
    needs: str = "",
) -> dict[str, Any]:
    """Write a file that needs no operators of medssm, and its model card; the command's result.

    write: (network, file, images, texts by name that the file carries) -> its difference from PyTorch
    compression: kinds of steps that `write` does itself
    use, needs: as `card.write` has them
    """
    job = Job.of(run, file, overlap, mirror)
    table = job.metadata()
    table["compression"] += compression
    return job.finish(table, license, [], write(job.network, file, job.images, {KEY: text(table)}), use, needs)


def check_target(file: Path, ending: str, made: Callable[[Path], bool], overwrite: bool) -> None:
    """UserError where a file cannot be written under this name, or where that would lose one that is there."""
    if file.suffix.lower() != ending:
        raise UserError(f"file: {file}: expected a name that ends in {ending}")
    if file.is_dir():
        raise UserError(f"file: {file}: expected a file, got a folder")
    protect(file, made=made, overwrite=overwrite, argument="file")


def check_card(file: Path, license: Path | str | None, overwrite: bool) -> None:
    """UserError where the model card cannot be written later: a licence that cannot be read, or a file of other origin in its place."""
    card.licence(license)
    place = card.path_of(file)
    protect(
        place, reads=[Path(license)] if license else [], made=lambda path: begins_with(path, card.heading(file)), overwrite=overwrite, argument="file"
    )


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print what was written."""
    needs = f"; needs medssm's operators {', '.join(result['operators'])}" if result["operators"] else ""
    print(f"{result['model']}, {result['parameters']:,} parameters{needs}")
    where = "on average on images that it was trained on" if options.get("int8") else "for random images of two shapes"
    print(f"differs from PyTorch by {result['error']:.1e} of the output's spread {where}")
    print(f"written: {result['file']} ({result['bytes'] / 1e6:.2f} MB) and {result['card']}")
