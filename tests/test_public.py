# SPDX-License-Identifier: Apache-2.0
"""The public names, and how fast they come."""

import subprocess
import sys

import pytest

import plphp


def test_every_public_name_is_there() -> None:
    assert sorted(plphp.__all__) == sorted(plphp._MODULE_OF)
    for name in plphp.__all__:
        assert getattr(plphp, name).__doc__
        assert name in dir(plphp)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pruned'"):
        _ = plphp.pruned


def test_help_does_not_import_torch() -> None:
    code = "import sys, plphp.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
