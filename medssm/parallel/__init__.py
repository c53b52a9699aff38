"""A volume over several processes or machines: every rank of a torch.distributed group computes a slab of it."""

from medssm.parallel.group import RankError, start
from medssm.parallel.slabs import Slabs

__all__ = ["RankError", "Slabs", "start"]
