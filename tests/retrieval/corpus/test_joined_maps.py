import gc
import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from graft.retrieval.corpus.joined_maps import joined_maps

WHOLE = mmap.ALLOCATIONGRANULARITY // 16  # rows of 8 ids of two bytes that fill their pages


def written(folder, rows):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 2**16, (count, 8), dtype=np.uint16) for count in rows]
    paths = [folder / f"{number}.bin" for number in range(len(rows))]
    for path, array in zip(paths, arrays, strict=True):
        array.tofile(path)
    return arrays, joined_maps(paths, np.dtype("<u2"), [array.shape for array in arrays])


@given(pages=lists(integers(0, 3), min_size=1, max_size=6), more=lists(integers(0, 9), min_size=6, max_size=6))
def test_joined_files_hold_the_rows_of_all(tmp_path_factory, pages, more):
    rows = [page * WHOLE + rest or 1 for page, rest in zip(pages, more, strict=False)]
    arrays, joined = written(tmp_path_factory.mktemp("files"), rows)
    assert (np.concatenate(joined) == np.concatenate(arrays)).all()
    breaks = sum(count % WHOLE > 0 for count in rows[:-1])
    assert len(joined) == breaks + 1


def test_what_is_joined_cannot_be_written_to_and_stays_while_it_is_used(tmp_path):
    arrays, joined = written(tmp_path, [WHOLE, 2 * WHOLE, 3])
    (whole,) = joined
    with pytest.raises(ValueError, match="read-only"):
        whole[0] = 1
    part = whole[WHOLE - 1 : WHOLE + 1]
    del whole, joined
    gc.collect()
    assert (part == [arrays[0][-1], arrays[1][0]]).all()


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.bin"):
        joined_maps([tmp_path / "absent.bin"] * 2, np.dtype("<u2"), [(WHOLE, 8)] * 2)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not tell its maps")
def test_maps_go_when_the_last_array_goes(tmp_path):
    _, joined = written(tmp_path, [WHOLE, WHOLE])
    place = str(tmp_path / "1.bin")
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert place in maps.read()
    del joined
    gc.collect()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert place not in maps.read()
