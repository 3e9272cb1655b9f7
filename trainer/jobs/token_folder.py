"""The output folder of `ibq tokenize`: token shards, the settings that made them, skipped images, and an index."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data.buckets import by_area
from data.classes import CLASSES_NAME, classes_beside, merged_classes
from data.folder_reader import find_images
from data.index import INDEX_NAME, Index, write_index
from data.parallel import cores
from data.prep.check import check_shards
from data.shards import TOKENS_RECORD, TOKENS_RECORD_KEYS, is_finished
from data.transforms import Size
from data.unfinished import remove_unfinished
from trainer import TrainerError
from trainer.files import write_json, write_text, writing
from trainer.jobs.setup import SHARED_DISK, check_same_settings, read_record

SKIPPED = "skipped.jsonl"


def shard_path(out: Path, number: int) -> Path:
    return out / f"tokens-{number:06d}.tar"


def write_skipped(out: Path, number: int, records: list[dict]) -> None:
    """Replaces what is recorded of the images that one shard left out."""
    lines = (json.dumps({"shard": number, **record}) + "\n" for record in records)
    write_text(out / f".skipped-{number:06d}.jsonl", "".join(lines))  # an empty one, too, replaces former lines


def check_is_folder(out: Path) -> None:
    """Raises TrainerError where the output is a file."""
    if out.exists() and not out.is_dir():
        raise TrainerError(f"{out} is a file: name a folder with --out")


def begin_folder(
    out: Path, settings: dict, state: str, shard_count: int, classes: dict[str, int] | None = None
) -> list[int]:
    """Begins the folder, which exists and is locked, or continues that of a job with the same settings; returns the
    numbers of the missing shards. state: a hash that changes with the input's content. classes: the number of each
    class, written to classes.json.

    Raises TrainerError, and DataError if the shards there number the classes otherwise."""
    with writing(out):
        path = out / TOKENS_RECORD
        not_ours = f"{path} is damaged, or `ibq tokenize` did not write it: name another folder with --out"
        former = read_record(path, TOKENS_RECORD_KEYS, TrainerError(not_ours))
        if former is None and any(out.glob("*.tar")):
            raise TrainerError(f"{out} holds tars that `ibq tokenize` did not write: name another folder with --out")
        if any(out.glob("tokens-*.tar")):
            _check_same_classes(out, former, settings)
            check_same_settings(out, "tokens", former, settings, _how_to_repeat)
            _check_same_state(out, former.get("state"), state)
            classes = merged_classes([*classes_beside([f"{out}/"]), ("--images", classes or {})])
        elif former is not None:  # without shards there is nothing to continue
            for left in (out / SKIPPED, *out.glob(".skipped-*.jsonl"), *([] if classes else [out / CLASSES_NAME])):
                left.unlink(missing_ok=True)
        else:
            _check_not_in_use(out)
        remove_unfinished(out, "*")
        missing = [number for number in range(shard_count) if not shard_path(out, number).exists()]
        # First: the next job takes classes without it for those of another origin. Readers refuse what is not finished.
        finished = not missing and is_finished(out, former)
        write_json(path, {**settings, "state": state, "finished": finished})
        if classes:
            write_json(out / CLASSES_NAME, classes)
        if missing:  # their new content may differ from the old one, which the index describes
            (out / INDEX_NAME).unlink(missing_ok=True)
    return missing


def _check_not_in_use(out: Path) -> None:
    """Readers would take tokens there for the only content, and its classes for those of the tokens."""
    if find_images(out):
        raise TrainerError(f"{out} holds images: name another folder with --out")
    if (out / CLASSES_NAME).exists():
        raise TrainerError(f"{out} holds a {CLASSES_NAME} already: remove it, or name another folder with --out")


def _check_same_classes(out: Path, former: dict, current: dict) -> None:
    before, now = former.get("classes"), current.get("classes")  # hashes of the numbers, which tell the user nothing
    if before == now:
        return
    if before is None:
        what = "made without --classes: leave it out"
    else:
        what = f"whose classes were numbered by another file: give --classes {out / CLASSES_NAME}"
    raise TrainerError(f"{out} holds tokens {what} to continue, or name another path with --out")


def _check_same_state(out: Path, before: str | None, now: str) -> None:
    """Folders of earlier versions have no record of it."""
    if before not in (None, now):
        raise TrainerError(
            f"{out} holds tokens of --images before they, or the .cls, .txt or .json files beside them, were changed: "
            f"remove {out}/tokens-*.tar to make all again, or name another path with --out (a copy of the images "
            "counts as unchanged if it has their times, as by cp -p)"
        )


def check_unchanged(out: Path, before: str, now: str) -> None:
    """Raises TrainerError where the input's state is no longer the one at the start of the job."""
    if before != now:
        raise TrainerError(
            f"the --images were changed while they were read, so that {out} may hold tokens of both: remove "
            f"{out}/tokens-*.tar and run the command again when nothing writes there"
        )


def _how_to_repeat(name: str, former: dict) -> str:
    if name in ("views", "source", "samples_per_shard"):
        return f"--{name.replace('_', '-')} {former.get(name)}"
    if name in ("grid", "image_size", "sizes", "grids"):
        return f"--size {','.join(former['sizes']) if 'sizes' in former else former.get('image_size')}"
    if name == "max_enlargement":
        return f"--max-enlargement {former.get(name)}"
    return "the same --images" if name == "input" else "the same tokenizer and --weights"


class FinishedFolder(NamedTuple):
    """skipped: images left out, each with the reason, those of former jobs included. grids: ROWSxCOLUMNS -> samples, by
    ascending number of codes."""

    shards: int
    samples: int
    skipped: list[str]
    grids: dict[str, int]


def finish_folder(out: Path, images: str, expected: set[int], advice: str = "") -> FinishedFolder:
    """Merges the lists of skipped images, checks the shards, against their index if there is one, or writes it, and
    records that the folder is whole. expected: numbers of the shards that were there or were written. advice: ends the
    message where no image can be used. Raises TrainerError or DataError."""
    if gone := sorted(number for number in expected if not shard_path(out, number).exists()):
        raise TrainerError(
            f"{len(gone):,} of {len(expected):,} shards that were written are not there, first "
            f"{shard_path(out, gone[0])}: {SHARED_DISK}"
        )
    with writing(out):
        skipped = _merge_skipped(out)
    urls = sorted(str(path) for path in out.glob("tokens-*.tar"))
    if not urls:
        raise TrainerError(
            f"none of the {len(skipped):,} images in {images} can be used, the first: {skipped[0]}{advice}"
        )
    path = out / INDEX_NAME
    index = Index(path) if path.exists() else None
    found = list(check_shards(urls, index=index, jobs=min(cores(), len(urls))))
    if bad := next((checked for checked in found if checked.problems), None):
        raise TrainerError(f"{bad.name} is damaged ({bad.problems[0].message}): remove it and run the command again")
    if index is None:
        write_index(path, urls, [checked.table for checked in found], [checked.sha256 for checked in found])
    with writing(out):
        record = json.loads((out / TOKENS_RECORD).read_bytes())
        write_json(out / TOKENS_RECORD, {**record, "finished": True})
    grids = Counter(Size(*grid) for checked in found for grid in checked.table.sizes_n2.tolist())
    named = {str(grid): grids[grid] for grid in by_area(grids)}
    return FinishedFolder(len(urls), sum(checked.samples for checked in found), skipped, named)


def _merge_skipped(out: Path) -> list[str]:
    """Merges the lists of single shards into skipped.jsonl, in order of shards; those of shards that this job did not
    write are kept."""
    lines: dict[int, list[str]] = {}
    merged = out / SKIPPED
    for line in merged.read_text(encoding="utf-8").splitlines() if merged.exists() else []:
        lines.setdefault(json.loads(line)["shard"], []).append(line)
    parts = sorted(out.glob(".skipped-*.jsonl"))
    for part in parts:
        lines[int(part.stem.rpartition("-")[2])] = part.read_text(encoding="utf-8").splitlines()
    ordered = [line for _, of_shard in sorted(lines.items()) for line in of_shard]
    if ordered:
        write_text(merged, "".join(f"{line}\n" for line in ordered))
    else:
        merged.unlink(missing_ok=True)
    for part in parts:
        part.unlink()
    records = [json.loads(line) for line in ordered]
    return [f"{record['source']}, {record['key']}: {record['reason']}" for record in records]
