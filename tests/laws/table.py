"""One row per catalogued method: the `Plug` that the laws are checked on. Each room has a file; shapes are tiny, truth tests judge the numbers."""

import itertools

from . import diffusion, distributed, schedules, transport, tuning


ROOMS = (diffusion, distributed, schedules, transport, tuning)
LAWS = dict(itertools.chain.from_iterable(room.ROWS.items() for room in ROOMS))
