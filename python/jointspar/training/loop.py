"""The loop of `jointspar train`: an ordinary PyTorch loop around a jointspar optimizer."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import jointspar as js
from jointspar.comm.transport import Transport
from jointspar.replicas import average
from jointspar.telemetry import Stats
from jointspar.training.config import METHODS, REFERENCE_BATCH, TrainConfig
from jointspar.training.data.batches import ShardedBatches, StreamedBatches, evaluation_batches
from jointspar.training.data.datasets import Dataset
from jointspar.training.data.prefetch import prefetch
from jointspar.training.data.readers import DatasetError
from jointspar.training.models import build_model
from jointspar.training.records import (
    CHECKPOINT_FOLDER,
    CURVES_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    Display,
    MetricsFile,
    Progress,
    Summary,
    epoch_line,
    read_metrics,
    write_summary,
)
from jointspar.training.setup import check_continuation, make_optimizer

_AVERAGED = ("loss_sum", "bytes_sent", "bytes_dense", "active_sum", "seconds")  # of the progress, by rank


class StoppedError(Exception):
    """The run ended in order before its last step, because it was asked to; its checkpoint is complete."""


class Run:
    """One training run: the objects that `train` set up, and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        comm: Transport,
        dataset: Dataset,
        batches: ShardedBatches | StreamedBatches,
        identity: dict[str, object],
        device: torch.device,
    ) -> None:
        self.config, self.comm, self.dataset, self.batches, self.device = config, comm, dataset, batches, device
        its = dataset.properties
        model = build_model(config.model, its.in_channels, its.num_classes, its.image_size, seed=config.seed)
        self.model = model.to(device)
        self.optimizer = make_optimizer(config, self.model, comm, steps_per_epoch=len(batches))
        self.scheduler = js.schedule.linear_scaling_warmup(
            self.optimizer,
            base_lr=config.scaled_base_lr(comm.world_size),
            world_size=comm.world_size,
            local_batch=config.batch_size,
            steps_per_epoch=len(batches),
            warmup_epochs=config.warmup(),
            milestones=config.schedule_milestones(),
            reference_batch=REFERENCE_BATCH,
        )
        self.identity = identity | {"world_size": comm.world_size}
        if comm.world_size * config.batch_size <= REFERENCE_BATCH:
            del self.identity["warmup_epochs"]  # there is none, whatever is set
        self.progress = self._load() if config.resume else Progress()
        self.counted = _totals(self.optimizer.stats)  # what `progress` contains already
        self.phase_ms: defaultdict[str, float] = defaultdict(float)  # summed over the epoch's steps
        self.phase_steps = 0
        self.num_steps = min(config.max_steps or config.epochs * len(batches), config.epochs * len(batches))
        self.metrics = None
        if comm.rank == 0:
            (config.out / SUMMARY_FILE).unlink(missing_ok=True)  # the run is not complete any more
            is_over = self.progress.step >= self.num_steps and not self.progress.is_to_evaluate
            self.metrics = MetricsFile(config.out / METRICS_FILE, keep_up_to_step=self.progress.step, is_over=is_over)
        self.display = Display(rank=comm.rank, first_step=self.progress.step, num_steps=self.num_steps)

    def fit(self) -> Summary:
        self.display.line(self._headline())
        while self.progress.step < self.num_steps or self.progress.is_to_evaluate:
            if not self.progress.is_to_evaluate:
                self._train_epoch()
                if self.optimizer.stop_requested and self.progress.step < self.num_steps:
                    self._stop()
            self._end_epoch()
        return self._finish()

    def close(self) -> None:
        self.display.close()
        if self.metrics is not None:
            self.metrics.close()

    def _train_epoch(self) -> None:
        """Train to the end of the epoch, or to the last step wanted."""
        self.model.train()
        self.phase_ms.clear()
        self.phase_steps = 0
        started = time.perf_counter()
        with closing(prefetch(self.batches.epoch(self.progress.epoch, self.progress.batch))) as batches:
            for images, labels in batches:
                self.phase_ms["data"] += 1e3 * (time.perf_counter() - started)
                loss = self._train_step(images, labels)
                now = time.perf_counter()
                self.progress.seconds += now - started
                started = now
                self._note_step(loss)
                if self.progress.step >= self.num_steps or self.optimizer.stop_requested:
                    break

    def _train_step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        before_forward = time.perf_counter()
        self.optimizer.zero_grad()
        images, labels = self._on_device(images, labels)
        loss = functional.cross_entropy(self.model(images), labels)
        before_backward = time.perf_counter()
        loss.backward()
        after_backward = time.perf_counter()
        self.progress.lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.phase_ms["forward"] += 1e3 * (before_backward - before_forward)
        self.phase_ms["backward"] += 1e3 * (after_backward - before_backward)
        return loss.item()

    def _note_step(self, loss: float) -> None:
        progress, stats = self.progress, self.optimizer.stats
        progress.step += 1
        progress.batch += 1
        progress.loss_sum += loss
        totals = _totals(stats)
        progress.bytes_sent += totals[0] - self.counted[0]
        progress.bytes_dense += totals[1] - self.counted[1]
        progress.skipped_steps += totals[2] - self.counted[2]
        self.counted = totals
        progress.active_sum += stats.active_fraction
        progress.exchange = stats.exchange
        for name, ms in stats.phase_ms.items():
            self.phase_ms[name] += ms
        self.phase_steps += 1
        self.display.advance(loss)
        if self.metrics is not None and progress.step % self.config.log_every == 0:
            self.metrics.write({"kind": "step", "train_loss": loss} | self._state())

    def _end_epoch(self) -> None:
        """Average over ranks, evaluate, record, save."""
        progress = self.progress
        self._average_over_ranks(*_AVERAGED)
        is_whole = progress.batch == len(self.batches)
        own_buffers = [] if is_whole else [buffer.clone() for buffer in self.model.buffers()]
        js.sync_buffers(self.model, comm=self.comm)
        progress.train_loss = progress.loss_sum / progress.batch
        progress.is_to_evaluate = True
        progress.test_accuracy = self._evaluate()
        progress.is_to_evaluate = False
        for buffer, own in zip(self.model.buffers(), own_buffers, strict=False):
            buffer.copy_(own)  # an uninterrupted run averages at the end of an epoch only
        if is_whole:
            progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
        record = self._epoch_record("epoch" if is_whole else "stop")
        if self.metrics is not None:
            self.metrics.write(record)
        self._save()  # before it is told, since whoever listened may be gone
        self.display.line(epoch_line(record, self.config.epochs))

    def _stop(self) -> None:
        """Save what an uninterrupted run has after this step, without the time that an evaluation takes."""
        self._average_over_ranks(*_AVERAGED)
        self._save()
        self.optimizer.finish()
        raise StoppedError(f"stopped by a signal after step {self.progress.step}: continue it with --resume")

    def _save(self) -> None:
        js.checkpoint.save(
            self.config.out / CHECKPOINT_FOLDER,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            extra={"config": self.identity, "progress": vars(self.progress).copy()},
        )

    def _epoch_record(self, kind: str) -> dict[str, Any]:
        progress = self.progress
        return {
            "kind": kind,
            "train_loss": progress.train_loss,
            "test_accuracy": progress.test_accuracy,
            **self._state(),
            "world_size": self.comm.world_size,
            "simulated": self.comm.is_simulated,
            "active_fraction": progress.active_sum / progress.step,
            "phase_ms": {name: ms / self.phase_steps for name, ms in self.phase_ms.items()},
        }

    def _state(self) -> dict[str, Any]:
        """What every metrics line holds: rank 0's view after the step just taken."""
        progress = self.progress
        return {
            "epoch": progress.epoch + round(progress.batch / len(self.batches), 4)
            if progress.batch
            else progress.epoch,
            "step": progress.step,
            "lr": progress.lr,
            "seconds": progress.seconds,
            "bytes_sent": round(progress.bytes_sent),
            "active_fraction": self.optimizer.stats.active_fraction,
            "probabilities": [round(float(p), 4) for p in self.optimizer.probabilities],
        }

    def _evaluate(self) -> float:
        """Share of test images classified correctly, each rank doing its part; the same answer on all ranks.

        Where a rank cannot read its part all save what they have trained, and raise.
        """
        error, num_correct = None, float("nan")
        try:
            num_correct = self._count_correct()
        except (DatasetError, OSError) as caught:
            error = caught
        counted = torch.tensor([num_correct], dtype=torch.float64)
        share = average(counted, self.comm, what="evaluation").item()
        if math.isnan(share):
            self._save()
            raise error or js.errors.JointSparError("another rank could not read its test data; the epoch is saved")
        return round(share * self.comm.world_size) / len(self.dataset.test)

    def _count_correct(self) -> int:
        test, world_size = self.dataset.test, self.comm.world_size
        num_correct = 0
        self.model.eval()
        with torch.no_grad(), closing(prefetch(evaluation_batches(test, self.comm.rank, world_size))) as batches:
            for images, labels in batches:
                images, labels = self._on_device(images, labels)
                num_correct += int((self.model(images).argmax(dim=1) == labels).sum())
        return num_correct

    def _on_device(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.to(self.device), labels.to(self.device)

    def _average_over_ranks(self, *names: str) -> None:
        values = torch.tensor([getattr(self.progress, name) for name in names], dtype=torch.float64)
        for name, value in zip(names, average(values, self.comm, what="means of the epoch").tolist(), strict=True):
            setattr(self.progress, name, value)

    def _load(self) -> Progress:
        extra = js.checkpoint.load(
            self.config.out / CHECKPOINT_FOLDER, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler
        )
        check_continuation(self.config, extra["config"], self.identity)
        progress = Progress(**extra["progress"])
        if self.config.max_steps is not None and self.config.max_steps < progress.step:
            raise ValueError(f"max_steps: {self.config.max_steps} is less than the {progress.step} steps made already")
        return progress

    def _headline(self) -> str:
        config, comm = self.config, self.comm
        layers = self.optimizer.layers
        ranks = f"{comm.world_size} {'simulated workers' if comm.is_simulated else 'rank(s)'}"
        return (
            f"{config.method} on {config.dataset}: {config.model}, {sum(p.numel() for p in self.model.parameters()):,} "
            f"parameters in {len(layers)} sampled layers; {ranks} x {config.batch_size} samples, "
            f"{len(self.batches)} steps an epoch, {torch.get_num_threads()} thread(s) a rank, {comm.name}"
        )

    def _finish(self) -> Summary:
        summary = self._summary()
        self.optimizer.finish()
        if self.comm.rank == 0:
            from jointspar.training.plots import plot_run  # brings matplotlib, which the other ranks do without

            plot_run(self.config.out / CURVES_FILE, read_metrics(self.config.out / METRICS_FILE), summary)
            write_summary(self.config.out / SUMMARY_FILE, summary)  # the sign that a run is complete
            self.display.line(f"test accuracy {100 * summary.test_accuracy:.2f} %, files in {self.config.out}")
        return summary

    def _summary(self) -> Summary:
        progress, config = self.progress, self.config
        method = METHODS[config.method]
        sampling = self.optimizer.sampling
        return Summary(
            test_accuracy=progress.test_accuracy,
            train_loss=progress.train_loss,
            seconds=progress.seconds,
            steps=progress.step,
            world_size=self.comm.world_size,
            bytes_sent=round(progress.bytes_sent),
            bytes_dense=round(progress.bytes_dense),
            active_fraction=progress.active_sum / progress.step,
            method=config.method,
            seed=config.seed,
            dataset=config.dataset,
            model=config.model,
            budget=sampling.budget if method.is_sparse else None,
            strategy=sampling.strategy if method.is_sparse else None,
            epochs=config.epochs,
            skipped_steps=progress.skipped_steps,
            simulated=self.comm.is_simulated,
            exchange=progress.exchange,
            layers=[layer.name for layer in self.optimizer.layers],
            data=str(self.identity["data"]),
            versions={"jointspar": js.__version__, "torch": torch.__version__, "numpy": np.__version__},
        )


def _totals(stats: Stats) -> tuple[int, int, int]:
    return stats.total_sent_bytes, stats.total_dense_bytes, stats.skipped_steps
