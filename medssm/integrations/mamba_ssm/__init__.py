"""A stand-in for mamba_ssm, causal_conv1d and the compiled modules under them, so that code written for those runs unmodified, on a CPU too.

    import medssm.integrations.mamba_ssm
    medssm.integrations.mamba_ssm.install()
    from mamba_ssm import Mamba, Mamba2            # medssm's, with mamba_ssm's signatures and weight names

    python -m medssm.run train.py --epochs 10      # the same for a script that knows nothing of medssm

Every name that upstream's modules have can be imported. What there is stands in `table.PRESENT`; the rest, in `absent.NAMES`, may be inherited from
and raises NotImplementedError on use.
A package that is installed is never shadowed unless install(force=True) asks for it. Processes that are spawned, not forked, start without the
stand-in: call install() in the module that they import.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
from types import ModuleType
from typing import Any

from medssm.integrations.mamba_ssm.table import MODULES, PACKAGES

logger = logging.getLogger("medssm")


def install(force: bool = False) -> dict[str, str]:
    """Make imports of mamba_ssm, causal_conv1d and their compiled modules resolve to medssm; calling it again is harmless.

    Args:
        force: take the place of installed ones as well, and of imported ones (objects already taken from those stay what they are).

    Returns:
        {package: "medssm", or where the installed package is that stays in place}; each of the latter is logged as a warning.
    """
    _remove()
    if force:
        _displaced.update({name: sys.modules.pop(name) for name in _imported(ours=False)})
        sys.meta_path.insert(0, _finder)
    else:
        sys.meta_path.append(_finder)
    report = {name: "medssm" if force else _installed(name) or "medssm" for name in PACKAGES}
    for name, where in report.items():
        if where != "medssm":
            logger.warning("%s: the installed one stays (%s); install(force=True) or `python -m medssm.run --force` takes its place", name, where)
    return report


def uninstall() -> None:
    """Take the stand-in away and put back what install(force=True) displaced; harmless where there is none."""
    _remove()
    for name in _imported(ours=True):
        del sys.modules[name]
    sys.modules.update(_displaced)
    _displaced.clear()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and fills the modules of the table."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if package not in PACKAGES or (rest and not _ours(sys.modules.get(package))):
            return None
        if fullname not in MODULES:
            raise ModuleNotFoundError(f"{fullname} is not in this release of medssm, which stands in for {package}", name=fullname)
        inner = any(name.startswith(fullname + ".") for name in MODULES)
        return importlib.machinery.ModuleSpec(fullname, self, origin=__file__, is_package=inner)

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(MODULES[module.__name__])
        module.__doc__ = f"medssm's stand-in for {module.__name__}."
        for name in MODULES:
            if name.startswith(module.__name__ + "."):
                importlib.import_module(name)


_finder = _Finder()
_displaced: dict[str, ModuleType] = {}


def _ours(module: ModuleType | None) -> bool:
    return getattr(getattr(module, "__spec__", None), "loader", None) is _finder


def _imported(ours: bool) -> list[str]:
    return [name for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES and _ours(module) is ours]


def _remove() -> None:
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _installed(package: str) -> str | None:
    """Where another package of that name is, imported or only installed; None if there is none."""
    module = sys.modules.get(package)
    if module is not None and not _ours(module):
        return getattr(module, "__file__", None) or "imported"
    for finder in sys.meta_path:
        spec = None if finder is _finder or not hasattr(finder, "find_spec") else finder.find_spec(package, None)
        if spec is not None:
            return spec.origin or str(list(spec.submodule_search_locations or ()))
    return None
