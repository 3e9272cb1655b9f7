import pytest
import torch
from model_checks import refused
from safetensors.torch import save

from model_zoo.io.sharded_tensors import ShardedTensors, TensorShard, save_shards, whole_tensor

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).view(5, 7),
    "convolution": torch.arange(2 * 3 * 3 * 3, dtype=torch.float32).view(2, 3, 3, 3) / 7,
    "counts": torch.arange(11) * 2**40,  # beyond what a float32 holds
    "scalar": torch.tensor(0.1),
    "flag": torch.tensor(True),
    "bytes": torch.arange(200, dtype=torch.uint8),
    "half": torch.arange(9, dtype=torch.bfloat16),
}


def write_cut(folder, name, tensor, ends):
    """One file for each stretch up to the next of ``ends``, named so that their order is not that of the stretches."""
    flat = tensor.reshape(-1)
    starts = [0, *ends]
    for number, (start, end) in enumerate(zip(starts, [*ends, len(flat)], strict=True)):
        shard = TensorShard(name, tuple(tensor.shape), start, flat[start:end])
        save_shards(folder / f"part_{len(starts) - number}.safetensors", [shard])


@pytest.mark.parametrize("holders", [1, 2, 3, 16])
def test_what_any_number_of_holders_writes_is_read_whole(tmp_path, holders):
    """16 holders of a scalar, a flag and nine bf16 numbers: most of their shares are empty."""
    for rank in range(holders):
        shards = [whole_tensor(name, tensor).part(rank, holders) for name, tensor in TENSORS.items()]
        save_shards(tmp_path / f"rank_{rank:05d}.safetensors", shards)
    files = ShardedTensors(tmp_path)
    assert sorted(files.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        read = files.tensor(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape == files.shape(name)
        assert torch.equal(read, tensor)


def test_shares_follow_one_another_and_are_even():
    shard = TensorShard("it", (100,), 20, torch.arange(20, 31))
    for count in (1, 3, 4, 20):
        parts = [shard.part(index, count) for index in range(count)]
        assert torch.equal(torch.cat([part.values for part in parts]), shard.values)
        assert all(part.start == 20 + sum(len(p.values) for p in parts[:i]) for i, part in enumerate(parts))
        lengths = [len(part.values) for part in parts]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("ends", [[], [1], [7, 14], [3, 4, 30], [10, 10, 34]])
def test_any_stretch_is_read_across_the_files_that_hold_it(tmp_path, ends):
    tensor = TENSORS["matrix"]
    write_cut(tmp_path, "matrix", tensor, ends)
    files = ShardedTensors(tmp_path)
    for start in range(35):
        for stop in range(start, 36):
            values = torch.full((stop - start,), -1.0)
            files.fill(TensorShard("matrix", (5, 7), start, values))
            assert torch.equal(values, tensor.view(-1)[start:stop]), (start, stop)


def test_stretches_that_several_files_hold_are_read_once(tmp_path):
    tensor = torch.arange(20.0)
    for number, (start, stop) in enumerate([(0, 20), (0, 5), (3, 12), (12, 20), (0, 20)]):
        save_shards(tmp_path / f"{number}.safetensors", [TensorShard("it", (20,), start, tensor[start:stop])])
    assert torch.equal(ShardedTensors(tmp_path).tensor("it"), tensor)


def test_values_are_read_in_place_and_in_the_precision_asked_for(tmp_path):
    save_shards(tmp_path / "all.safetensors", [whole_tensor("it", torch.tensor([1 / 3, 2 / 3]))])
    held = torch.zeros(4, dtype=torch.float64)
    ShardedTensors(tmp_path).fill(TensorShard("it", (2,), 0, held[1:3]))
    assert held.tolist() == [0, pytest.approx(1 / 3, abs=1e-7), pytest.approx(2 / 3, abs=1e-7), 0]


def test_names_are_found_by_their_beginning(tmp_path):
    ones = torch.ones(2)
    save_shards(
        tmp_path / "a.safetensors", [whole_tensor("model/weight", ones), whole_tensor("model_ema/weight", 2 * ones)]
    )
    save_shards(tmp_path / "b.safetensors", [whole_tensor("model/bias", 3 * ones)])
    files = ShardedTensors(tmp_path)
    assert "model/bias" in files and "bias" not in files
    tensors = files.tensors("model/")
    assert tensors.keys() == {"weight", "bias"} == {name.removeprefix("model/") for name in files.names("model/")}
    assert torch.equal(tensors["weight"], ones) and torch.equal(tensors["bias"], 3 * ones)


def test_a_whole_shard_is_a_view_without_gradient():
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    shard = whole_tensor("it", parameter)
    assert (shard.shape, shard.start, shard.values.shape) == ((2, 3), 0, (6,)) and not shard.values.requires_grad
    shard.values[4] = 5
    assert parameter[1, 1] == 5


def test_a_file_holds_one_shard_of_a_tensor(tmp_path):
    shards = [whole_tensor("it", torch.ones(4)).part(index, 2) for index in range(2)]
    with pytest.raises(ValueError, match="only one shard of a tensor"):
        save_shards(tmp_path / "all.safetensors", shards)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_files_holds_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert ShardedTensors(folder).names() == []


def test_a_missing_name_is_one_line(tmp_path):
    save_shards(tmp_path / "all.safetensors", [whole_tensor("it", torch.ones(2))])
    files = ShardedTensors(tmp_path)
    other = whole_tensor("other", torch.ones(2))
    for read, argument in ((files.shape, "other"), (files.tensor, "other"), (files.fill, other)):
        assert refused(read, argument) == f"{tmp_path} holds no other"


@pytest.mark.parametrize("lost, first", [((0, 4), 0), ((8, 10), 8), ((15, 20), 15)])
def test_a_gap_is_one_line_that_says_where_and_what_lies_beside_it_is_read(tmp_path, lost, first):
    tensor = torch.arange(20.0)
    for start, stop in ((0, lost[0]), (lost[1], 20)):
        save_shards(tmp_path / f"{start}.safetensors", [TensorShard("it", (20,), start, tensor[start:stop])])
    files = ShardedTensors(tmp_path)
    assert f"it lacks its elements from {first} on" in refused(files.tensor, "it")
    # No value is made up, wherever the wanted stretch begins or ends.
    assert "lacks its elements" in refused(files.fill, TensorShard("it", (20,), lost[1] - 1, torch.zeros(1)))
    for start, stop in ((0, lost[0]), (lost[1], 20)):
        values = torch.zeros(stop - start)
        files.fill(TensorShard("it", (20,), start, values))
        assert torch.equal(values, tensor[start:stop])


def test_another_shape_is_refused_even_where_the_number_of_elements_fits(tmp_path):
    save_shards(tmp_path / "all.safetensors", [whole_tensor("it", torch.ones(4, 3))])
    values = torch.zeros(12)
    message = refused(ShardedTensors(tmp_path).fill, TensorShard("it", (3, 4), 0, values))
    assert message == f"it has shape [4, 3] in {tmp_path}, not [3, 4]"
    assert not values.any()


def test_files_that_disagree_about_a_shape_are_refused(tmp_path):
    for name, shape in (("a", (4, 3)), ("b", (3, 4))):
        save_shards(tmp_path / f"{name}.safetensors", [TensorShard("it", shape, 0, torch.ones(6))])
    assert "b.safetensors holds it of shape [3, 4], another file says (4, 3)" in refused(ShardedTensors, tmp_path)


def file_with(layout: str, *shape: int) -> bytes:
    return save({"it": torch.ones(shape)}, metadata={"pieces": layout})


LAYOUTS = ["{", "{}", "[]", "7", '{"it": 0}', '{"it": [0]}', '{"it": [0, 2]}', '{"it": ["here", [2]]}']
DAMAGED = {
    "cut short": file_with('{"it": [0, [2]]}', 2)[:-3],
    "no safetensors": b"not at all\n" * 100,
    "empty": b"",
    "without layout": save({"it": torch.ones(2)}),
    "not flat": file_with('{"it": [0, [2, 2]]}', 2, 2),
    **{layout: file_with(layout, 2) for layout in LAYOUTS},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_in_one_line(tmp_path, content):
    save_shards(tmp_path / "good.safetensors", [whole_tensor("other", torch.ones(2))])
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    assert f"{path} is not a file of a checkpoint: " in refused(ShardedTensors, tmp_path)


@pytest.mark.parametrize("change", ["unlink", "cut_short"])
def test_a_file_that_goes_bad_after_its_header_was_read_is_named_in_one_line(tmp_path, change):
    path = tmp_path / "all.safetensors"
    save_shards(path, [whole_tensor("it", torch.ones(2))])
    files = ShardedTensors(tmp_path)
    path.unlink() if change == "unlink" else path.write_bytes(path.read_bytes()[:-3])
    for read, argument in ((files.fill, whole_tensor("it", torch.zeros(2))), (files.tensor, "it")):
        assert f"{path} cannot be read: " in refused(read, argument)
