"""From texts to batches: tokens under a named convention, the ladder of shapes, the plan.

A batch's shape comes from a small fixed ladder, and the plan from the whole text set. So a text
always runs in the same shape, whatever else is scored, in whichever order, and after any restart:
matrix products of one shape give a row the same bits wherever in the batch it stands.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Int32, Int64

from . import cache
from .texts import TextSet

Convention = Literal["paper", "always-bos", "lm-eval"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)
# Token ids that the caller made: scored as they are, tokens 2..n.
GIVEN_TOKENS = "token-ids"

_LM_EVAL_MAX_LENGTH = 2048  # lm-evaluation-harness 0.4.13, where neither model nor tokenizer says
# A tokenizer is told how to truncate, then encodes: in between no other thread may tell it.
_IN_TURN = threading.RLock()


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedTexts:
    """Token ids of N texts in one array; all but the first token of each text are scored.

    Attributes:
        ids: token ids of all texts, one after the other.
        offsets: text i is `ids[offsets[i]:offsets[i + 1]]`.
        truncated: whether a text had to be cut.
        max_length: the most tokens that the model takes, None if it does not say.
    """

    ids: Int32[np.ndarray, " M"]
    offsets: Int64[np.ndarray, " N1"]
    truncated: Bool[np.ndarray, " N"]
    max_length: int | None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Int32[np.ndarray, " n"]:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def digest(self) -> str:
        """sha256 (hex) over ids and offsets."""
        digest = hashlib.sha256(self.offsets.tobytes())
        digest.update(self.ids.tobytes())
        return digest.hexdigest()

    @property
    def token_counts(self) -> Int64[np.ndarray, " N"]:
        """(N,) scored tokens of each text."""
        counts: Int64[np.ndarray, " N"] = np.maximum(np.diff(self.offsets) - 1, 0)
        return counts

    @property
    def input_lengths(self) -> Int64[np.ndarray, " N"]:
        """(N,) tokens that are fed; lm-eval's window has one more than the model takes."""
        lengths = np.diff(self.offsets)
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)


def tokenize(
    texts: TextSet, tokenizer: Any, convention: str, max_length: int | None
) -> TokenizedTexts:
    """Tokenise a text set under a convention; cached on disk by tokenizer and text set.

    - `paper` (arXiv 2502.16173): the tokenizer's own special tokens, cut at the right.
    - `always-bos`: one BOS (else EOS) token before the text, cut at the right.
    - `lm-eval`: as lm-evaluation-harness 0.4.13 scores `loglikelihood("", text)`: one BOS (else
      EOS) before the text, cut at the left to the last `max_length + 1` tokens.

    A text that begins with the BOS string keeps that one BOS token under every convention.

    Args:
        texts: N texts.
        tokenizer: a transformers tokenizer.
        convention: one of `CONVENTIONS`.
        max_length: the most tokens that the model takes; None for no limit.

    Raises:
        ValueError: for an unknown convention, or if a BOS is asked for and there is neither BOS
            nor EOS.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    own = convention == "paper"
    encoded = _encode_cached(texts, tokenizer, own_special_tokens=own)
    if own:
        prefix = added_bos(tokenizer)
        # A text that begins with the BOS string would otherwise begin with two.
        encoded = [ids[1:] if _begins_twice(ids, prefix) else ids for ids in encoded]
    else:
        prefix = tokenizer.bos_token_id
        prefix = tokenizer.eos_token_id if prefix is None else prefix
        if prefix is None:
            raise ValueError(
                f"tokenizer must have a BOS or EOS token for convention {convention!r}, got "
                "neither; use convention 'paper'"
            )
        first = np.array([prefix], dtype=np.int32)
        encoded = [
            ids if len(ids) and ids[0] == prefix else np.concatenate((first, ids))
            for ids in encoded
        ]
    if max_length is None:
        return _pack(encoded, np.zeros(len(encoded), dtype=bool), None)
    window = max_length + 1 if convention == "lm-eval" else max_length
    truncated = np.array([len(ids) > window for ids in encoded])
    for row in np.flatnonzero(truncated):
        if convention == "lm-eval":
            encoded[row] = encoded[row][-window:]
        elif own:
            cut = _encode_truncated(tokenizer, texts.texts[row], window)
            if _begins_twice(cut, prefix):
                cut = _encode_truncated(tokenizer, texts.texts[row], window + 1)[1:]
            encoded[row] = cut
        else:
            encoded[row] = encoded[row][:window]
    return _pack(encoded, truncated, max_length)


def added_bos(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before a text by itself, if any.

    It need not be the one that the tokenizer names as its BOS token.
    """
    with_special = _token_ids(tokenizer, "a")
    without = _token_ids(tokenizer, "a", add_special_tokens=False)
    return None if with_special[:1] == without[:1] else int(with_special[0])


def given_tokens(token_ids: Sequence[Any], max_length: int | None) -> TokenizedTexts:
    """Token ids (lists or 1-D arrays) that are scored as they are, cut right to `max_length`.

    Raises:
        ValueError: if an id is negative or not a whole number.
    """
    encoded = []
    for row, ids in enumerate(token_ids):
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise ValueError(f"token_ids[{row}] must be a list of whole numbers, got {ids!r:.60}")
        if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
            raise ValueError(
                f"token_ids[{row}] must be in [0, 2**31), got values from {array.min()} to "
                f"{array.max()}"
            )
        encoded.append(array.astype(np.int32))
    limit = max_length if max_length is not None else np.iinfo(np.int64).max
    truncated = np.array([len(ids) > limit for ids in encoded], dtype=bool)
    return _pack([ids[:max_length] for ids in encoded], truncated, max_length)


def model_max_length(config: Any, tokenizer: Any, convention: str) -> int | None:
    """The most tokens that a model takes, as lm-evaluation-harness finds it; None for no limit.

    Looked up in the text part of the config, then in the config, then in the tokenizer.
    """
    for part in (getattr(config, "text_config", None), config):
        for name in ("n_positions", "max_position_embeddings", "n_ctx"):
            value = getattr(part, name, None)
            if isinstance(value, int) and value > 0:
                return value
    limit = getattr(tokenizer, "model_max_length", None)
    if limit is not None and limit < 10**12:  # transformers writes "unknown" as 1e30
        return int(limit)
    return _LM_EVAL_MAX_LENGTH if convention == "lm-eval" else None


def ladder_length(length: int, limits: Sequence[int] = ()) -> int:
    """The length a text of `length` tokens is padded to.

    Multiples of 16 to 512, of 64 to 2,048, of 256 above: at most 1/8 more from 128 tokens on.
    `limits` are lengths that padding must not cross: the most tokens that a model takes, and the
    length at which it changes its position embeddings.
    """
    step = 16 if length <= 512 else 64 if length <= 2048 else 256
    rung = -(-max(length, 1) // step) * step
    return min([rung, *(limit for limit in limits if limit >= length)])


def ladder_rows(length: int, token_budget: int) -> int:
    """How many texts of a ladder length go into one batch: a power of two within the budget."""
    return 1 << max(token_budget // length, 1).bit_length() - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that run together; `shape` is theirs however few they are."""

    shape: tuple[int, int]
    texts: tuple[int, ...]


def plan_batches(
    tokens: TokenizedTexts,
    token_budget: int,
    *,
    rows_per_batch: int | None = None,
    limits: Sequence[int] = (),
) -> list[Batch]:
    """Cut a text set into batches of ladder shapes, the longest first.

    Args:
        tokens: N tokenised texts; those without a scored token are left out.
        token_budget: the most tokens (padding included) in a batch, if one text alone fits.
        rows_per_batch: overrides the number of rows.
        limits: lengths that padding must not cross, besides the model's maximum.
    """
    lengths = tokens.input_lengths
    if tokens.max_length is not None:
        limits = [*limits, tokens.max_length]
    by_length: dict[int, list[int]] = {}
    for row in np.flatnonzero(tokens.token_counts):
        rung = ladder_length(int(lengths[row]), limits)
        by_length.setdefault(rung, []).append(int(row))
    batches: list[Batch] = []
    for length in sorted(by_length, reverse=True):
        texts = by_length[length]
        rows = rows_per_batch or ladder_rows(length, token_budget)
        batches.extend(
            Batch((rows, length), tuple(texts[start : start + rows]))
            for start in range(0, len(texts), rows)
        )
    return batches


def _pack(
    encoded: Sequence[Int32[np.ndarray, " _"]],
    truncated: Bool[np.ndarray, " N"],
    max_length: int | None,
) -> TokenizedTexts:
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in encoded], out=offsets[1:])
    ids = np.concatenate(encoded) if encoded else np.empty(0)
    return TokenizedTexts(ids.astype(np.int32), offsets, truncated, max_length)


def _encode_cached(
    texts: TextSet, tokenizer: Any, *, own_special_tokens: bool
) -> list[Int32[np.ndarray, " _"]]:
    fingerprint = cache.tokenizer_fingerprint(tokenizer)
    key = None
    if fingerprint is not None:
        key = cache.key("tokens", fingerprint, texts.digest, str(own_special_tokens))
        arrays = cache.load_arrays(key, portable=True)
        if arrays is not None and len(arrays.get("offsets", ())) == len(texts) + 1:
            return np.split(arrays["ids"], arrays["offsets"][1:-1])
    encoded = [
        np.array(ids, dtype=np.int32)
        for start in range(0, len(texts), 1024)
        for ids in _token_ids(
            tokenizer,
            list(texts.texts[start : start + 1024]),
            add_special_tokens=own_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
    ]
    if key is not None:
        packed = _pack(encoded, np.zeros(len(encoded), dtype=bool), None)
        cache.save_arrays(key, portable=True, ids=packed.ids, offsets=packed.offsets)
    return encoded


def _begins_twice(ids: Int32[np.ndarray, " n"], token: int | None) -> bool:
    first: list[int] = ids[:2].tolist()
    return first == [token, token]


def _encode_truncated(tokenizer: Any, text: str, length: int) -> Int32[np.ndarray, " n"]:
    """Cut by the tokenizer itself, which keeps the special tokens that it puts at the end."""
    with _IN_TURN:
        side = tokenizer.truncation_side
        tokenizer.truncation_side = "right"
        try:
            ids = _token_ids(tokenizer, text, truncation=True, max_length=length)
        finally:
            tokenizer.truncation_side = side
    return np.array(ids, dtype=np.int32)


def _token_ids(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    with _IN_TURN:
        return tokenizer(text, verbose=False, **options)["input_ids"]
