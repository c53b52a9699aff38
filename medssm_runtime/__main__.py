"""python -m medssm_runtime MODEL SCAN [SCAN ...] LABELS, and with a classifier MODEL IMAGE [IMAGE ...] FOUND.csv"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from medssm_runtime import UserError, __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a case failed, 2 for a user's error, 130 for an interrupt."""
    about = "Segment NIfTI files, or classify images, by an exported network, without PyTorch."
    parser = argparse.ArgumentParser("python -m medssm_runtime", description=about)
    parser.add_argument("model", type=Path, help="FILE.onnx or FILE.xml, written by medssm export")
    parser.add_argument(
        "scans",
        type=Path,
        nargs="+",
        help="NIfTI files, or folders of them; a scan's channels are CASE_0000.nii.gz, CASE_0001.nii.gz, ...; a classifier takes PNG and JPEG too",
    )
    parser.add_argument("out", type=Path, help="file for one case, else a folder for CASE.nii.gz; of a classifier FILE.csv")
    parser.add_argument("--threads", type=int, help="of the engine (default: its own choice)")
    parser.add_argument("--overlap", type=float, help="of neighbouring windows, 0 to less than 1 (default: what the file says)")
    parser.add_argument(
        "--mirror", action=argparse.BooleanOptionalAction, help="average over the mirrorings of the training (default: what the file says)"
    )
    parser.add_argument("--ops", type=Path, help="library of medssm's operators (default: that of this package, or of an installed medssm)")
    parser.add_argument("--overwrite", action="store_true", help="write over files of other origin")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print errors alone")
    parser.add_argument("--version", action="version", version=__version__)
    given = vars(parser.parse_intermixed_args(argv))  # options between the files too
    as_json = given.pop("json")
    try:
        from medssm_runtime import predict

        result = predict(given.pop("model"), given.pop("scans"), given.pop("out"), **given)
    except UserError as error:
        print(f"medssm_runtime: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        print(f"medssm_runtime: needs the package {package}: pip install {package}", file=sys.stderr)
        return 2
    except OSError as error:  # of a file or folder that nothing else named
        print(f"medssm_runtime: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("medssm_runtime: interrupted", file=sys.stderr)
        return 130
    if as_json:
        print(json.dumps(result, indent=2))
    elif not given["quiet"]:
        seconds = result["seconds"]
        done = f"{len(result['images'])} image(s)" if "images" in result else f"{len(result['cases'])} case(s)"
        print(f"{done}: {', '.join(f'{what} {value:.2f} s' for what, value in seconds.items())}")
    for line in result["failed"].values():
        print(f"medssm_runtime: {line}", file=sys.stderr)
    return int(bool(result["failed"]))


if __name__ == "__main__":
    # nibabel imports an installed pydicom, which takes as long as nibabel itself, for files that are not read here.
    sys.modules.setdefault("pydicom", None)  # type: ignore[arg-type]  # what Python has there for "not to be found"
    sys.exit(main())
