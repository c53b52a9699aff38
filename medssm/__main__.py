"""python -m medssm: the command line, also where the folder of the command `medssm` is on no path."""

from medssm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
