"""The demo's text: prose and code that every Python installation carries, split in two.

    language reference (pydoc_data.topics) ──▶ prose ┐
    docstrings of the standard library ──────▶ prose ├─▶ by document: evaluation | training
    sources of the standard library ─────────▶ code  ┘

The sides are chosen by a hash of the document's name, so they depend neither on the order in which
files are listed nor on which other files there are. The language reference repeats whole sections
in several topics, and modules copy from one another; so a paragraph is kept only where it is first
seen, evaluation before training: no paragraph that is scored was trained on.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import TextSetError
from .texts import TextSet, sample_chunks

Kind = Literal["prose", "code"]

# Tests and tables are not text of the kinds wanted (`encodings` is 1.4 MB of character maps); the
# topics are read by themselves; and what users installed must not change the corpora.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
_SHORTEST_DOCSTRING = 200  # characters; shorter ones are labels more than prose
_SHORTEST_DOCUMENT_BYTES = 512
_EVALUATION_SHARE = 0.25  # of the documents, about
# Each is cut after the paragraph that reaches this, so that many are scored rather than all of a
# few, and about as much of one kind as of the other.
_EVALUATION_DOCUMENT_BYTES: dict[Kind, int] = {"prose": 8192, "code": 3072}
_TRAINING_DOCUMENT_BYTES = 24_576  # so that no one module outweighs the rest
# A paragraph shorter than this ("else:", "Example:") may stand in both sides.
_SHORTEST_UNIQUE_PARAGRAPH = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document: a topic, the docstrings of a module, or a module's source."""

    name: str
    kind: Kind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpora:
    """Two sets of documents that share none, nor a paragraph; each is sorted by name."""

    evaluation: tuple[Document, ...]
    training: tuple[Document, ...]

    def evaluation_texts(self, count: int) -> tuple[TextSet, int]:
        """Texts of up to 1,024 bytes, as the papers have them, and of how many documents they are.

        Always the same ones; fewer than `count` if there are not so many.
        """
        sample, documents, _ = sample_chunks(
            ((document.name, document.text) for document in self.evaluation),
            n=count,
            max_bytes=1024,
            min_bytes=256,
            seed=42,
        )
        return sample, documents


def name_fraction(name: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on the name alone, the same on every machine."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def installed_corpora() -> Corpora:
    """The corpora of this Python installation.

    A module's docstrings and its source are always on the same side.

    Raises:
        TextSetError: if the installation comes without its topics or sources.
    """
    evaluation: list[tuple[str, Kind, str]] = []
    training: list[tuple[str, Kind, str]] = []
    for source, kind, text in _documents():
        side = evaluation if name_fraction(source) < _EVALUATION_SHARE else training
        side.append((source, kind, text))
    seen: set[str] = set()
    return Corpora(
        evaluation=_first_occurrences(evaluation, _EVALUATION_DOCUMENT_BYTES, seen),
        training=_first_occurrences(
            training, dict.fromkeys(("prose", "code"), _TRAINING_DOCUMENT_BYTES), seen
        ),
    )


def _first_occurrences(
    documents: list[tuple[str, Kind, str]], document_bytes: dict[Kind, int], seen: set[str]
) -> tuple[Document, ...]:
    """Documents cut to size and without the paragraphs in `seen`, to which theirs are added."""
    # Prose goes first: a docstring that its own source repeats counts as prose.
    ordered = sorted(documents, key=lambda document: (document[1] == "code", document[0]))
    kept = []
    for source, kind, text in ordered:
        paragraphs: list[str] = []
        size_bytes = 0
        for paragraph in text.split("\n\n"):
            if size_bytes >= document_bytes[kind]:
                break
            fingerprint = " ".join(paragraph.split())
            if fingerprint in seen:
                continue
            if len(fingerprint) >= _SHORTEST_UNIQUE_PARAGRAPH:
                seen.add(fingerprint)
            paragraphs.append(paragraph.rstrip())
            size_bytes += len(paragraph.encode()) + 2
        if size_bytes >= _SHORTEST_DOCUMENT_BYTES:
            joined = "\n\n".join(paragraphs).strip("\n") + "\n"
            kept.append(Document(name=f"{kind}:{source}", kind=kind, text=joined))
    return tuple(sorted(kept, key=lambda document: document.name))


def _documents() -> list[tuple[str, Kind, str]]:
    """Every (source name, kind, whole text) of the installation."""
    sources = _standard_library()
    documents: list[tuple[str, Kind, str]] = [(name, "code", text) for name, text in sources]
    documents.extend((name, "prose", text) for name, text in _topics())
    documents.extend(
        (name, "prose", docstrings) for name, text in sources if (docstrings := _docstrings(text))
    )
    return documents


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextSetError(
            "the Python installation must have pydoc_data.topics, got none; "
            "install the whole standard library, or run the demo with another Python"
        ) from error
    return [(f"topics/{name}", text) for name, text in topics.items()]


def _standard_library() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for folder, subfolders, files in os.walk(root):
        # Pruned while walking: a virtual environment's site-packages can hold 100,000 files.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for file in files:
            # `_sysconfigdata_*` is generated, and differs between builds of one release.
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = Path(folder, file)
                try:
                    sources.append((path.relative_to(root).as_posix(), path.read_text("utf-8")))
                except UnicodeDecodeError:  # a source in a declared older encoding
                    continue
    if len(sources) < 50:
        raise TextSetError(
            f"the standard library must be installed as .py sources, got {len(sources)} in {root}; "
            "run the demo with a Python that has them"
        )
    return sources


def _docstrings(source: str) -> str:
    """The longer docstrings of one module, in order, with a blank line between."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates, and sources of another Python
        return ""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None and len(docstring) >= _SHORTEST_DOCSTRING:
                found.append(docstring)
    return "\n\n".join(found)
