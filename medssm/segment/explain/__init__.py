"""Why a network sees a class where it does: `medssm predict --explain CLASS`.

attribution   integrated gradients and occlusion of any score
score         the score of a class, and the windows that hold the class
reach         what the scans of the network carry to a voxel
sanity        whether the maps say anything about the network
case          all of that for one case, as maps, figures and a page
"""
