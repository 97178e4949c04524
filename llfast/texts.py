"""Text sets: the fixed texts that every model is scored on."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from .errors import TextSetError
from .files import as_utf8, atomic_write


@dataclass(frozen=True, slots=True, eq=False)
class TextSet:
    """An ordered set of texts with unique ids.

    Attributes:
        ids: one unique name a text.
        texts: the raw texts; they may be empty, but must be valid Unicode (no lone surrogates).
        groups: the document each text was cut from, if known; texts of one group are not
            independent, and intervals on KL are widened accordingly. Not part of the digest.
        text_bytes: (N,) UTF-8 length of each raw text, in bytes.
        digest: sha256 (hex) over, in order, each id and each text, both as a 64-bit little-endian
            byte length followed by the bytes. It travels with every result.

    Raises:
        TextSetError: if there are no texts, ids repeat, or a text is not valid Unicode.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    text_bytes: Int64[np.ndarray, " N"] = field(init=False, repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        for name in ("ids", "texts", "groups"):  # a list could change, and its digest would not
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else tuple(given))
        if not self.texts:
            raise TextSetError("texts must hold at least one text, got none")
        if len(self.ids) != len(self.texts):
            raise TextSetError(
                f"ids must be one a text, got {len(self.ids)} ids for {len(self.texts)} texts"
            )
        if self.groups is not None and len(self.groups) != len(self.texts):
            raise TextSetError(
                f"groups must be one a text, got {len(self.groups)} for {len(self.texts)} texts"
            )
        _refuse_repeated(self.ids)
        for group in self.groups or ():
            _encode(group, group)
        digest = hashlib.sha256()
        lengths = np.empty(len(self.texts), dtype=np.int64)
        for row, (id_, text) in enumerate(zip(self.ids, self.texts, strict=True)):
            encoded = _encode(text, id_)
            lengths[row] = len(encoded)
            for part in (_encode(id_, id_), encoded):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        lengths.flags.writeable = False
        object.__setattr__(self, "text_bytes", lengths)
        object.__setattr__(self, "digest", digest.hexdigest())

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        ids: Iterable[str] | None = None,
        groups: Iterable[str] | None = None,
    ) -> TextSet:
        """Make a text set from strings; ids default to "0", "1", ...

        Raises:
            TypeError: if `texts` is a single string, or something is not a string that must be.
            TextSetError: as the class says.
        """
        if isinstance(texts, str):
            raise TypeError(
                "texts must be a sequence of strings, got one string; wrap it in a list"
            )
        texts = tuple(texts)
        ids = tuple(ids) if ids is not None else tuple(str(row) for row in range(len(texts)))
        groups = tuple(groups) if groups is not None else None
        for name, given in (("texts", texts), ("ids", ids), ("groups", groups or ())):
            for row, each in enumerate(given):
                if not isinstance(each, str):
                    raise TypeError(f"{name}[{row}] must be a string, got {type(each).__name__}")
        return cls(ids, texts, groups)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TextSet:
        """Read a .jsonl file with one object a line: `text`, and optionally `id` and `group`.

        A line without an id (or with null) gets its zero-based number as id.

        Raises:
            OSError: if the file cannot be read.
            TextSetError: with the line, if it is not UTF-8, not JSON or lacks `text`.
        """
        rows = list(_read_jsonl(Path(path)))
        if not rows:
            raise TextSetError(f"{path} must hold at least one text, got an empty file")
        ids = [_field(row, "id", str(number)) for number, row in rows]
        groups = None
        if any(row.get("group") is not None for _, row in rows):
            # A text that names no document stands for itself.
            groups = [
                _field(row, "group", f"id:{id_}") for id_, (_, row) in zip(ids, rows, strict=True)
            ]
        try:
            return cls.from_texts((row["text"] for _, row in rows), ids, groups)
        except TextSetError as error:
            raise TextSetError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set as .jsonl, atomically: `load` gives it back with the same digest."""
        with atomic_write(path) as file:
            for row, (id_, text) in enumerate(zip(self.ids, self.texts, strict=True)):
                fields = {"id": id_, "text": text}
                if self.groups is not None:
                    fields["group"] = self.groups[row]
                file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What `build_texts` read, and what it left out."""

    documents: int
    chunks: int
    skipped_files: tuple[str, ...]


def build_texts(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    n: int = 10_000,
    max_bytes: int = 1024,
    min_bytes: int = 256,
    seed: int = 42,
    out: str | os.PathLike[str] | None = None,
) -> tuple[TextSet, BuildReport]:
    """Cut documents into chunks and sample `n` of them.

    A document is a .txt or source file, or the `text` of one line of a .jsonl file. It is cut from
    its start into consecutive chunks of at most `max_bytes` bytes that never split a character; a
    chunk is kept if it is longer than `min_bytes` bytes. The sample is the `n` chunks whose
    sha256(seed, id) is smallest, so it is uniform, depends on nothing but ids and seed, and is
    returned in the order of the documents. If there are fewer than `n` chunks, all are returned.

    Args:
        inputs: files and folders; those that share a name are told apart by their paths as given.
            In folders, hidden files are passed over, and files that are not UTF-8 text (or .jsonl
            with a line that has no text) are left out and named in the report.
        n: how many chunks to sample.
        max_bytes: the longest chunk, in bytes.
        min_bytes: chunks of this many bytes or fewer are dropped.
        seed: names the sample.
        out: the file that the set will be written to. In folders it is passed over, or a second
            build would sample what the first has written.

    Raises:
        OSError: if an input cannot be read.
        TextSetError: if a file named in `inputs` is not UTF-8, or no chunk is long enough.
        ValueError: if the sizes make no sense, or `out` is named in `inputs`.
        TypeError: if `inputs` is a single path.
    """
    if isinstance(inputs, str | os.PathLike):  # its characters are paths, and / is all there is
        raise TypeError(f"inputs must be several paths, got {inputs!r}; wrap it in a list")
    skipped: list[str] = []
    sources = _documents(inputs, skipped, None if out is None else os.path.realpath(out))
    texts, documents, chunks = sample_chunks(
        sources, n=n, max_bytes=max_bytes, min_bytes=min_bytes, seed=seed
    )
    return texts, BuildReport(documents=documents, chunks=chunks, skipped_files=tuple(skipped))


def sample_chunks(
    documents: Iterable[tuple[str, str]], *, n: int, max_bytes: int, min_bytes: int, seed: int
) -> tuple[TextSet, int, int]:
    """As `build_texts`, from documents (name, text) at hand.

    Returns: the set, how many documents there were, and how many chunks were long enough.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 0 <= min_bytes < max_bytes or max_bytes < 4:
        raise ValueError(
            f"min_bytes must be below max_bytes, and max_bytes at least 4 (one character), "
            f"got {min_bytes} and {max_bytes}"
        )
    counts = {"documents": 0, "chunks": 0}

    def ranked() -> Iterator[tuple[bytes, int, int, str, str, str]]:
        for document, (name, text) in enumerate(documents):
            counts["documents"] += 1
            for part, chunk in enumerate(_chunks(text, max_bytes)):
                if len(chunk) > min_bytes:
                    counts["chunks"] += 1
                    id_ = f"{name}:{part}"
                    rank = hashlib.sha256(f"{seed}:{id_}".encode()).digest()
                    yield rank, document, part, id_, chunk.decode(), name

    sample = sorted(heapq.nsmallest(n, ranked()), key=lambda row: row[1:3])
    if not sample:
        raise TextSetError(
            f"inputs must hold a chunk longer than {min_bytes} bytes, got none in "
            f"{counts['documents']} documents; lower min_bytes or add text"
        )
    texts = TextSet.from_texts(
        (row[4] for row in sample), (row[3] for row in sample), (row[5] for row in sample)
    )
    return texts, counts["documents"], counts["chunks"]


def _documents(
    inputs: Sequence[str | os.PathLike[str]], skipped: list[str], out: str | None
) -> Iterator[tuple[str, str]]:
    paths = [Path(given) for given in inputs]
    for path in paths:
        if out == os.path.realpath(path):
            raise ValueError(
                f"inputs must not name the file that the set is written to, got {path}; write to "
                "another one"
            )
    own_names = [path.resolve().name if path.is_dir() else path.name for path in paths]
    for path, own_name in zip(paths, own_names, strict=True):
        root = own_name if own_names.count(own_name) == 1 else path.as_posix()
        if not path.is_dir():
            yield from _file_documents(path, as_utf8(root))
            continue
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in inside.parts):
                if out == os.path.realpath(file):
                    continue
                name = as_utf8(f"{root}/{inside.as_posix()}")
                try:
                    found = list(_file_documents(file, name))  # all of a file or nothing
                except TextSetError:
                    skipped.append(name)
                else:
                    yield from found


def _file_documents(path: Path, name: str) -> Iterator[tuple[str, str]]:
    if path.suffix == ".jsonl":
        for number, row in _read_jsonl(path):
            yield f"{name}:{number}", row["text"]
        return
    text = _decode(path.read_bytes(), path)
    if "\0" in text:
        raise TextSetError(f"{path} must be a text file, got a NUL character in it")
    yield name, text


def _chunks(text: str, max_bytes: int) -> Iterator[bytes]:
    data = text.encode()
    start = 0
    while start < len(data):
        end = min(start + max_bytes, len(data))
        # A continuation byte is 0b10xxxxxx: step back to the start of its character.
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        yield data[start:end]
        start = end


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(path.read_bytes().split(b"\n")):
        if not line.strip():
            continue
        where = f"{path}, line {number + 1}"
        try:
            row = json.loads(_decode(line, where))
        except (ValueError, RecursionError) as error:
            raise TextSetError(f"{where} must be a JSON object, got {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise TextSetError(f'{where} must be an object with a string "text", got {line[:60]!r}')
        _encode(row["text"], where)
        yield number, row


def _field(row: dict[str, str], name: str, otherwise: str) -> str:
    value = row.get(name)
    return otherwise if value is None else str(value)


def _decode(data: bytes, where: str | Path) -> str:
    try:
        return data.decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise TextSetError(
            f"{where} must be UTF-8, got byte 0x{found:02x} at offset {error.start}"
        ) from None


def _encode(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextSetError(
            f"{where!r} must be valid Unicode, got a lone surrogate at character {error.start}"
        ) from None


def _refuse_repeated(ids: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for row, id_ in enumerate(ids):
        if id_ in first:
            raise TextSetError(f"ids must be unique, got {id_!r} for texts {first[id_]} and {row}")
        first[id_] = row
