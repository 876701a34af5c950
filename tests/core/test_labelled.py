"""Texts with the right answers, as people's files hold them."""

from __future__ import annotations

import pytest

from mlflow_tdeploy.core.columns import TEXT, read_items
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.labelled import Labelled


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("a.csv", "text,label\ngood,1\nbad,0\n", (1, 0)),
        ("a.CSV", "\ufefftext,label\ngood,yes\nbad,no\n", ("yes", "no")),
        ("a.tsv", "label\ttext\n1\tgood\nx1\tbad\n", ("1", "x1")),
        ("a.jsonl", '{"text": "good", "label": 1}\n\n{"text": "bad", "label": "0"}\n', (1, "0")),
    ],
)
def test_forms(tmp_path, name, content, labels):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert Labelled.read(tmp_path / name) == Labelled(("good", "bad"), labels)


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    (tmp_path / "a.csv").write_text("phrase,label\ngood,1\n")
    with pytest.raises(InvalidInputError, match="'text' is not there, found phrase, label"):
        Labelled.read(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("text,label\ngood\n")
    with pytest.raises(InvalidInputError, match="row 0 has no label"):
        Labelled.read(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("sentence,label\ngood,x\n")
    assert Labelled.read(tmp_path / "c.csv").texts == ("good",)


def test_other_texts_of_a_task_and_lists_are_read(tmp_path):
    path = tmp_path / "asked.csv"
    path.write_text('question,context,label\nWhen?,It was 1945.,1945\nWho?,It was Ann.,"[""Ann"", ""it""]"\n')
    found = Labelled.read(path)
    assert found.texts == (
        {"question": "When?", "context": "It was 1945."}, {"question": "Who?", "context": "It was Ann."},
    )  # fmt: skip
    assert found.labels == ("1945", ["Ann", "it"])
    path = tmp_path / "ranked.tsv"
    path.write_text('query\tdocuments\tlabel\nq\t["a", "b"]\t1\n')
    found = Labelled.read(path)
    assert (found.texts, found.labels) == (({"query": "q", "documents": ["a", "b"]},), (1,))
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"text": "[a]", "text_pair": "b", "label": "x"}\n')
    assert Labelled.read(path).texts == ({"text": "[a]", "text_pair": "b"},)


def test_a_row_that_is_too_short_is_told(tmp_path):
    (tmp_path / "a.csv").write_text("label,text\npos,good\nneg\n")
    with pytest.raises(InvalidInputError, match="holds no texts"):
        Labelled.read(tmp_path / "a.csv")


def test_images_are_files_beside_a_table(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "in/b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "t.csv").write_text("image,label\na.png,cat\nin/b.jpg,dog\n")
    found = Labelled.read(tmp_path / "t.csv")
    assert found == Labelled(({"image": tmp_path / "a.png"}, {"image": tmp_path / "in/b.jpg"}), ("cat", "dog"))
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "label": 1}\n')
    assert Labelled.read(tmp_path / "t.jsonl").texts == ({"image": tmp_path / "a.png"},)


@pytest.mark.parametrize("name", ["none.png", "../outside.png", "/etc/hostname", "link.png", ""])
def test_an_image_that_is_not_in_the_tables_folder_is_refused(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside.png").write_bytes(b"x")
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    (inside / "t.csv").write_text(f"image,label\n{name},cat\n")
    with pytest.raises(InvalidInputError, match="there is no image '.*' in the table's folder"):
        Labelled.read(inside / "t.csv")


def test_folders_are_classes_of_the_images_in_them(tmp_path):
    for name in ("dog/2.JPG", "cat/1.png", "cat/more/3.webp", "cat/notes.txt", "0.png", "cat/._1.png", ".old/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = Labelled.read(tmp_path)
    names = [str(one["image"].relative_to(tmp_path)) for one in found.texts]
    assert list(zip(names, found.labels, strict=True)) == [
        ("cat/1.png", "cat"), ("cat/more/3.webp", "cat"), ("dog/2.JPG", "dog"),
    ]  # fmt: skip
    with pytest.raises(InvalidInputError, match="no folders with images"):
        Labelled.read(tmp_path / "dog")


def test_images_beside_texts_are_left_to_whoever_reads_them(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "t.csv").write_text("text,image,label\nfine,http://x/y.jpg,1\ngood,,0\nbest,a.png,1\n")
    found = Labelled.read(tmp_path / "t.csv")
    assert [one["text"] for one in found.texts] == ["fine", "good", "best"]
    assert [one["image"] for one in found.texts] == ["http://x/y.jpg", "", tmp_path / "a.png"]
    assert read_items(list(found.texts), (TEXT,)) == ["fine", "good", "best"]
