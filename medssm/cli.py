"""The medssm command: a table of subcommands, each in a module of its own with `add_arguments(parser)` and `run(args)`.

Only the module that is asked for is imported. `run` returns a dictionary (printed with --json) or None. What a user can mend is a
UserError: one clear line on standard error and exit status 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from medssm.errors import UserError

COMMANDS = {
    "doctor": ("medssm.doctor", "what this machine has, and one small case of every op on every backend against the reference"),
    "models": ("medssm.models.listing", "the models there are, with parameters"),
    "demo": ("medssm.segment.demo", "train and test on a real brain MRI, with a report"),
    "train": ("medssm.segment.train", "train a network on your data"),
    "predict": ("medssm.segment.predict", "segment a NIfTI file or a folder of them"),
    "evaluate": ("medssm.segment.evaluate", "Dice, HD95 and surface Dice of predictions against references"),
    "export": ("medssm.export", "write a trained network for other software: a MONAI bundle"),
    "nnunet": ("medssm.integrations.nnunet.command", "nnU-Net's plans with a network of medssm's, and trainers for nnU-Net"),
    "bench": ("medssm.bench", "time the ops on this machine against what people use today"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, 2 for a user's error, 130 for an interrupt."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "--version"):
        return _overview(argv)
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        print(f"medssm: expected one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        return 2
    try:
        command = importlib.import_module(COMMANDS[name][0])
        parser = argparse.ArgumentParser(prog=f"medssm {name}", description=COMMANDS[name][1])
        command.add_arguments(parser)
        for flag, text in (("--json", "print the result as JSON"), ("--quiet", "no progress bar, no table")):
            if flag not in parser._option_string_actions:
                parser.add_argument(flag, action="store_true", help=text)
        args = parser.parse_args(rest)
        result = command.run(args)
    except UserError as error:
        print(f"medssm {name}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("medssm"):
            raise
        print(f"medssm {name}: needs the package {error.name}: pip install 'medssm[segment]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"medssm {name}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    if args.json and isinstance(result, dict):
        print(json.dumps(result, indent=2, default=str))
    return result if isinstance(result, int) else int(bool(isinstance(result, dict) and result.get("failed")))


def _overview(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        import medssm

        print(medssm.__version__)
        return 0
    print("usage: medssm <command> [options]\n\ncommands:")
    for name, (_, text) in COMMANDS.items():
        print(f"  {name:<10} {text}")
    print("\n`medssm <command> --help` lists a command's options.")
    return 0 if argv else 2


if __name__ == "__main__":
    sys.exit(main())
