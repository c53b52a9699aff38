"""The Python side of every kernel: one folder per op, `reference.py` (the specification) beside its faster equals."""
