"""medssm: linear-time sequence layers for 2D and 3D medical imaging."""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_here.parent))  # a checkout that made the link medssm/kernels -> ../kernels a text file

__version__ = "0.1.0"
