from __future__ import annotations

import numpy as np
import pytest

from lib.scoring import has_lost, pack, rungs


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (1, [1]),
        (22, [22]),
        (23, [12, 23]),
        (29, [14, 29]),
        (36, [18, 36]),
        (48, [12, 24, 48]),
        (1000, [250, 500, 1000]),
    ],
)
def test_the_rungs_grow_to_all_images(images, expected):
    assert rungs(images) == expected


def test_a_candidate_loses_where_it_is_clearly_below_every_rival():
    scores = np.random.default_rng(0).uniform(0.3, 0.5, 100)
    above, equal = {"10": pack(scores + 0.1)}, {"10": pack(scores)}
    assert has_lost(scores, 10, [above]) and has_lost(scores, 10, [above, above])
    assert not has_lost(scores, 10, []) and not has_lost(scores, 10, [above, equal])
    assert not has_lost(scores, 20, [above])  # a rival that was not compared there is not beaten by anyone
