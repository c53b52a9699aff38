"""Trainers that nnU-Net finds by name; nothing else may lie here, since nnU-Net imports every module of the folder."""
