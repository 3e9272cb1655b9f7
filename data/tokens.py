"""Images as codes: the member `codes` of a token sample, and what training takes from it.

`KEY.codes` is one line of JSON, {"tokenizer": FINGERPRINT, "codes": VOCABULARY, "shape": [views, rows, columns]},
followed by the codes: little-endian, unsigned, in the smallest number of whole bytes that holds every code of the
vocabulary. So each sample identifies its tokenizer.
"""

import functools
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.config import MOST_CODES
from data.errors import DataError, ImageError
from data.samples import CODES, Sample, Shard, WindowLimit, is_image
from data.transforms import Size

MOST_HEADER_BYTES = 4096
NAMED_GRIDS = 8  # in an error message


class TokenSpec(NamedTuple):
    """What a reader expects. tokenizer: its fingerprint or None for any; vocabulary: codes; grids: (rows, columns) that
    a sample may have."""

    tokenizer: str | None
    vocabulary: int
    grids: tuple[tuple[int, int], ...]


class TokenHeader(NamedTuple):
    """What a sample states about its codes. views: crops of the image, each with a grid of (rows, columns)."""

    tokenizer: str
    vocabulary: int
    views: int
    grid: tuple[int, int]


def code_bytes(vocabulary: int) -> int:
    """Bytes of each code: 1 up to 256 codes, 2 up to 65,536, 3 up to 2^24."""
    return 1 if vocabulary <= 1 << 8 else 2 if vocabulary <= 1 << 16 else 3


def pack_codes(index_vhw: np.ndarray, tokenizer: str, vocabulary: int) -> bytes:
    """Codes (views, rows, columns) of a tokenizer with this fingerprint -> the content of a member `codes`.

    Raises DataError for codes outside the vocabulary, and for a vocabulary of more than 2^24 codes."""
    if not 1 <= vocabulary <= MOST_CODES:
        raise DataError(f"{vocabulary:,} codes cannot be packed: at most {MOST_CODES:,}")
    if index_vhw.ndim != 3 or not index_vhw.size:
        raise DataError(f"codes of shape {index_vhw.shape} cannot be packed: (views, rows, columns), none of them 0")
    if not 0 <= index_vhw.min() <= index_vhw.max() < vocabulary:
        raise DataError(f"codes from {index_vhw.min()} to {index_vhw.max()} do not lie in [0, {vocabulary:,})")
    header = {"tokenizer": tokenizer, "codes": vocabulary, "shape": index_vhw.shape}
    bytes_nb = np.ascontiguousarray(index_vhw, "<u4").reshape(-1, 1).view(np.uint8)
    line = json.dumps(header, separators=(",", ":")).encode()
    return line + b"\n" + bytes_nb[:, : code_bytes(vocabulary)].tobytes()


def unpack_codes(content: bytes) -> tuple[TokenHeader, np.ndarray]:
    """A member `codes` -> its header and its codes, int32 (views, rows, columns). Raises ImageError for damage."""
    header, start = _opened(content)
    index_n = _codes(content, start, header, header.views * math.prod(header.grid))
    return header, index_n.reshape(header.views, *header.grid)


def grid_of_codes(content: bytes) -> tuple[int, int]:
    """Rows and columns by the header of a member `codes`; the codes are not looked at. Raises ImageError."""
    return _opened(content)[0].grid


def _opened(content: bytes) -> tuple[TokenHeader, int]:
    """The header, and where the codes begin. Raises ImageError, also if the length contradicts the header."""
    stop = content.find(b"\n", 0, MOST_HEADER_BYTES)
    if stop < 0:
        raise ImageError("its codes have no header")
    header = _header(content[:stop])
    expected = header.views * math.prod(header.grid) * code_bytes(header.vocabulary)
    if len(content) - stop - 1 != expected:
        raise ImageError(f"its codes have {len(content) - stop - 1:,} bytes and not {expected:,}")
    return header, stop + 1


@functools.lru_cache(maxsize=256)  # the samples of a data set have the same line
def _header(line: bytes) -> TokenHeader:
    try:
        header = json.loads(line)
        tokenizer, vocabulary, (views, rows, columns) = header["tokenizer"], header["codes"], header["shape"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ImageError("the header of its codes is damaged") from error
    numbers = vocabulary, views, rows, columns
    if type(tokenizer) is not str or any(type(n) is not int or n < 1 for n in numbers) or vocabulary > MOST_CODES:
        raise ImageError("the header of its codes is damaged")
    return TokenHeader(tokenizer, vocabulary, views, (rows, columns))


def _codes(content: bytes, start: int, header: TokenHeader, count: int) -> np.ndarray:
    """`count` codes starting at byte `start`, int32. Raises ImageError for a code outside the vocabulary."""
    each = code_bytes(header.vocabulary)
    if each == 3:
        bytes_n4 = np.zeros((count, 4), np.uint8)
        bytes_n4[:, :3] = np.frombuffer(content, np.uint8, 3 * count, start).reshape(count, 3)
        index_n = bytes_n4.view("<i4")[:, 0]
    else:
        index_n = np.frombuffer(content, f"<u{each}", count, start).astype(np.int32)
    if header.vocabulary < 256**each and (most := index_n.max()) >= header.vocabulary:
        raise ImageError(f"code {most:,} lies outside the {header.vocabulary:,} of its tokenizer")
    return index_n


@dataclass(frozen=True)
class TokenTransform:
    """A member `codes` -> int32 (rows * columns,) of one of its views; the view is drawn from the given generator.

    spec: with one grid."""

    spec: TokenSpec

    @functools.cached_property
    def size(self) -> Size:
        """Rows and columns."""
        (grid,) = self.spec.grids
        return Size(*grid)

    @functools.cached_property
    def shape(self) -> tuple[int]:
        """Shape of the result."""
        return (math.prod(self.size),)

    dtype = np.dtype(np.int32)

    def __call__(
        self,
        content: bytes,
        rng: random.Random,
        check_size: Callable[[int, int], None] = lambda width, height: None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """int32 (rows * columns,), written into `out` if given. check_size: unused, as tokens have no size in pixels.

        Raises ImageError for damaged codes, DataError for codes of another tokenizer, vocabulary or grid."""
        header, start = _opened(content)
        check_tokens(header, self.spec, "the sample")
        (count,) = self.shape
        view = int(rng.random() * header.views)
        index_t = _codes(content, start + view * count * code_bytes(header.vocabulary), header, count)
        if out is None:
            return index_t
        out[:] = index_t
        return out


def check_tokens(header: TokenHeader, spec: TokenSpec, name: str) -> None:
    """Raises DataError unless the tokens are what the reader expects. name: what messages call their source."""
    if spec.tokenizer not in (None, header.tokenizer):
        raise DataError(
            f"{name} holds tokens of tokenizer {header.tokenizer}, and this run expects those of {spec.tokenizer}: "
            "write token shards with `ibq tokenize` and the run's own tokenizer"
        )
    if header.vocabulary != spec.vocabulary or header.grid not in spec.grids:
        key = "model.grid" if len(spec.grids) == 1 else "model.grids"
        raise DataError(
            f"{name} holds {_described(header.vocabulary, [header.grid])} an image, and this run expects "
            f"{_described(spec.vocabulary, spec.grids)}: set model.vocabulary and {key} to what is there, or write "
            "other token shards with `ibq tokenize`"
        )


def _described(vocabulary: int, grids: Iterable[tuple[int, int]]) -> str:
    return f"{' or '.join(f'{rows} x {columns}' for rows, columns in grids)} of {vocabulary:,} codes"


def grid_number(grids: Sequence[tuple[int, int]], grids_n2: np.ndarray) -> np.ndarray:
    """The number in `grids` of each of many grids; -1 for one that is not among them."""
    number_n = np.full(len(grids_n2), -1)
    for number, grid in enumerate(grids):
        number_n[(grids_n2 == grid).all(axis=1)] = number
    return number_n


def check_grids(grids_n2: np.ndarray, grids: Sequence[tuple[int, int]], name: str) -> None:
    """Raises DataError where a sample has a grid that the reader does not expect. grids_n2: rows and columns of each
    sample, 0 where they are unknown. name: what messages call the source."""
    known_n = grids_n2.min(axis=1) > 0
    if (grid_number(grids, grids_n2)[known_n] >= 0).all():
        return
    found, count_k = np.unique(grids_n2[known_n], axis=0, return_counts=True)
    counts = sorted(zip(count_k.tolist(), map(Size._make, found.tolist()), strict=True), reverse=True)
    named = [f"{size} ({count:,} sample{'s' * (count != 1)})" for count, size in counts[:NAMED_GRIDS]]
    named += [f"{len(counts) - NAMED_GRIDS:,} other grids"] if len(counts) > NAMED_GRIDS else []
    # Of several grids that are expected, other sources may need those that this one lacks.
    needed = sorted({size for _, size in counts} | (set(grids) if len(grids) > 1 else set()))
    fix = f"set 'model.grids=[{','.join(f'{rows}x{columns}' for rows, columns in needed)}]' (model.grid is one of them)"
    if len(needed) == 1:
        fix = f"set 'model.grid=[{needed[0].height},{needed[0].width}]'"
    raise DataError(
        f"{name} holds the grid{'s' * (len(counts) > 1)} {', '.join(named)}, and this run expects "
        f"{', '.join(f'{rows}x{columns}' for rows, columns in grids)}: {f'{fix}, or ' * (len(counts) <= NAMED_GRIDS)}"
        "write other token shards with `ibq tokenize`"
    )


def first_header(shards: Iterable[Shard], name: str) -> TokenHeader:
    """The header of the first readable sample. name: what messages call the source of the shards.

    Raises DataError for images, and if no sample can be read."""
    damage = "there is none"
    for shard in shards:
        for window in shard.windows(0, None, WindowLimit(1, 1)):
            try:
                return unpack_codes(_codes_of(window.read(0), name))[0]
            except ImageError as error:
                damage = str(error)
    raise DataError(f"{name}: no token sample can be read ({damage}); `ibq shards check` finds damaged shards")


def _codes_of(sample: Sample, name: str) -> bytes:
    if CODES not in sample.members and any(map(is_image, sample.members)):
        fix = "write token shards with `ibq tokenize`, or train with data.content=images"
        raise DataError(f"{name} holds images, not tokens: {fix}")
    return sample.image([CODES])
