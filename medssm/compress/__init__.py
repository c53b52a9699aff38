"""Networks made smaller: channels and states removed (`prune`), layers of low rank (`factorize`), norms folded (`fold`), 8-bit integers (`int8`).

Each step changes the structure of a network and is described by a JSON object, so that `steps.restructured` can build that structure again.
"""
