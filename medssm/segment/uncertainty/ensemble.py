"""An ensemble in `medssm predict --uncertainty`: what is asked of it for all cases, and what it finds in one case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from medssm.scratch import Scratch
from medssm.segment import postprocess
from medssm.segment.images import Image
from medssm.segment.resample import Grid
from medssm.segment.stored import OnFile
from medssm.segment.uncertainty import conformal
from medssm.segment.uncertainty.members import Kind, Member, Run, described, members_of
from medssm.segment.uncertainty.sums import Sums
from medssm.segment.volumetry import Volumes, volumes, voxel_ml


@dataclass(frozen=True)
class Ensemble:
    """An ensemble.

    Args:
        runs: of medssm train
        members: of each run
        steps: each run's own post-processing
        scores: of each run's held-out patients; none without conformal intervals
        level: of these intervals
        said: what the members are, and what the intervals are from
    """

    runs: Sequence[Run]
    members: Sequence[Member]
    steps: Sequence[postprocess.Steps]
    scores: Sequence[conformal.Scores]
    level: float
    said: tuple[str, str]

    @classmethod
    def of(cls, wanted: Kind | Literal["auto"], runs: Sequence[Run], mirror: bool, level: float, unlike: Sequence[str], post: str | None) -> Ensemble:
        """The ensemble of these runs.

        Args:
            wanted: the kind of its members
            runs: of medssm train
            mirror: each member is the mean of all mirrorings
            level: of the conformal intervals
            unlike: the options with which a run finds other volumes than training found in the held-out patients: there are then no such intervals
            post: the weights (last or best) whose post-processing each run does; None for none

        Raises:
            UserError: there are no members of that kind, or a file of a run is damaged.
        """
        kind, members = members_of(wanted, runs, mirror)
        names = list(runs[0].fitted.structures)
        scores, why = conformal.load([run.folder for run in runs], names, level)
        unlike = [*unlike, *(["--uncertainty dropout"] if kind == "dropout" else [])]
        if scores and unlike:
            scores, why = [], f"no conformal intervals: training measured the held-out patients without {', '.join(unlike)}"
        steps = [postprocess.load([run.folder], names, post) if post else {} for run in runs]
        return cls(runs, members, steps, scores, level, (described(kind, members), why))

    def begin(self, image: Image, grid: Grid, scratch: Scratch) -> Spread:
        """A case, without any member yet; `grid` is the image's along RAS axes."""
        return Spread(self, image, scratch, Sums(grid, self.runs[0].fitted, scratch))


class Spread:
    """What the members find in one case."""

    def __init__(self, ensemble: Ensemble, image: Image, scratch: Scratch, sums: Sums):
        self.ensemble, self.image, self.scratch, self.sums = ensemble, image, scratch, sums
        self._found: list[tuple[Member, dict[str, float]]] = []  # with each class's volume in ml

    def add(self, member: Member, read: Callable[[slice], Tensor]) -> None:
        """Take a member in; `read` gives rows (outputs, rows, y, z) of its probabilities along RAS axes."""
        labels, fitted = self.sums.add(read, self.scratch), self.ensemble.runs[member.run].fitted
        postprocess.process(labels, self.ensemble.steps[member.run], fitted.to_process, voxel_ml(self.image))
        found = volumes(OnFile(labels, self.image), self.image, fitted.structures)
        labels.close()
        self._found.append((member, {name: row["ml"] for name, row in found.items()}))

    def finish(self, label_map: Path, found: Volumes) -> None:
        """Write the maps beside a label map, and add the intervals to the volumes found in it.

        The conformal ones are about what each run finds without mirroring: so were the volumes in its held-out patients found.
        """
        self.sums.write(label_map, self.image, self.scratch)
        for name, row in found.items():
            every = [volume[name] for _, volume in self._found]
            row |= {"members_low_ml": min(every), "members_high_ml": max(every)}
        plain = {member.run: volume for member, volume in self._found if not member.mirror}
        if not self.ensemble.scores:
            return
        for name, row in found.items():
            each = [[patient[name] for patient in scores.values()] for scores in self.ensemble.scores]
            bounds = conformal.interval([plain[run][name] for run in range(len(each))], each, self.ensemble.level)
            if bounds:
                row |= {"conformal_low_ml": bounds[0], "conformal_high_ml": bounds[1], "conformal_level": self.ensemble.level}
