"""The state of a training stream: what it must agree with, how it is merged over ranks and restored.

The state of a lane is the number of images it has delivered and its position in each source. It counts what was
delivered, never what was read ahead.
"""

from collections.abc import Iterable
from typing import NamedTuple

from data.errors import DataError
from data.samples import WindowLimit
from data.sources import Source

Totals = dict[str, dict[str, int]]  # source -> ``delivered``, ``skipped`` or ``filtered/FILTER`` -> number of samples


def stream_identity(
    sources: list[Source], seed: int, lanes: int, limit: WindowLimit, buckets: dict | None = None
) -> dict:
    """What must be unchanged for a state to mean the same images. Weights may change: lanes keep their positions.
    buckets: if there are any, their names as ``buckets`` (or ``grids``), and as ``division`` their samples."""
    return {
        **(buckets or {}),
        "seed": seed,
        "lanes": lanes,
        "shuffle_block": limit.samples,
        "shuffle_bytes": limit.bytes,
        "sources": {source.name: source.identity() for source in sources},
    }


def merge_states(states: list[dict]) -> dict:
    """One state from the latest states of all ranks, which must have taken equally many steps."""
    if not states:
        raise DataError("no data states to merge: give one of each rank")
    first = states[0]
    for state in states[1:]:
        for name in ("stream", "steps", "world_size"):
            if state[name] != first[name]:
                raise DataError(
                    f"data states differ in {name}: {first[name]} and {state[name]}; merge those of the same step"
                )
    lanes = {lane: state_of_lane for state in states for lane, state_of_lane in state["lanes"].items()}
    ranks = sorted({rank for state in states for rank in state["ranks"]})
    totals = add_totals(state["totals"] for state in states)
    lanes = dict(sorted(lanes.items(), key=lambda item: _order_of_lane(item[0])))
    return {**first, "lanes": lanes, "totals": totals, "ranks": ranks}


def _order_of_lane(key: str) -> tuple[str, int]:
    bucket, _, lane = key.rpartition("/")
    return bucket, int(lane)


def add_totals(many: Iterable[Totals]) -> Totals:
    """The sums of the counts."""
    total: Totals = {}
    for totals in many:
        for name, counts in totals.items():
            of_source = total.setdefault(name, {})
            for what, count in counts.items():
                of_source[what] = of_source.get(what, 0) + count
    return total


class Restored(NamedTuple):
    """What a merged state holds. lanes: the state of each lane, by the lane's number, or BUCKET/NUMBER, GRID/NUMBER."""

    steps: int
    lanes: dict[str, list]
    totals: Totals


def restore(state: dict, identity: dict) -> Restored:
    """A merged state, after checking that it belongs to the stream with this identity. Raises DataError."""
    if not {"stream", "steps", "world_size", "lanes", "totals", "ranks"} <= state.keys():
        raise DataError("the checkpoint's data state is damaged or of another version: resume from another checkpoint")
    if state["ranks"] != list(range(state["world_size"])):
        raise DataError(
            f"the data state holds ranks {state['ranks']} of {state['world_size']}: merge all ranks' states first"
        )
    before = state["stream"]
    for name in sorted((identity.keys() | before.keys()) - {"sources", "division"}):
        then, now = before.get(name), identity.get(name)
        if then != now:
            keys = {"buckets": "data.buckets, data.pixels or data.max_aspect", "grids": "model.grids"}.get(name, "it")
            raise DataError(f"cannot resume: {name} was {then} and is now {now}; set {keys} back")
    for bucket, sources in identity.get("division", {}).items():
        then = before["division"].get(bucket, {})
        if changed := [name for name in sources if name in then and differ(then[name], sources[name])]:
            one, back = "bucket", "data.max_enlargement and the filters back, and give the same images"
            if "grids" in identity:
                one, back = "grid", "the filters back, and give the same token shards"
            raise DataError(f"cannot resume: {one} {bucket} had other samples of source {changed[0]}: set {back}")
    for name, value in identity["sources"].items():
        if differ(then := before["sources"].get(name, value), value):
            was, now = ("{shards} shards with {samples} samples".format(**one) for one in (then, value))
            raise DataError(
                f"cannot resume: source {name} was {was} and is now {now}, or other shards of that number; give the "
                "same shards, or rename the changed source (in data.sources) to start it from its beginning"
            )
    return Restored(state["steps"], state["lanes"], state["totals"])


def differ(then: dict, now: dict) -> bool:
    """Whether two identities of a source contradict each other. Either may lack what a later version added, and the
    content of a shard that nobody has scanned."""
    if any(then[key] != now[key] for key in (then.keys() & now.keys()) - {"contents"}):
        return True
    contents = then.get("contents"), now.get("contents")
    if all(isinstance(of_shards, list) for of_shards in contents):
        return any(None not in pair and pair[0] != pair[1] for pair in zip(*contents, strict=True))
    return None not in contents and contents[0] != contents[1]
