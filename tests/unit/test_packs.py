"""Packs: a zip archive that any reader unpacks, and an index that is believed only inside its archives."""

from __future__ import annotations

import io
import zipfile

import pytest

from cache_spec.errors import CacheError
from cache_spec.packs import PackIndex, write_pack

FILES = {"a/c.0": b"one", "receipts/0.json": b"", "a/c.1": bytes(5000)}


def pack(out: io.BytesIO | None) -> PackIndex:
    files = [(name, len(data), [data[:2], data[2:]]) for name, data in FILES.items()]
    made = write_pack("packs/x-0.zip", files, out)
    return PackIndex(fingerprint="0" * 64, plain={"manifest.json": 1}, packs=(made,))


def test_any_zip_reader_unpacks_a_pack_and_a_range_of_bytes_is_a_file() -> None:
    out = io.BytesIO()
    index = pack(out)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == FILES
    for name, data in FILES.items():
        place = index.places[name]
        assert out.getvalue()[place.offset : place.offset + place.num_bytes] == data
    assert index.packs[0].num_bytes == len(out.getvalue())


def test_equal_files_make_equal_packs_with_and_without_a_place_for_them() -> None:
    out = io.BytesIO()
    assert pack(out) == pack(io.BytesIO()) == pack(None)
    assert PackIndex.from_json(pack(None).to_json(), "here") == pack(None)


@pytest.mark.parametrize("place", [(-1, 3), (0, -1), (10**9, 1), (0, 10**18)])
def test_an_index_that_points_out_of_a_pack_is_refused(place: tuple[int, int]) -> None:
    index = pack(None)
    files = index.packs[0].files | {"a/c.0": place}
    packs = (index.packs[0].model_copy(update={"files": files}),)
    with pytest.raises(CacheError) as caught:
        PackIndex.from_json(index.model_copy(update={"packs": packs}).to_json(), "here")
    assert caught.value.kind == "bad-packs"


@pytest.mark.parametrize("name", ["../packs/x.zip", "packs/../x.zip", "/packs/x.zip", "packs/x"])
def test_a_pack_outside_its_folder_is_refused(name: str) -> None:
    index = pack(None)
    packs = (index.packs[0].model_copy(update={"name": name}),)
    with pytest.raises(CacheError) as caught:
        PackIndex.from_json(index.model_copy(update={"packs": packs}).to_json(), "here")
    assert caught.value.kind == "bad-packs"
