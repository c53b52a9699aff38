"""The medssm command: a table of subcommands, each a function whose signature and docstring are its options (see `medssm.options`).

Only the module of the command that is asked for is imported. Its function returns a dictionary, printed with --json; else its `show` prints a
summary. An entry `failed` of that dictionary makes the exit status 1. What a user can mend is a UserError: one clear line on standard error
and exit status 2.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from medssm import tasks
from medssm.allocator import keep_freed_memory
from medssm.errors import UserError, install_command


class Command(NamedTuple):
    """Where a command's function and the one that prints its result are, and a line about it.

    `classify` is what serves it for the classification of images, which it is where `asks` (`medssm.tasks`) says so of its argument `argument`.
    """

    module: str
    function: str
    show: str
    about: str
    classify: Command | None = None
    argument: str = ""
    asks: Callable[[str], bool] = bool


Table: TypeAlias = "Mapping[str, Command | Mapping[str, Command]]"  # what has no name is meant where no further word is given
COMMANDS: Table = {
    "doctor": Command(
        "medssm.doctor", "doctor", "show", "what this machine has, and one small case of every op on every backend against the reference"
    ),
    "models": Command("medssm.models.listing", "models", "show", "the models there are, with parameters"),
    "demo": {
        "structures": Command("medssm.segment.demo", "structures", "show", "train and test on a real brain MRI, with a report"),
        "clinic": Command("medssm.segment.demo.clinic", "clinic", "show", "train, make smaller, export, run without PyTorch, with a report"),
    },
    "check": Command("medssm.segment.check", "check", "show", "look at a data set before training: a summary, and what is wrong with its files"),
    "plan": Command(
        "medssm.segment.plan", "plan", "show", "choose spacing, patch, batch and strides for a data set and this machine, as a file for train"
    ),
    "train": Command(
        "medssm.segment.train",
        "train",
        "show",
        "train a network on your data: to segment, or to classify (--task classify)",
        Command("medssm.classify.train", "train", "show", "train a classifier"),
        "task",
        tasks.named,
    ),
    "predict": Command(
        "medssm.segment.predict",
        "predict",
        "show",
        "segment or classify images, folders or lists of them",
        Command("medssm.classify.predict", "predict", "show", "classify images"),
        "run",
        tasks.is_run,
    ),
    "evaluate": Command(
        "medssm.segment.evaluate",
        "evaluate",
        "show",
        "Dice, HD95 and surface Dice of predictions against references; accuracy, AUROC and calibration of a classifier's CSV",
        Command("medssm.classify.evaluate", "evaluate", "show", "score a classifier's CSV"),
        "predictions",
        tasks.is_table,
    ),
    "compare": Command(
        "medssm.compare", "compare", "show", "two or more sets of predictions, or runs, on the same cases: differences with intervals"
    ),
    "compress": Command(
        "medssm.compress.command",
        "compress",
        "show",
        "make a trained network smaller: prune, low rank, distil, 8 bits; the result is a run like any other",
    ),
    "view": Command("medssm.segment.view", "view", "show", "a scan with label maps over it as one page for a browser, offline"),
    "export": {
        "onnx": Command(
            "medssm.export.onnx", "export_onnx", "show", "a trained network as an ONNX file for any batch and size, checked in onnxruntime"
        ),
        "openvino": Command(
            "medssm.export.openvino", "export_openvino", "show", "a trained network as OpenVINO's .xml and .bin for any batch and size"
        ),
        "aoti": Command(
            "medssm.export.aoti", "export_aoti", "show", "a trained network as a compiled package for torch without medssm (AOTInductor)"
        ),
        "bundle": Command("medssm.export.bundle", "export_bundle", "show", "a trained network as a MONAI bundle, run by python -m monai.bundle"),
    },
    "nnunet": {
        "plans": Command("medssm.integrations.nnunet.command", "plans", "show_plans", "nnU-Net's plans with a network of medssm's"),
        "path": Command("medssm.integrations.nnunet.command", "path", "show_path", "the folder of trainers for nnU-Net's nnUNet_extTrainer"),
    },
    "bench": {
        "": Command("medssm.bench", "bench", "show", "time the ops on this machine against what people use today"),
        "accuracy": Command("medssm.bench.accuracy", "accuracy", "show", "networks x folds x seeds on a data set, compared on held-out patients"),
    },
}

_ENGINES = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf")  # packages of the extra [export]
# Modules of commands that work on volumes.
_VOLUMES = ("medssm.segment.", "medssm.classify.", "medssm.compare", "medssm.compress.", "medssm.bench.accuracy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, 1 where a part failed, 2 for a user's error, 130 for an interrupt."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        import medssm

        print(medssm.__version__)
        return 0
    name = "medssm"
    entry: Command | Table = COMMANDS
    try:
        while not isinstance(entry, Command):
            if "" in entry and (not words or words[0].startswith("-")):
                entry = entry[""]
                continue
            if not words or words[0] in ("-h", "--help"):
                print(_overview(name, entry))
                return 0 if words else 2
            name, entry = f"{name} {words[0]}", _chosen(entry, words.pop(0))
        for_task = of_task(entry, words)
        name = name if for_task is entry else f"{name} (classify)"
        return _run(name, for_task, words)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # of a file or folder that nothing else named
        print(f"{name}: {error.filename or ''}{': ' if error.filename else ''}{error.strerror or error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "medssm"):
            raise
        extra = "" if package in ("jsonargparse", "yaml") else "nnunet" if "nnunet" in name else "export" if package in _ENGINES else "segment"
        print(f"{name}: needs the package {package}: {install_command(extra)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{name}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130


def _run(name: str, command: Command, words: Sequence[str]) -> int:
    from medssm import options

    module = importlib.import_module(command.module)
    function = getattr(module, command.function)
    given = options.read(function, name, words)
    if "print_config" in given.flags:
        print(options.as_yaml(given.values, given.sources), end="")
        return 0
    if command.module.startswith(_VOLUMES):
        keep_freed_memory()  # of volumes, for the next ones
    as_json = "json" in given.flags
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():  # standard output is the JSON alone
        result = given.call(function)
    if not _is_first_process():
        return int(bool(result.get("failed")))
    if as_json:
        print(json.dumps(result, indent=2, default=str))
    elif "quiet" not in given.flags:
        getattr(module, command.show)(result, given.values)
    failed = result.get("failed")
    for message in failed.values() if isinstance(failed, Mapping) else ():
        print(f"{name}: {message}", file=sys.stderr)
    return int(bool(failed))


def of_task(command: Command, words: Sequence[str]) -> Command:
    """The command itself, or what classifies in its place, where the words ask for that."""
    if command.classify is None:
        return command
    from medssm import options

    functions = [getattr(importlib.import_module(one.module), one.function) for one in (command, command.classify)]
    text = options.text_of(command.argument, functions, words)
    return command.classify if text is not None and command.asks(text) else command


def _is_first_process() -> bool:
    """Whether this is the first of the processes that a command started: only that one prints the result."""
    torch = sys.modules.get("torch")
    return torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _chosen(table: Table, word: str) -> Command | Mapping[str, Command]:
    if word in table:
        return table[word]
    close = difflib.get_close_matches(word, table, 1)
    raise UserError(f"expected one of {', '.join(filter(None, table))}, got {word!r}{f', did you mean {close[0]}?' if close else ''}")


def _overview(name: str, table: Table) -> str:
    lines = [f"usage: {name} <command> [options]", "", "commands:"]
    for word, entry in table.items():
        found = {word: entry} if isinstance(entry, Command) else {f"{word} {kind}".strip(): command for kind, command in entry.items()}
        lines += [f"  {words:<16} {command.about}" for words, command in found.items()]
    return "\n".join([*lines, "", f"`{name} <command> --help` lists a command's options."])


if __name__ == "__main__":
    sys.exit(main())
