"""How sure a segmentation is: what the members of an ensemble agree on, conformal bounds on volumes, and whether either is of any use.

members.py     the members: several runs, mirrored passes, or passes with dropout
sums.py        entropy and mutual information of their probabilities, and the maps' files
conformal.py   bounds on a class's volume, from the patients that training held out
ranking.py     wrong voxels among the most uncertain ones
reliability.py probabilities against how often they are right
worth.py       both, and the coverage of the bounds, for `medssm evaluate --uncertainty`, with its page (page.py)
"""
