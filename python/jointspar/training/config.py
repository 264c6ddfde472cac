"""What a training run is made of, and which flags act for which method."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from jointspar.training.data.properties import PROPERTIES


class Method(NamedTuple):
    """One value of --method."""

    is_layerwise: bool  # LARS: a trust ratio per tensor
    is_sparse: bool  # JointSpar: some layers per step
    base_lr: float
    compressor: str | None = None  # what takes the place of the exchange, see training.baselines
    wire_dtype: str | None = None


class ImageSizes(NamedTuple):
    """The smallest and the largest side of the images that a model is meant for."""

    smallest: int
    largest: int


# "fp16" and "bf16" send the number formats of mixed precision (Micikevicius et al. 2018, Kalamkar et al. 2019); the
# sources of the other compressors are in training.baselines.
METHODS = {
    "sgd": Method(is_layerwise=False, is_sparse=False, base_lr=0.05),
    "lars": Method(is_layerwise=True, is_sparse=False, base_lr=0.4),
    "jointspar": Method(is_layerwise=False, is_sparse=True, base_lr=0.05),
    "jointspar-lars": Method(is_layerwise=True, is_sparse=True, base_lr=0.4),
}
COMPRESSORS = ("randomk", "topk", "signsgd", "qsgd", "terngrad", "powersgd")
for _name in COMPRESSORS:  # to compare with: dense gradients, compressed on their way
    METHODS[_name] = METHODS["sgd"]._replace(compressor=_name)
    METHODS[f"{_name}-lars"] = METHODS["lars"]._replace(compressor=_name)
for _name in ("randomk", "signsgd"):  # ten times the variance, steps of one length
    METHODS[_name] = METHODS[_name]._replace(base_lr=0.01)
for _name, _dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
    METHODS[_name] = METHODS["sgd"]._replace(wire_dtype=_dtype)
    METHODS[f"{_name}-lars"] = METHODS["lars"]._replace(wire_dtype=_dtype)
DATASETS = tuple(PROPERTIES)
MODELS = {
    "lenet5": ImageSizes(16, 64),
    "resnet20": ImageSizes(8, 64),
    "resnet18": ImageSizes(8, 512),
    "resnet50": ImageSizes(32, 512),
}
REFERENCE_BATCH = 256  # samples of a step that --base-lr is for
DEFAULT_TRUST_COEFFICIENT = 0.02  # of the LARS methods

# Fields that act only where layers are left out, and become js.Sampling's or the optimizer's arguments of that name.
SAMPLING_FIELDS = ("budget", "strategy", "draw", "distribution", "bandit_lr", "shift", "p_min", "lag", "grouping")
SPARSE_FIELDS = (*SAMPLING_FIELDS, "dense_epochs", "inactive")
# Fields that act with some compressors only.
COMPRESSION_FIELDS = {
    "compression_ratio": ("randomk", "topk"),
    "qsgd_levels": ("qsgd",),
    "powersgd_rank": ("powersgd",),
}
MOST_QSGD_LEVELS = 127  # with a sign, 8 bits
MOST_THREADS = 1024  # of one rank: far beyond, the system starts no more, and libraries fail in ways that name others
# Fields that may change between a run and its continuation; all others decide what is learned.
FREE_FIELDS = (
    "out", "resume", "data_dir", "log_every", "max_steps", "threads", "device", "epochs", "simulate_workers",
)  # fmt: skip
DEVICES = ("cpu", "cuda")

# Liu & Mozafari train 90 epochs: 5 of warm-up (as Goyal et al.), steps after 30, 50 and 70 (there 30, 60 and 80).
_PAPER_MILESTONES = (30 / 90, 50 / 90, 70 / 90)
_WARMUP_FRACTION, _LONGEST_WARMUP = 1 / 6, 5


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run, checked at construction. None means the default of the library or of the method.

    budget: int = expected number of active layers, float <= 1 = fraction of the layers. batch_size: per rank.
    base_lr: rate per 256 samples of the global batch; lr: the rate after warm-up itself. Give one of them.
    max_steps: stop early after so many steps, the schedule unchanged. threads: torch threads of this rank.
    device: where model and gradients are, "cpu" (the default) or "cuda", there a GPU for each rank of a host in turn.
    simulate_workers: ranks that this one process plays in turn; None: the launcher's, or one.
    A field that the method does not use is an error. Raises ValueError naming the flag.
    """

    out: Path
    dataset: str = "digits"
    model: str = "lenet5"
    method: str = "jointspar-lars"
    budget: int | float | None = None
    strategy: str | None = None
    draw: str | None = None
    distribution: str | None = None
    bandit_lr: float | None = None
    shift: bool | None = None
    p_min: float | None = None
    lag: int | None = None
    grouping: str | None = None
    dense_epochs: float | None = None
    inactive: str | None = None
    wire_dtype: str | None = None
    exchange: str | None = None
    overlap: bool = False
    compression_ratio: float | None = None
    qsgd_levels: int | None = None
    powersgd_rank: int | None = None
    epochs: int = 30
    warmup_epochs: float | None = None
    milestones: tuple[float, ...] | None = None
    batch_size: int = 64
    base_lr: float | None = None
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    trust_coefficient: float | None = None
    nesterov: bool = False
    seed: int = 0
    threads: int | None = None
    device: str | None = None
    data_dir: Path | None = None
    resume: bool = False
    log_every: int = 10
    max_steps: int | None = None
    simulate_workers: int | None = None

    def __post_init__(self) -> None:
        _check_choice("--dataset", self.dataset, DATASETS)
        _check_choice("--model", self.model, tuple(MODELS))
        _check_choice("--method", self.method, tuple(METHODS))
        if self.device is not None:
            _check_choice("--device", self.device, DEVICES)
        self._check_that_model_fits()
        self._check_numbers()
        self._check_budget()
        self._check_compression()
        self._check_that_every_flag_acts()

    def _check_that_model_fits(self) -> None:
        size = PROPERTIES[self.dataset].image_size
        if not fits(self.model, size):
            smallest, largest = MODELS[self.model]
            raise ValueError(
                f"--model {self.model} takes images of {smallest} to {largest} pixels a side, --dataset {self.dataset} "
                f"has {size}: choose from {', '.join(name for name in MODELS if fits(name, size))}"
            )

    def _check_numbers(self) -> None:
        for name in ("epochs", "batch_size", "threads", "log_every", "max_steps", "simulate_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {value}")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ValueError(f"--threads must be at most {MOST_THREADS}, got {self.threads}")
        for name in ("base_lr", "lr", "trust_coefficient"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{flag(name)} must be positive and finite, got {value}")
        for name in ("weight_decay", "warmup_epochs", "dense_epochs", "seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{flag(name)} must be at least 0 and finite, got {value}")
        if self.seed >= 2**63:
            raise ValueError(f"--seed must be below 2**63, got {self.seed}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum must be in [0, 1), got {self.momentum}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("--nesterov needs a --momentum above 0")
        steps = list(self.milestones or ())
        if steps != sorted(steps) or any(not 0 < epoch < float("inf") for epoch in steps):
            raise ValueError(
                f"--milestones must be positive, finite and ascending (none: never), got {' '.join(map(str, steps))}"
            )

    def _check_budget(self) -> None:
        if isinstance(self.budget, float) and not 0 < self.budget <= 1:
            raise ValueError(
                f"--budget {self.budget} is out of range: give a fraction in (0, 1], "
                "such as 0.5, or a whole number of layers"
            )
        if isinstance(self.budget, int) and self.budget < 1:
            raise ValueError(
                f"--budget {self.budget} is out of range: give at least 1 layer, or a fraction such as 0.5"
            )

    def _check_compression(self) -> None:
        method = METHODS[self.method]
        for name, compressors in COMPRESSION_FIELDS.items():
            if getattr(self, name) is not None and method.compressor not in compressors:
                raise ValueError(
                    f"{flag(name)} does not act with --method {self.method}: leave it out, or use --method "
                    + " or ".join(compressors)
                )
        for name in ("wire_dtype", "exchange"):
            decides = method.compressor or (method.wire_dtype if name == "wire_dtype" else None)
            if decides and getattr(self, name) is not None:
                raise ValueError(
                    f"{flag(name)} does not act with --method {self.method}, which says itself what is sent: "
                    "leave it out, or use another method"
                )
        if self.device not in (None, "cpu") and method.compressor:
            raise ValueError(
                f"--device {self.device}: --method {self.method} makes its messages on the CPU: leave --device out"
            )
        if self.overlap and method.compressor:
            raise ValueError(f"--overlap: --method {self.method} takes all gradients at once: leave one of them out")
        if self.compression_ratio is not None and not 0 < self.compression_ratio <= 1:
            raise ValueError(f"--compression-ratio must be in (0, 1], got {self.compression_ratio}")
        if self.qsgd_levels is not None and not 1 <= self.qsgd_levels <= MOST_QSGD_LEVELS:
            raise ValueError(f"--qsgd-levels must be from 1 to {MOST_QSGD_LEVELS}, got {self.qsgd_levels}")
        if self.powersgd_rank is not None and self.powersgd_rank < 1:
            raise ValueError(f"--powersgd-rank must be at least 1, got {self.powersgd_rank}")

    def _check_that_every_flag_acts(self) -> None:
        method = METHODS[self.method]
        idle = [name for name in SPARSE_FIELDS if not method.is_sparse and getattr(self, name) is not None]
        if idle:
            raise ValueError(
                f"{flag(idle[0])} does not act with --method {self.method}, which computes every layer: "
                "leave it out, or use --method jointspar or jointspar-lars"
            )
        if self.trust_coefficient is not None and not method.is_layerwise:
            raise ValueError(
                f"--trust-coefficient does not act with --method {self.method}: leave it out, or use a LARS method"
            )
        if self.dense_epochs is not None and self.dense_epochs >= self.epochs:
            raise ValueError(
                f"--dense-epochs {self.dense_epochs:g} of {self.epochs} epochs leaves none to sample layers in: "
                "give fewer, or use a method that computes every layer"
            )
        for name in ("bandit_lr", "shift"):
            if getattr(self, name) is not None and self.distribution != "bandit":
                raise ValueError(f"{flag(name)} acts only with --distribution bandit: add that, or leave it out")
        if self.shift and (self.strategy in (None, "stratified") or self.dense_epochs):
            raise ValueError(
                "--shift is for --strategy independent or shared, and not with --dense-epochs: change these, or leave "
                "--shift out"
            )
        if self.lr is not None and self.base_lr is not None:
            raise ValueError(
                "--lr and --base-lr exclude each other: --lr is the rate itself, --base-lr is per 256 samples"
            )

    def scaled_base_lr(self, world_size: int) -> float:
        """The rate per 256 samples of the global batch."""
        if self.lr is not None:
            return self.lr * REFERENCE_BATCH / (world_size * self.batch_size)
        return METHODS[self.method].base_lr if self.base_lr is None else self.base_lr

    def warmup(self) -> float:
        """Epochs of warm-up: 5, or a sixth of a short run."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return min(_LONGEST_WARMUP, self.epochs * _WARMUP_FRACTION)

    def schedule_milestones(self) -> tuple[float, ...]:
        """Epochs at which the rate falls tenfold: 30, 50, 70 of 90, in proportion."""
        if self.milestones is not None:
            return self.milestones
        return tuple(self.epochs * fraction for fraction in _PAPER_MILESTONES)

    def identity(self) -> dict[str, object]:
        """The settings that decide what is learned, as JSON values; a continuation must have the same."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE_FIELDS}
        return values | {"warmup_epochs": self.warmup(), "milestones": list(self.schedule_milestones())}


def fits(model: str, image_size: int) -> bool:
    """Whether a model is meant for square images of this size."""
    return MODELS[model].smallest <= image_size <= MODELS[model].largest


def flag(field_name: str) -> str:
    """The command line's name of a field."""
    return "--" + field_name.replace("_", "-")


def _check_choice(flag_name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{flag_name} {value!r} is unknown: choose from {', '.join(choices)}")
