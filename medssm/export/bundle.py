"""medssm export bundle: a trained network as a MONAI bundle, which MONAI's own runner takes from files to label maps or to probabilities.

    medssm export bundle RUN OUT
    cd OUT && python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json --dataset_dir SCANS

The bundle repeats `medssm predict` in MONAI's transforms (`bundle_segmenter`, `bundle_classifier`). It takes every header's unit of length for the
millimetre, and does not tell padding such as -3024 from tissue. The weights are a PyTorch state dict. Networks of MONAI and of timm run without
medssm; medssm's are built by `medssm.create_model`.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Any

import monai
import numpy as np
import torch
from monai.utils import IgniteInfo

import medssm
from medssm.classify.images import Fitted as Classifies
from medssm.errors import UserError
from medssm.export import bundle_classifier, bundle_segmenter, card, card_classifier
from medssm.export.metadata import metadata, read_run
from medssm.files import disk_error, make_folder, write_bytes, write_json
from medssm.options import Option
from medssm.segment import networks

SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
_WEIGHTS, _USE = "models/model.pt", "`docs/README.md` of the bundle says how to run it."


def export_bundle(
    run: Path | str,
    out: Path | str,
    *,
    name: str | None = None,
    version: Annotated[str, Option(flag="--bundle-version")] = "0.1.0",
    authors: str = "not stated",
    license: Path | str | None = None,
) -> dict[str, Any]:
    """Write a trained network as a MONAI bundle, whole or not at all.

    Args: Bundle
        run: folder written by medssm train, of a network that segments or of a classifier; of folds, one of them
        out: new folder for the bundle
        name: of the bundle (default: the folder's)
        version: of the bundle
        authors: for the metadata
        license: text file, the weights' licence; without it the bundle says that none was stated

    Returns:
        {"out", "name", "model", "parameters", "requires"}

    Raises:
        UserError: for what cannot be read, or written, or be a bundle.
    """
    run, given, out = Path(run), out, Path(os.path.abspath(out))  # `.` too has a name then
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out: expected a new folder, {given} exists")
    fitted, config = read_run(run)
    if config.get("compression"):
        raise UserError(f"run: {run}: compressed, and a bundle builds its network by name alone: export the run that it was made of")
    if isinstance(fitted, Classifies):
        found, write_card = bundle_classifier.contents(run, config, fitted), card_classifier.card
    else:
        found, write_card = bundle_segmenter.contents(run, config, fitted), card.card
    requires = {**_builder(config["model"]), **found.packages, "pytorch-ignite": str(IgniteInfo.OPT_IMPORT_VERSION.value)}
    name = name or out.name
    licence = card.licence(license)

    weights = io.BytesIO()
    torch.save({key: value.detach().cpu().contiguous() for key, value in found.network.state_dict().items()}, weights)
    temporary = out.with_name(f".partial-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for folder in ("configs", "models", "docs"):
            make_folder(temporary / folder)
        write_json(temporary / "configs/metadata.json", _metadata(found.metadata, name, version, authors, requires))
        write_json(temporary / "configs/inference.json", found.inference)
        for path, text in found.scripts.items():
            write_bytes(temporary / path, text)
        write_bytes(temporary / _WEIGHTS, weights.getvalue())
        write_bytes(temporary / "docs/README.md", found.readme(name, requires).encode())
        needs = ", ".join(f"{needed} {number}" for needed, number in requires.items())
        about = write_card(temporary / _WEIGHTS, run, metadata(run), license=license, use=_USE, needs=f"MONAI with {needs}")
        write_bytes(temporary / "docs/model_card.md", about.encode())
        write_bytes(temporary / "LICENSE", Path(license).read_bytes() if license else f"{licence}\n".encode())
        os.replace(temporary, out)
    except OSError as error:
        raise disk_error(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    parameters = sum(p.numel() for p in found.network.parameters())
    return {"out": str(given), "name": name, "model": config["model"], "parameters": parameters, "requires": requires}


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print what was written."""
    print(f"{result['name']}: {result['model']}, {result['parameters']:,} parameters")
    print(f"written: {result['out']} (docs/README.md says how to run it)")


def _metadata(own: Mapping[str, Any], name: str, version: str, authors: str, requires: Mapping[str, str]) -> dict[str, Any]:
    """configs/metadata.json, by MONAI's schema; own: what it says of this network alone."""
    return {
        "schema": SCHEMA,
        "version": version,
        "changelog": {version: "exported by medssm"},
        "monai_version": _number(monai.__version__),
        "pytorch_version": _number(torch.__version__),
        "numpy_version": _number(np.__version__),
        "required_packages_version": requires,
        "name": name,
        "authors": authors,
        "copyright": f"Copyright (c) {authors}" if authors != "not stated" else "not stated",
        "intended_use": "Research; not a medical device",
        **own,
    }


def _builder(model: str) -> dict[str, str]:
    """The package that builds the network, with its version; nothing for MONAI, which every bundle needs."""
    if model.startswith(networks.MONAI):
        return {}
    return {"timm": installed("timm")} if model.startswith(networks.TIMM) else {"medssm": medssm.__version__}


def _number(version: str) -> str:
    return version.partition("+")[0]
