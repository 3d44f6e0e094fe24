from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccompile.store import Store, Usage, digest_of, key_of

KEY = "ab12"
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def object_file(store: Store, content: bytes) -> Path:
    digest = digest_of(content)
    return store.folder / "objects" / digest[:2] / digest[2:]


def record_file(store: Store) -> Path:
    (found,) = store.folder.glob("records/??/*")
    return found


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


# ---------------------------------------------------------------------------------------------- what comes back


@given(PLAIN, st.binary(max_size=64))
def test_records_and_contents_come_back(
    tmp_path_factory: pytest.TempPathFactory, plain: object, content: bytes
) -> None:
    store = Store(tmp_path_factory.getbasetemp() / "any")
    store.write(KEY, {"plain": plain})
    assert store.read(KEY) == {"plain": plain}
    assert store.get(store.put(content)) == content
    assert store.notes == []


def test_numbers_that_json_has_not_come_back(store: Store) -> None:
    store.write(KEY, {"numbers": [math.inf, -math.inf, 0.1]})
    assert store.read(KEY) == {"numbers": [math.inf, -math.inf, 0.1]}


def test_what_was_never_stored_is_not_there(store: Store) -> None:
    assert (store.read(KEY), store.get(digest_of(b"x")), store.holds(digest_of(b"x"))) == (None, None, False)
    assert store.notes == []


def test_a_content_is_stored_once(store: Store) -> None:
    assert store.put(b"weights") == store.put(b"weights")
    assert store.usage() == Usage(0, 1, 7)


@pytest.mark.parametrize("damage", [b"Weights", b"", b"weight", b"weights!"])
def test_a_damaged_content_is_dropped_with_a_note(store: Store, damage: bytes) -> None:
    digest = store.put(b"weights")
    object_file(store, b"weights").write_bytes(damage)
    assert store.get(digest) is None
    assert len(store.notes) == 1
    assert "dropped a damaged entry, objects/" in store.notes[0]
    assert not store.holds(digest)
    assert store.get(store.put(b"weights")) == b"weights"


@pytest.mark.parametrize("at", [0, 70, -1])
def test_a_damaged_record_is_dropped_with_a_note(store: Store, at: int) -> None:
    store.write(KEY, {"a": 12345})
    path = record_file(store)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert store.read(KEY) is None
    assert "dropped a damaged entry, records/ab12" in store.notes[0]
    assert not path.exists()


def test_a_damaged_content_of_the_same_size_is_not_taken_for_the_whole_one(store: Store) -> None:
    digest = store.put(b"weights")
    object_file(store, b"weights").write_bytes(b"WEIGHTS")
    store.put(b"weights")  # looks at the size alone
    assert store.get(digest) is None  # reading compares


# ---------------------------------------------------------------------------------------------- room


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=100)
    contents = [bytes([number]) * 30 for number in range(4)]
    for number, content in enumerate(contents):
        store.put(content)
        age(object_file(store, content), 100 - number)
    store.get(digest_of(contents[0]))  # used again
    store.trim()
    assert [store.holds(digest_of(content)) for content in contents] == [True, False, False, True]


def test_nothing_goes_within_the_limit(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=60)
    digests = [store.put(bytes([number]) * 30) for number in range(2)]
    store.trim()
    assert all(store.holds(digest) for digest in digests)


def test_scratch_files_of_killed_processes_go_and_those_of_others_stay(store: Store) -> None:
    store.put(b"x")
    old, new = store.folder / "scratch" / "old", store.folder / "scratch" / "new"
    for path in (old, new):
        path.write_bytes(b"half")
    age(old, 7200)
    store.trim()
    assert (old.exists(), new.exists()) == (False, True)


def test_clear_removes_everything_and_tells_what(store: Store) -> None:
    store.put(b"weights")
    store.write(KEY, {})
    assert store.clear() == Usage(1, 1, 7 + 64 + 1 + 2)
    assert store.usage() == Usage(0, 0, 0)


# ---------------------------------------------------------------------------------------------- no room at all


def test_a_folder_that_cannot_be_made_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = Store(tmp_path / "file")
    assert store.get(store.put(b"x")) is None
    store.write(KEY, {})
    assert store.read(KEY) is None
    store.trim()
    assert [note for note in store.notes if note.startswith("nothing is stored in")] == store.notes[:1]


def test_a_full_disk_is_a_note_and_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, mode: str) -> None:
        os.close(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ccompile.store.os.fdopen", full)
    digest = store.put(b"x")
    assert store.notes == [f"nothing is stored in {store.folder}: No space left on device"]
    assert (store.holds(digest), list(store.folder.glob("scratch/*"))) == (False, [])


def test_keys_tell_texts_from_lists_and_numbers() -> None:
    keys = {key_of("ab"), key_of("a", "b"), key_of(["a", "b"]), key_of(1), key_of("1"), key_of(None), key_of(1.0)}
    assert len(keys) == 7
