"""Which places are at s3://, and paths of objects; no request is made."""

import errno
from pathlib import Path

import pytest

from llfast import RemoteError, StoreError, s3
from llfast.remote import RemotePath, is_remote, to_path


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b c/", "s3://bucket/a/b c"),
        ("S3://bucket/é", "s3://bucket/é"),
        (Path("s3://bucket/a"), "s3://bucket/a"),  # which has lost a slash
        (RemotePath("bucket", "a"), "s3://bucket/a"),
    ],
)
def test_what_is_at_s3(given, url):
    assert is_remote(given)
    assert str(to_path(given)) == url
    assert to_path(url) == to_path(given)


@pytest.mark.parametrize("given", ["store", "/a/b", "./s3", "s3", "c:/x", Path("a://b"), "a:b"])
def test_what_is_a_folder(given):
    assert not is_remote(given)
    assert to_path(given) == Path(given)


@pytest.mark.parametrize(
    "given",
    [
        "gs://bucket/a",
        "https://bucket.s3.amazonaws.com/a",
        "s3://",
        "s3:///a",
        "s3://a b/c",
        "s3://bucket/a//b",
        "s3://bucket/../b",
        "s3://bucket/./b",
        "s3://bucket/a?versionId=1",
        "s3://bucket/a\nb",
        "s3://user:much-too-secret@bucket/a",
    ],
)
def test_what_is_neither(given):
    with pytest.raises(
        StoreError, match="^store must be a folder or s3://bucket/prefix, got "
    ) as e:
        to_path(given)
    assert "secret" not in str(e.value)


def test_errors_are_one_line_without_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "much-too-secret")

    def ask():
        raise ValueError("AKIAIOSFODNN7EXAMPLE of http://me:pass@host with much-too-secret\nmore")

    with pytest.raises(RemoteError) as caught:
        s3._explained("read", s3.S3Object("bucket", "a"), ask)
    hidden = "s3://bucket/a cannot be read: [hidden] of http://[hidden]@host with [hidden]"
    assert str(caught.value) == hidden


def test_a_server_that_has_no_conditional_writes_is_written_to_without(monkeypatch):
    asked = []

    class Server:
        def call_s3(self, method, **arguments):
            asked.append((method, arguments.get("IfNoneMatch")))
            if "IfNoneMatch" in arguments:
                raise OSError(errno.ENOSYS, "A header you provided is not implemented")

    monkeypatch.setattr(s3, "_filesystem", Server)
    assert s3.create(s3.S3Object("bucket", "a"), b"1")
    assert asked == [("put_object", "*"), ("put_object", None)]


def test_parts_of_a_path():
    path = to_path("s3://bucket/a") / "textset=1" / "x.1.parquet"
    assert str(path) == "s3://bucket/a/textset=1/x.1.parquet"
    assert (path.name, path.stem) == ("x.1.parquet", "x.1")
    assert path.parent.parent == to_path("s3://bucket/a")
    assert len({path, path.parent / "x.1.parquet"}) == 1
    assert str(to_path("s3://bucket") / "a") == "s3://bucket/a"
    assert repr(path) == "RemotePath('s3://bucket/a/textset=1/x.1.parquet')"
