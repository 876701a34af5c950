"""Notes of loads during which a server went away."""

from __future__ import annotations

import pytest

from mlflow_tdeploy.deploy.ends import Note, Notes, notes_of, remove_notes, resolved
from mlflow_tdeploy.deploy.files import FolderFiles

# each ends and starts real servers, a quarter of a minute apiece; the usual ways are in test_apply and test_watch
pytestmark = pytest.mark.slow


@pytest.fixture
def files(tmp_path):
    return FolderFiles(tmp_path)


def notes(files, server="http://a", said="so"):
    return Notes(files, server, "words", said)


def test_ends_in_a_row_are_counted_and_nothing_is_left_of_what_went_well(files):
    known = notes(files)
    for times, gone in ((1, True), (2, True), (2, None), (3, True)):
        before = known.begin(7, gone=False)
        assert known.end(7, before, server_gone=gone) == times
    assert known() == {7: Note(3, False, "so")}
    before = known.begin(7, gone=False)
    assert known.end(7, before, server_gone=False) == 0
    assert not (files.root / notes_of("words")).exists()
    before = known.begin(7, gone=False)
    assert known.end(7, before, server_gone=True) == 1, "not in a row"


def test_who_looked_on_meanwhile_and_counted_it_is_put_right(files):
    for gone, times in ((None, 0), (True, 1), (False, 0)):
        known = notes(files)
        before = known.begin(7, gone=False)
        notes(files).settle()
        assert known() == {7: Note(before + 1, False, "so")}
        assert known.end(7, before, server_gone=gone) == times


def test_what_was_begun_counts_where_the_server_is_gone(files):
    known = notes(files)
    known.begin(7, gone=False)
    assert resolved(known(), gone=True) == {7: Note(1, False, "so")}
    assert resolved(known(), gone=False) == {}
    known.begin(8, gone=True)  # who begins holds the place, so nobody is at the other one
    assert known() == {7: Note(1, False, "so"), 8: Note(0, True, "so")}
    known.settle()
    assert known() == {7: Note(1, False, "so"), 8: Note(1, False, "so")}
    known.begin(8, gone=False)
    known.begin(7, gone=False)
    assert known() == {7: Note(1, True, "so"), 8: Note(1, False, "so")}, "that one did no harm"


def test_servers_of_one_repository_and_what_is_said_are_told_apart(files):
    for server in ("http://a", "http://b"):
        one = notes(files, server)
        one.end(7, one.begin(7, gone=False), server_gone=True)
    notes(files).keep([8])
    assert notes(files)() == {}
    assert notes(files, "http://b")() == {7: Note(1, False, "so")}
    assert notes(files, "http://b", "otherwise")() == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"http://a": 7}', b'{"http://a": {"x": {}}}'])
def test_what_cannot_be_read_is_nothing(files, content):
    files.write(notes_of("words"), content)
    assert notes(files)() == {}
    notes(files).begin(7, gone=False)
    assert notes(files)() == {7: Note(0, True, "so")}


def test_a_deployment_that_is_removed_leaves_the_notes_of_other_servers(files):
    for server in ("http://a", "http://b"):
        notes(files, server).begin(7, gone=False)
    remove_notes(files, "words", "http://a")
    assert notes(files)() == {}
    assert set(notes(files, "http://b")()) == {7}
