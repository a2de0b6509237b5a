"""One row per catalogued method: the `Plug` that the laws are checked on. Each room has a file; shapes are tiny, truth tests judge the numbers."""

import itertools

from . import diffusion, distributed, laws, optim, schedules, transport, tuning, weights


ROOMS = (diffusion, distributed, laws, optim, schedules, transport, tuning, weights)
LAWS = dict(itertools.chain.from_iterable(room.ROWS.items() for room in ROOMS))
