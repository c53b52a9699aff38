"""A trained network in the form that other software runs: `medssm.export.bundle` writes a MONAI bundle."""
