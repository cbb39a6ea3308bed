# SPDX-License-Identifier: Apache-2.0
"""The order of the evaluation's rooms: tasks know neither results nor running, results do not know running."""

from __future__ import annotations

import pytest

from test_architecture import imports

ORDER = ("tasks", "settings", "results", "running")


@pytest.mark.parametrize("room", ORDER)
def test_a_room_knows_only_those_before_it(room: str) -> None:
    prefix = "plphp.evaluation."
    own = {target for module, target in imports() if module.startswith(prefix + room)}
    rooms = {target.removeprefix(prefix).split(".")[0] for target in own if target.startswith(prefix)}
    assert own
    assert rooms <= {*ORDER[: ORDER.index(room) + 1]}
