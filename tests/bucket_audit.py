"""What every stream of buckets must deliver: of images by their sizes, and of tokens by their grids.

Sources are given as name -> (for each shard: kind -> number of samples, weight). A key ends in -KIND.
"""

from collections import Counter, defaultdict

import numpy as np
import pytest


def mixed_kinds(kinds: dict[str, int], *seed: int) -> list[tuple[int, str]]:
    """(number, kind) of the samples of a shard, in mixed order."""
    of_samples = [kind for kind, count in kinds.items() for _ in range(count)]
    return [(int(n), of_samples[n]) for n in np.random.default_rng(seed).permutation(len(of_samples))]


def audited_epochs(
    batches: list[list[tuple]], state: dict, sources: dict[str, tuple], bucket_of: dict[str, str], most_off: int
) -> int:
    """Asserts that each sample comes once in each epoch of its source and bucket, that sources have their weights, and
    that of a source each sample comes equally often, up to `most_off` samples of a kind. batches: global ones, and the
    state after them; bucket_of: kind -> name. Returns the number of epochs that are complete."""
    delivered = [info for step in batches for info, _ in step]
    epochs = defaultdict(Counter)
    for info in delivered:
        epochs[info.source, info.key.rsplit("-", 1)[1], info.position.epoch][info.key] += 1
    assert all(set(counts.values()) == {1} for counts in epochs.values())
    sizes = Counter()
    for name, (shards, _) in sources.items():
        for kinds in shards:
            sizes.update({(name, kind): count for kind, count in kinds.items()})
    done_epochs = 0
    for (name, kind), count in sizes.items():
        lanes = [places for key, (_, places) in state["lanes"].items() if key.startswith(f"{bucket_of[kind]}/")]
        done = min(places.get(name, (0, 0))[0] for places in lanes)  # epochs that every lane has finished
        assert all(len(epochs[name, kind, epoch]) == count for epoch in range(done)), (name, kind)
        done_epochs += done
    of_source = Counter(info.source for info in delivered)
    of_kind = Counter((info.source, info.key.rsplit("-", 1)[1]) for info in delivered)
    weights = sum(weight for _, weight in sources.values())
    for name, (shards, weight) in sources.items():
        assert of_source[name] / len(delivered) == pytest.approx(weight / weights, abs=0.03)
        passes = of_source[name] / sum(sum(kinds.values()) for kinds in shards)
        for (source, kind), count in sizes.items():
            if source == name:
                assert abs(of_kind[name, kind] - passes * count) <= most_off, (name, kind)
    return done_epochs
