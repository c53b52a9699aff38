"""medssm export: a trained network in the form that other software runs; a kind a module, each with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib

KINDS = {"bundle": ("medssm.export.bundle", "a MONAI bundle, run by python -m monai.bundle")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="kind", required=True)
    for name, (module, text) in KINDS.items():
        kind = kinds.add_parser(name, help=text, description=text)
        importlib.import_module(module).add_arguments(kind)
        for flag, meaning in (("--json", "print the result as JSON"), ("--quiet", "no summary")):
            kind.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=meaning)


def run(args) -> dict:
    return importlib.import_module(KINDS[args.kind][0]).run(args)
