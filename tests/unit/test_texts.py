import hashlib
import json
import struct

import pytest

from llfast import TextSet, TextSetError, build_texts


def test_digest_is_sha256_over_lengths_and_bytes():
    texts = TextSet.from_texts(["héllo", ""], ids=["a", "b"])
    expected = hashlib.sha256()
    for part in (b"a", "héllo".encode(), b"b", b""):
        expected.update(struct.pack("<Q", len(part)) + part)
    assert texts.digest == expected.hexdigest()
    assert texts.text_bytes.tolist() == [6, 0]


def test_digest_tells_where_one_text_ends():
    assert TextSet.from_texts(["ab", "c"]).digest != TextSet.from_texts(["a", "bc"]).digest
    assert TextSet.from_texts(["a"], groups=["g"]).digest == TextSet.from_texts(["a"]).digest, (
        "groups are outside the digest"
    )


def test_save_and_load_give_the_same_set(tmp_path):
    odd = ["line\nbreak", 'quote "', "\u2028 separator", "tab\t", "emoji 🙂", "", "\x00 nul"]
    texts = TextSet.from_texts(odd, groups=["d"] * len(odd))
    texts.save(tmp_path / "t.jsonl")
    again = TextSet.load(tmp_path / "t.jsonl")
    assert (again.texts, again.ids, again.groups) == (texts.texts, texts.ids, texts.groups)
    assert again.digest == texts.digest
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least one text"),
        (b'{"text": "a"\n', "line 1 must be a JSON object"),
        (b'{"text": "a"}\n{"id": "x"}\n', 'line 2 must be an object with a string "text"'),
        (b'{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}\n', "'x' for texts 0 and 1"),
        (b'{"text": "\xff"}\n', "line 1 must be UTF-8, got byte 0xff at offset 10"),
        (b'{"text": "\\ud800"}\n', "lone surrogate"),
        (b"[" * 100_000, "line 1 must be a JSON object"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(TextSetError, match=message):
        TextSet.load(path)


def test_windows_line_ends_and_byte_order_marks_are_no_part_of_texts(tmp_path):
    texts = TextSet.from_texts(["a", "\ufeffb", "c\r\n"])
    texts.save(tmp_path / "t.jsonl")
    content = b"\xef\xbb\xbf" + (tmp_path / "t.jsonl").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "w.jsonl").write_bytes(content)
    assert TextSet.load(tmp_path / "w.jsonl").digest == texts.digest
    (tmp_path / "bad.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\xff"}')
    with pytest.raises(TextSetError, match="line 1 must be UTF-8, got byte 0xff at offset 10"):
        TextSet.load(tmp_path / "bad.jsonl")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf" + b"x" * 300)
    found, _ = build_texts([tmp_path / "d.txt", tmp_path / "w.jsonl"])
    assert found.texts == ("x" * 300,)


def test_bad_arguments_are_refused():
    with pytest.raises(TextSetError, match="at least one text"):
        TextSet.from_texts([])
    with pytest.raises(TypeError, match="got one string"):
        TextSet.from_texts("abc")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string"):
        TextSet.from_texts(["a", 1])
    with pytest.raises(ValueError, match="min_bytes must be below"):
        build_texts(["x"], min_bytes=10, max_bytes=10)


def test_chunks_never_split_a_character_and_lose_nothing_but_short_tails(tmp_path):
    document = "aé漢🙂" * 500
    (tmp_path / "doc.txt").write_text(document, encoding="utf-8")
    texts, report = build_texts([tmp_path / "doc.txt"], max_bytes=64, min_bytes=8, n=10_000)
    joined = "".join(texts.texts)
    assert document.startswith(joined)
    assert len(document.encode()) - len(joined.encode()) <= 8
    assert all(8 < size <= 64 for size in texts.text_bytes)
    assert all(size > 60 for size in texts.text_bytes[:-1]), "a cut steps back at most 3 bytes"
    assert report.chunks == len(texts)


def test_a_chunk_of_exactly_min_bytes_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("x" * (100 + 10))
    texts, _ = build_texts([tmp_path / "a.txt"], max_bytes=100, min_bytes=10)
    assert texts.text_bytes.tolist() == [100]
    texts, _ = build_texts([tmp_path / "a.txt"], max_bytes=100, min_bytes=9)
    assert texts.text_bytes.tolist() == [100, 10]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"document {number} " * 200)
    (folder / "sub" / "code.py").write_text("x = 1\n" * 300)
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"row {n} " * 100}) + "\n" for n in range(5))
    )
    (folder / "image.bin").write_bytes(b"\xff\xfe\x00" * 100)
    (folder / ".hidden").write_text("secret " * 200)
    return folder


def test_sampling_is_deterministic_and_a_sample(corpus):
    every, report = build_texts([corpus], n=10_000)
    sample, _ = build_texts([corpus], n=20, seed=1)
    again, _ = build_texts([corpus], n=20, seed=1)
    other, _ = build_texts([corpus], n=20, seed=2)
    assert len(sample) == 20
    assert sample.digest == again.digest != other.digest
    assert set(sample.ids) < set(every.ids)
    order = {id_: place for place, id_ in enumerate(every.ids)}
    assert [order[i] for i in sample.ids] == sorted(order[i] for i in sample.ids)
    assert report.documents == 30 + 1 + 5
    assert report.skipped_files == ("corpus/image.bin",)
    assert not any("hidden" in id_ for id_ in every.ids)
    assert "corpus/sub/code.py:0" in every.ids
    assert every.groups is not None
    assert every.groups[every.ids.index("corpus/3.txt:1")] == "corpus/3.txt"


def test_a_larger_sample_contains_the_smaller_one(corpus):
    small, _ = build_texts([corpus], n=10)
    large, _ = build_texts([corpus], n=40)
    assert set(small.ids) <= set(large.ids)


def test_a_named_file_that_is_not_text_is_an_error(corpus):
    with pytest.raises(TextSetError, match="image.bin must be UTF-8"):
        build_texts([corpus / "image.bin"])
    with pytest.raises(TextSetError, match="longer than 256 bytes, got none"):
        (corpus / "short.txt").write_text("short")
        build_texts([corpus / "short.txt"])


def test_a_file_of_a_folder_is_taken_whole_or_not_at_all(corpus):
    row = json.dumps({"text": "a good row " * 100})
    (corpus / "torn.jsonl").write_text(f'{row}\n{row}\n{{"text": "cut\n')
    texts, report = build_texts([corpus])
    assert report.skipped_files == ("corpus/image.bin", "corpus/torn.jsonl")
    assert report.documents == 30 + 1 + 5
    assert not any("torn" in id_ for id_ in texts.ids)


def test_the_file_that_a_set_is_written_to_is_no_source_of_it(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    (corpus / "link.jsonl").symlink_to("out.jsonl")
    expected, _ = build_texts([corpus])
    for out in ("out.jsonl", corpus / "sub" / ".." / "link.jsonl"):
        found, report = build_texts([corpus], out=out)
        found.save(out)
        assert found.digest == expected.digest
        assert report.skipped_files == ("corpus/image.bin",)
    for given in ("out.jsonl", "link.jsonl"):
        with pytest.raises(ValueError, match=rf"inputs must not name .*, got {given}; write"):
            build_texts([corpus, given], out="out.jsonl")


def test_inputs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two"):
        (tmp_path / folder / "docs").mkdir(parents=True)
        (tmp_path / folder / "docs" / "a.txt").write_text(f"{folder} " * 200)
    files, _ = build_texts(["one/docs/a.txt", "two/docs/a.txt"])
    assert files.ids == ("one/docs/a.txt:0", "two/docs/a.txt:0")
    folders, _ = build_texts(["one/docs", "two/docs"])
    assert folders.ids == files.ids
    assert [text[:3] for text in folders.texts] == ["one", "two"]
    alone, _ = build_texts([tmp_path / "one" / "docs"])
    assert alone.ids == ("docs/a.txt:0",), "where a folder is does not matter"


def test_ids_and_groups_must_be_text():
    with pytest.raises(TypeError, match=r"ids\[1\] must be a string, got int"):
        TextSet.from_texts(["a", "b"], ids=["x", 1])
    with pytest.raises(TypeError, match=r"groups\[0\] must be a string, got NoneType"):
        TextSet.from_texts(["a"], groups=[None])
    with pytest.raises(TextSetError, match="lone surrogate"):
        TextSet.from_texts(["a"], groups=["\ud800"])


def test_names_of_files_need_not_be_utf8(tmp_path):
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "\udcfc.txt").write_text("word " * 100)
    texts, _ = build_texts([tmp_path / "latin"])
    assert texts.ids == ("latin/\\udcfc.txt:0",)
    alone, _ = build_texts([tmp_path / "latin" / "\udcfc.txt"])
    assert alone.ids == ("\\udcfc.txt:0",)


def test_a_single_path_is_not_taken_for_its_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("docs", tmp_path / "docs"):
        with pytest.raises(TypeError, match=r"inputs must be several paths, got .*docs'\)?; wrap"):
            build_texts(given)


def test_lists_that_change_later_change_no_text_set():
    ids, words, groups = ["a", "b"], ["one", "two"], ["g", "g"]
    texts = TextSet(ids, words, groups)
    words[0] = "three"
    assert (texts.ids, texts.texts, texts.groups) == (("a", "b"), ("one", "two"), ("g", "g"))
    assert texts.digest == TextSet.from_texts(texts.texts, texts.ids).digest
