"""Requests that are meant to hold the server up: the list that `make bench` and tests/test_hostile.py go through.

`requests` is the list, `row` what a line of it says, `making` how its frames are made, and `scene` what a server has to
hold before they make sense.
"""

from tests.hostile.requests import HOSTILE
from tests.hostile.row import Hostile
from tests.hostile.scene import scene

__all__ = ["HOSTILE", "Hostile", "scene"]
