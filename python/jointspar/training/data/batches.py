"""Batches of a dataset, sharded over ranks."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import chain, count, islice

import numpy as np
import torch

from jointspar.errors import warn_user
from jointspar.training.data.augment import normalise
from jointspar.training.data.datasets import Indexed, Split
from jointspar.training.data.pictures import decode_batch
from jointspar.training.data.shards import Sample, Shards

Batch = tuple[torch.Tensor, torch.Tensor]  # float32 [n, channels, size, size], int64 [n]

_EVALUATION_BATCH = 500  # images of up to 64 x 64; of larger ones so many fewer
_EVALUATION_PIXELS = _EVALUATION_BATCH * 64 * 64
_SHUFFLE_BUFFER = 1000  # compressed pictures that a rank holds, about 110 MB of ImageNet


class ShardedBatches:
    """Training batches of one rank, where any sample can be read.

    Each epoch is one permutation from (seed, epoch), the same on all ranks, cut into global batches of
    world_size * batch_size; a rank takes its own slice of every global batch and an incomplete one is dropped, so all
    ranks see the same number of batches. Augmentation depends on (seed, epoch, batch, rank) only: an epoch can be
    continued from any batch. Raises ValueError when the data hold no whole global batch.
    """

    def __init__(self, train: Indexed, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.train = train
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.num_batches = _whole_batches(train, batch_size, world_size)

    def __len__(self) -> int:
        return self.num_batches

    def indices(self, epoch: int) -> np.ndarray:
        """int64 [num_batches, batch_size]: the samples of this rank's batches."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.train))
        used = order[: self.num_batches * self.world_size * self.batch_size]
        return used.reshape(self.num_batches, self.world_size, self.batch_size)[:, self.rank]

    def epoch(self, epoch: int, first_batch: int = 0) -> Generator[Batch, None, None]:
        """Batches from first_batch on. Raises DatasetError where a picture is damaged."""
        for batch, chosen in enumerate(self.indices(epoch)[first_batch:], start=first_batch):
            images = self.train.read(chosen, key=(self.seed, epoch, batch, self.rank))
            yield images, self.train.labels[torch.from_numpy(chosen)]


class StreamedBatches:
    """Training batches of one rank, where files hold many samples and are read from front to back.

    Each epoch is one permutation of the files from (seed, epoch), dealt out to the ranks; a rank shuffles its samples
    through a buffer. All ranks see the same number of batches: one whose files hold fewer samples begins them anew,
    one whose files hold more leaves some out, others in another epoch. A continued epoch reads, but does not decode,
    what it leaves out, and gives the same batches. Raises ValueError when the data hold no whole global batch or fewer
    files than ranks; warns where a rank may read its files more than twice an epoch.
    """

    def __init__(self, train: Shards, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.shards = train
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.num_batches = _whole_batches(train, batch_size, world_size)
        if len(self.shards.files) < world_size:
            raise ValueError(
                f"{len(self.shards.files)} training shards are too few for {world_size} ranks: every rank needs one"
            )
        fewest = sum(sorted(self.shards.sizes)[: len(self.shards.files) // world_size])
        if rank == 0 and 2 * fewest < self.num_batches * batch_size:
            warn_user(
                f"training shards of very different size: a rank may have only {fewest} of the "
                f"{self.num_batches * batch_size} samples that it trains on in an epoch, and repeat them; make more "
                "shards, or shards of like size"
            )

    def __len__(self) -> int:
        return self.num_batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Generator[Batch, None, None]:
        """Batches from first_batch on. Raises DatasetError where a shard or a picture is damaged."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards.files))
        own = order[self.rank :: self.world_size].tolist()
        random = np.random.default_rng((self.seed, epoch, self.rank))
        passes = (shuffled(chain.from_iterable(map(self.shards.read, own)), random, _SHUFFLE_BUFFER) for _ in count())
        samples = chain.from_iterable(passes)
        for _ in islice(samples, first_batch * self.batch_size):
            pass
        for batch in range(first_batch, self.num_batches):
            chosen = list(islice(samples, self.batch_size))
            yield _decode(chosen, self.shards, (self.seed, epoch, batch, self.rank))


def training_batches(
    train: Split, batch_size: int, rank: int, world_size: int, seed: int
) -> ShardedBatches | StreamedBatches:
    """The training batches of one rank. Raises ValueError."""
    if isinstance(train, Shards):
        return StreamedBatches(train, batch_size, rank, world_size, seed)
    return ShardedBatches(train, batch_size, rank, world_size, seed)


def evaluation_batches(test: Split, rank: int, world_size: int) -> Generator[Batch, None, None]:
    """The test images of one rank; over all ranks each image comes once. Raises DatasetError.

    Of shards each rank takes as many; what is left over all read, each taking some of the samples.
    """
    batch_size = min(_EVALUATION_BATCH, _EVALUATION_PIXELS // test.properties.image_size**2)
    if isinstance(test, Shards):
        num_whole = len(test.files) - len(test.files) % world_size
        whole = chain.from_iterable(map(test.read, range(rank, num_whole, world_size)))
        left_over = chain.from_iterable(map(test.read, range(num_whole, len(test.files))))
        samples = chain(whole, islice(left_over, rank, None, world_size))
        while chosen := list(islice(samples, batch_size)):
            yield _decode(chosen, test, None)
        return
    for index in torch.arange(len(test))[rank::world_size].split(batch_size):
        if len(index):
            yield test.read(index.numpy(), key=None), test.labels[index]


def shuffled(samples: Iterator[Sample], random: np.random.Generator, size: int) -> Iterator[Sample]:
    """All samples, each in a random place of a buffer of that size until another takes the place."""
    buffer = list(islice(samples, size))
    random.shuffle(buffer)
    for sample in samples:
        place = int(random.integers(len(buffer)))
        buffer[place], sample = sample, buffer[place]
        yield sample
    yield from buffer


def _decode(samples: list[Sample], shards: Shards, key: tuple[int, ...] | None) -> Batch:
    sources = [sample.source for sample in samples]
    images = normalise(decode_batch(sources, shards.properties, key), shards.properties)
    return images, torch.tensor([sample.label for sample in samples])


def _whole_batches(train: Split, batch_size: int, world_size: int) -> int:
    num_batches = len(train) // (batch_size * world_size)
    if num_batches == 0:
        raise ValueError(
            f"--batch-size {batch_size} on {world_size} ranks needs {batch_size * world_size} samples per step, "
            f"the data have {len(train)}: give a smaller --batch-size"
        )
    return num_batches
