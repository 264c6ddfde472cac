"""Batches: every image once, the same number on all ranks, and an epoch that continues from anywhere."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_files import resize_table, write_class_folders, write_shards
from jointspar.training.data.batches import (
    ShardedBatches,
    StreamedBatches,
    evaluation_batches,
    shuffled,
    training_batches,
)
from jointspar.training.data.datasets import Dataset, InMemory, load_dataset
from jointspar.training.data.properties import PROPERTIES, Augmentation
from jointspar.training.data.readers import DatasetError
from jointspar.training.data.shards import Sample, Shards


def make_split(num_items: int, augmentation: Augmentation = Augmentation()) -> InMemory:  # noqa: B008
    """Image k is filled with the number k, so that a batch tells its samples."""
    properties = replace(PROPERTIES["digits"], image_size=4, mean=(0.0,), std=(1 / 255,), augmentation=augmentation)
    values = torch.arange(num_items).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return InMemory(properties, values, torch.arange(num_items))


@pytest.fixture
def small_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    resize_table(monkeypatch, "imagenet", image_size=16, resize=20, mean=(0.0,) * 3, std=(1 / 255,) * 3)


@pytest.fixture
def shards(tmp_path: Path, small_imagenet: None) -> Dataset:
    """12 training samples in shards of 5, 4, 2 and 1, and 5 for test; sample k is of the colour 2 * k."""
    write_shards(tmp_path, train_sizes=(5, 4, 2, 1))
    return load_dataset("imagenet", tmp_path)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_are_disjoint_and_cover_all_whole_batches(world_size: int) -> None:
    shards = [ShardedBatches(make_split(50), 4, rank, world_size, seed=0) for rank in range(world_size)]
    seen = np.concatenate([shard.indices(0).reshape(-1) for shard in shards])
    assert len({len(shard) for shard in shards}) == 1
    assert len(seen) == len(set(seen.tolist())) == 50 // (4 * world_size) * 4 * world_size


def test_batches_hold_the_samples_of_their_indices() -> None:
    shard = ShardedBatches(make_split(50), 4, rank=1, world_size=2, seed=3)
    for (images, labels), expected in zip(shard.epoch(2), shard.indices(2), strict=True):
        np.testing.assert_array_equal(labels.numpy(), expected)
        assert images.dtype == torch.float32
        np.testing.assert_allclose(images[:, 0, 0, 0].numpy(), expected, rtol=1e-5)


def test_order_depends_on_epoch_and_seed_only() -> None:
    shard, again = (ShardedBatches(make_split(50), 4, rank=0, world_size=2, seed=3) for _ in range(2))
    other = ShardedBatches(make_split(50), 4, rank=0, world_size=2, seed=4)
    np.testing.assert_array_equal(shard.indices(1), again.indices(1))
    assert (shard.indices(0) != shard.indices(1)).any()
    assert (shard.indices(0) != other.indices(0)).any()


def test_too_few_samples_for_one_global_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="--batch-size 30 on 2 ranks needs 60 samples"):
        training_batches(make_split(50), 30, 0, 2, seed=0)


def check_continuation(batches: ShardedBatches | StreamedBatches, first_batch: int) -> None:
    whole, rest = list(batches.epoch(0)), list(batches.epoch(0, first_batch=first_batch))
    assert len(whole) == len(batches)
    for (images, labels), (expected_images, expected_labels) in zip(rest, whole[first_batch:], strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_epoch_in_memory_continues_from_any_batch() -> None:
    check_continuation(ShardedBatches(make_split(40, Augmentation(padding=4, flips=True)), 4, 0, 2, seed=0), 3)


def test_epoch_of_class_folders_continues_from_any_batch(tmp_path: Path, small_imagenet: None) -> None:
    write_class_folders(tmp_path)
    batches = training_batches(load_dataset("imagenet", tmp_path).train, 2, 1, 2, seed=0)
    check_continuation(batches, 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_epoch_of_shards_continues_from_any_batch(shards: Dataset, rank: int) -> None:
    check_continuation(training_batches(shards.train, 2, rank, 2, seed=0), 2)


def test_class_folders_give_pictures_with_their_labels(tmp_path: Path, small_imagenet: None) -> None:
    write_class_folders(tmp_path)
    [(images, labels)] = list(training_batches(load_dataset("imagenet", tmp_path).train, 12, 0, 1, seed=0).epoch(0))
    assert images.shape == (12, 3, 16, 16)
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    colours = images.mean(dim=(1, 2, 3))
    np.testing.assert_array_equal((colours / 40).int().numpy(), labels.numpy())


def test_one_rank_sees_each_sample_of_the_shards_once_an_epoch(shards: Dataset) -> None:
    batches = training_batches(shards.train, 3, 0, 1, seed=0)
    orders = []
    for epoch in range(2):
        images, labels = (torch.cat(parts) for parts in zip(*batches.epoch(epoch), strict=True))
        assert (images.mean(dim=(1, 2, 3)) - 2 * labels.clamp(max=1000)).abs().max() < 2
        orders.append(labels.tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_ranks_get_the_same_number_of_batches_from_unequal_shards(shards: Dataset, world_size: int) -> None:
    labels = []
    for rank in range(world_size):
        batches = training_batches(shards.train, 1, rank, world_size, seed=1)
        labels.append([int(label) for _, label in batches.epoch(0)])
    assert {len(each) for each in labels} == {12 // world_size}
    assert all(set(a).isdisjoint(b) for a in labels for b in labels if a is not b)


def test_more_ranks_than_shards_are_refused(shards: Dataset) -> None:
    with pytest.raises(ValueError, match="4 training shards are too few for 5 ranks"):
        training_batches(shards.train, 1, 0, 5, seed=0)


def test_shuffling_keeps_all_samples_and_changes_the_order() -> None:
    samples = [Sample(str(k), b"", k) for k in range(50)]
    order = [sample.label for sample in shuffled(iter(samples), np.random.default_rng(0), 8)]
    assert sorted(order) == list(range(50))
    assert order != list(range(50))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_image_once(shards: Dataset, world_size: int) -> None:
    for test, expected in ((shards.test, 5), (make_split(1203), 1203)):
        labels = [
            label
            for rank in range(world_size)
            for _, part in evaluation_batches(test, rank, world_size)
            for label in part
        ]
        assert sorted(map(int, labels)) == list(range(expected))


def test_ranks_without_a_test_image_have_nothing_to_evaluate() -> None:
    counts = [sum(len(labels) for _, labels in evaluation_batches(make_split(3), rank, 5)) for rank in range(5)]
    assert counts == [1, 1, 1, 0, 0]


def test_a_test_shard_that_is_left_over_is_shared(shards: Dataset) -> None:
    assert isinstance(shards.test, Shards)
    for files in (1, 2):  # of one all ranks read, of the second one each has its own
        test = replace(shards.test, files=shards.test.files[:files], sizes=shards.test.sizes[:files])
        counts = [sum(len(labels) for _, labels in evaluation_batches(test, rank, 2)) for rank in range(2)]
        assert sum(counts) == len(test) and min(counts) > 0


def test_a_rank_that_would_repeat_a_small_shard_is_warned_of(shards: Dataset) -> None:
    assert isinstance(shards.train, Shards)
    uneven = replace(shards.train, sizes=[40, 40, 1, 1])
    with pytest.warns(UserWarning, match="only 2 of the 41 samples"):
        training_batches(uneven, 1, 0, 2, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_batches(uneven, 1, 1, 2, seed=0)  # the first rank says it
        training_batches(replace(shards.train, sizes=[4, 4, 3, 3]), 1, 0, 2, seed=0)


def test_shard_that_changed_since_it_was_counted_is_named(shards: Dataset) -> None:
    assert isinstance(shards.train, Shards)
    wrong = replace(shards.train, sizes=[5, 4, 2, 2])
    with pytest.raises(DatasetError, match=r"000003\.tar holds 1 samples, not 2"):
        list(training_batches(wrong, 1, 0, 1, seed=0).epoch(0))
