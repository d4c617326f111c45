"""How many pairs tiles of registers compute for a short document."""

import pytest

from benchmarks.tools.cpu_documents import MODES, TILES, Tile, bound, computed_pairs


def test_pairs_by_hand():
    # Rows 0-3 see up to 4 keys, computed as 4; rows 4-5 up to 6, computed as 8. Values in parts of two rows.
    forward = ((4 * 4 + 2 * 8) + (2 * 2 + 2 * 4 + 2 * 6)) / 2
    backward = (2 * (4 * 4 + 2 * 8) + (2 * 2 + 2 * 4 + 2 * 6) + 2 * (4 * 6 + 2 * 2)) / 5
    assert computed_pairs(6, Tile(4, 4, 2)) == {"forward": forward, "backward": backward}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_bound_is_a_share_that_grows_with_length(tile):
    for mode in MODES:
        found = [bound([n], tile, mode) for n in (6, 24, 96)]
        assert 0 < found[0] < found[1] < found[2] < 1
