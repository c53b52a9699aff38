"""What tests of the stand-in for mamba_ssm share."""

import pytest

from medssm.integrations import mamba_ssm as stand_in


@pytest.fixture
def installed():
    """The stand-in in force, whatever this machine has."""
    stand_in.install(force=True)
    yield
    stand_in.uninstall()
