"""The data side of training: annotation files read and checked at once, loaders built when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from dino_lightning.data.annotation_file import CrowdRule
from dino_lightning.data.augmentation import train_transform
from dino_lightning.data.box_formats import BoxFormat
from dino_lightning.data.drawn_plans import MOST_DRAWN_ROOMS, WithDrawnPlans
from dino_lightning.data.hazards import hazards
from dino_lightning.data.label_names import ClassNames
from dino_lightning.data.map_datasets import ImageReader, read_datasets
from dino_lightning.data.option_checks import check_options, refuse_options_of_files
from dino_lightning.data.own_transforms import GivenTransforms, with_own_transforms
from dino_lightning.data.read_splits import Splits, splits_of
from dino_lightning.data.sampling import repeats_in_words
from dino_lightning.data.sizes import Canvas, CanvasMode, largest_sides
from dino_lightning.data.split_loaders import SplitLoaders
from dino_lightning.data.split_sets import image_caches, split_sets
from dino_lightning.data.stored_options import check_stored, storable
from dino_lightning.data.tables import class_table, summary
from dino_lightning.data.transforms import eval_transform
from dino_lightning.data.worst_case import blank_batch, largest_canvas, most_boxes, turns
from dino_lightning.structures import Batch


class CocoDataModule(SplitLoaders):
    """COCO-format data for training and evaluation.

    The annotation files are read and checked when the module is made, so that the classes are known at once;
    no image is opened before the first batch.

    The attributes `root`, `image_size` and `max_size` are those given, the sizes within `fixed_size`, and `root` is ""
    for map-style datasets; `classes` is the table of classes, by label.

    Args:
        root: the dataset's folder, in COCO, YOLO or Pascal VOC format. The files in it are found by the usual
            conventions: train/annotations.json, train/_annotations.coco.json (Roboflow),
            annotations/instances_train2017.json with train2017/, train.json with images/, or one annotations.json, and
            otherwise by what their names say of the split. YOLO's folders have a data.yaml. Without a validation split,
            a part of the training images becomes it.
        train_annotations: the training JSON, where it is not found by itself, or several as a list or a pattern
            (`annotations/train*.json`); like all paths here relative to the working directory or to `root`.
        train_images: the folder that the file names of `train_annotations` are relative to.
        val_annotations: the validation JSON.
        val_images: its image folder.
        test_annotations: the test JSON.
        test_images: its image folder.
        crowd: what annotations with `iscrowd` 1 are: "regions", as in COCO, which are not learnt from and in which
            detections do not count as wrong; or "objects" like all others, for files of programs that write it for
            every mask, as CVAT does.
        box_format: what the four numbers of a box are. By default COCO's, x, y, width and height in pixels, and a file
            whose boxes are another's by all the evidence is refused; "xywh" takes them as they are. "xyxy" are corners,
            "cxcywh" has the centre first, and with "normalized-" before it they are shares of the image. Areas are then
            those of the boxes.
        classes: names of the classes to train on; by default all. Objects of others are left out, so they are
            background. Ids stay those of the file.
        merge_classes: classes that become one, by its name: `{room: [bedroom, kitchen]}`. It has the id of the category
            of its name, or the smallest of its parts. `classes` then names the new one.
        drop_empty: leave out training images without a box; by default they stay, as examples of what is not there.
        batch_size: training images per step and process.
        val_batch_size: evaluation images per step and process at the most: a batch holds images of one size, without
            padding, so that results are the same with any number.
        num_workers: loader processes; by default chosen from the number of cores and images, at most 8.
        augmentation: "coco", the published augmentation; "plans", for drawings; "flips", mirrored and
            turned by quarters only; "none", resizing only. Own `transforms` come before it.
        image_size: largest short side of a training image, and the short side in evaluation, in pixels.
        max_size: limit of the long side in pixels.
        augmentation_options: values for the options of the preset, by name: `{rotation: 0, crop: 0.3}`. See
            `dino_lightning.data.augmentation` for what there is.
        fixed_size: put every training image into a square canvas of this many pixels, for static shapes; bounds
            `image_size` and `max_size`.
        fixed_size_mode: how images fill that canvas. "pad": any size within it, as the augmentation gives it;
            "letterbox": the long side always fills it; "stretch": all of it is filled, proportions are given up, in
            evaluation and prediction too, where nothing is padded otherwise.
        pad_to_multiple: round height and width of a training batch up to a multiple of this.
        aspect_buckets: put training images of similar shape into a batch, which needs less padding and trains
            faster; where the augmentation turns images, all of a batch get the same orientation.
        cache_dir: folder in which images much larger than `image_size` are kept scaled down, so that they are decoded
            once and not in every epoch; may be shared by processes and runs. Augmentation then starts from the
            smaller image.
        cache_gigabytes: limit of that folder.
        val_fraction: share of the training images that becomes the validation split where there is none.
        on_bad_image: "error" stops at the first unreadable image file; "skip" reads all files of a split once
            before its first batch, and leaves the unreadable ones out. One that cannot be read any more later is
            an empty page that counts for nothing; how many there were is said at the end.
        seed: decides which images `val_fraction` takes.
        drawn_plans: floor plans to draw afresh for every epoch and train on beside the images, for datasets of rooms.
        mosaic: probability of making a training image out of four, each a quarter of it, 0 to 1.
        transforms: own transforms of training images, of torchvision.transforms.v2 or albumentations, each given as
            {class_path: ..., init_args: {...}} or in Python as an object. They run in this order on the image as it was
            read, before `augmentation` and its resizing; with augmentation "none" they take its place.
        repeat_factor_threshold: draw training images with rare classes more often (repeat factor sampling,
            arXiv 1908.03195): those of a class that a share f of the images has, below this one t, sqrt(t / f) times an
            epoch.

    Attributes:
        train_set: the training images.
        val_set: the validation images.
        test_set: the test images, or None.
        stretch_to: side in pixels of the square that all images are stretched to, or None.
        split_files: where the splits lie on disk, by name; without "val" where it is held out of "train".

    Raises:
        DataError: something is wrong with the files; the message says what and where.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        root: str,
        train_annotations: str | list[str] | None = None,
        train_images: str | None = None,
        val_annotations: str | list[str] | None = None,
        val_images: str | None = None,
        test_annotations: str | list[str] | None = None,
        test_images: str | None = None,
        crowd: CrowdRule = "regions",
        box_format: BoxFormat | None = None,
        classes: list[str] | None = None,
        merge_classes: dict[str, list[str]] | None = None,
        drop_empty: bool = False,
        batch_size: int = 2,
        val_batch_size: int = 1,
        num_workers: int | None = None,
        augmentation: Literal["coco", "plans", "flips", "none"] = "coco",
        image_size: int = 800,
        max_size: int = 1333,
        augmentation_options: dict[str, Any] | None = None,
        fixed_size: int | None = None,
        fixed_size_mode: CanvasMode = "pad",
        pad_to_multiple: int = 1,
        aspect_buckets: bool = False,
        cache_dir: str | None = None,
        cache_gigabytes: float = 20.0,
        val_fraction: float = 0.1,
        on_bad_image: Literal["error", "skip"] = "error",
        seed: int = 0,
        drawn_plans: int = 0,
        mosaic: float = 0.0,
        transforms: GivenTransforms | None = None,
        repeat_factor_threshold: float | None = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_stored(root, transforms)
        self.save_hyperparameters(storable(options, from_datasets=self._given is not None))
        check_options(**options)
        canvas = None if fixed_size is None else Canvas(fixed_size, fixed_size_mode)
        self.root = root
        self.repeat_factor_threshold = repeat_factor_threshold
        self.mosaic = mosaic
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.on_bad_image = on_bad_image
        self.pad_to = None if fixed_size is None else (fixed_size, fixed_size)
        self.pad_to_multiple = pad_to_multiple
        self.aspect_buckets = aspect_buckets

        splits = self._given or splits_of(options)
        for note in splits.notes:
            rank_zero_info(note)
        for repair in splits.repairs:
            rank_zero_warn(repair)
        self.classes = splits.classes
        self.split_files = dict(splits.files)

        image_size, max_size = largest_sides(image_size, max_size, fixed_size, fixed_size_mode)
        self.image_size, self.max_size = image_size, max_size
        self.stretch_to = fixed_size if fixed_size_mode == "stretch" else None
        training = with_own_transforms(
            transforms, train_transform(augmentation, image_size, max_size, augmentation_options, canvas)
        )
        # as `detect` and `predict` resize, which know of no canvas but that of stretching
        evaluation = eval_transform(image_size, max_size, canvas if self.stretch_to is not None else None)
        self.train_set, self.val_set, self.test_set = split_sets(
            splits,
            self._readers,
            training=training,
            evaluation=evaluation,
            on_bad_image=on_bad_image,
            caches=image_caches(cache_dir, image_size, max_size, cache_gigabytes, stretch_to=self.stretch_to),
        )
        self.drawn_plans = None if not drawn_plans else WithDrawnPlans(self.train_set, count=drawn_plans)
        if repeat_factor_threshold is not None:
            source = self.train_set.annotations
            labels = self.classes.labels_of(source)
            rank_zero_info(repeats_in_words(source, labels, repeat_factor_threshold, self.classes.names))

    # of `from_datasets`: what was read, and who reads the images
    _given: Splits | None = None
    _readers: Mapping[str, ImageReader] = {}  # replaced, never changed

    @classmethod
    def from_datasets(  # type: ignore[override]  # Lightning's takes any datasets, and has them batched by torch
        cls,
        train: Dataset[Any],
        val: Dataset[Any],
        *,
        class_names: ClassNames | None = None,
        test: Dataset[Any] | None = None,
        **options: Any,
    ) -> CocoDataModule:
        """A data module of map-style datasets in place of files.

        Each is read once from beginning to end for its boxes; images are read again when they are needed. Random
        transforms belong into `transforms`, not into the datasets.

        Args:
            train: `train[i]` gives an image, Pillow's or a tensor (3, h, w), uint8 or from 0 to 1, and its target: a
                dict with `boxes` (N, 4), corners in pixels or `tv_tensors.BoundingBoxes` of any format, `labels` (N,),
                and perhaps `image_id`, `iscrowd` and `area`; or a list of COCO annotations. Subsets of such are such.
            val: the validation images.
            class_names: the name of each label, as a dict, or as a list: of labels from 1 on, as in torchvision, or
                from 0 on if 0 occurs. By default the names of a COCO file behind the dataset, else "class 1" and so
                on, of the labels that occur.
            test: the test images, if there are any.
            options: those of `CocoDataModule` that are not about files.

        Raises:
            DataError: an entry of a dataset is something else; the message says which.
            ValueError: an option is out of range, or is about files.
        """
        refuse_options_of_files(options)
        datasets = {"train": train, "val": val, "test": test}
        module = cls.__new__(cls)
        module._given = read_datasets(datasets, class_names)
        module._readers = {
            name: ImageReader(dataset, name) for name, dataset in datasets.items() if dataset is not None
        }
        cls.__init__(module, root="", **options)
        return module

    @property
    def hparams_initial(self) -> Any:
        """The options as loggers show them: under `datamodule`, as some have a namesake in the model that differs."""
        return {"datamodule": dict(super().hparams_initial)}

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def class_names(self) -> list[str]:
        """The name of each label."""
        return list(self.classes.names)

    @property
    def category_ids(self) -> list[int]:
        """The `category_id` of each label in the annotation files."""
        return list(self.classes.category_ids)

    @property
    def most_boxes(self) -> int:
        """The most boxes to learn from that any training image has."""
        drawn = 0 if self.drawn_plans is None else MOST_DRAWN_ROOMS
        return max(most_boxes(self.train_set.annotations), drawn) * (4 if self.mosaic else 1)

    def worst_case_batch(self, batch_size: int, num_boxes: int | None = None) -> Batch:
        """A training batch as large as any that the loader can give: its images black, its boxes alike.

        Computed from the annotation file and the options; no image is opened.

        Args:
            batch_size: how many images.
            num_boxes: of each image; by default as many as any training image has.
        """
        transform = self.train_set.transform
        canvas = self.pad_to or largest_canvas(
            transform,
            (image.size for image in self.train_set.annotations.images),
            alone=batch_size == 1,
            oriented=self.aspect_buckets and turns(transform),
        )
        boxes = self.most_boxes if num_boxes is None else num_boxes
        return blank_batch(canvas, batch_size=batch_size, num_boxes=boxes, pad_to_multiple=self.pad_to_multiple)

    def hazards(self, num_queries: int) -> list[str]:
        """What of the training set can hardly be learnt at these sizes, a sentence each; opens no image.

        Args:
            num_queries: objects that the model can find in an image.
        """
        found = hazards(
            self.train_set.annotations,
            num_queries=num_queries,
            image_size=self.image_size,
            max_size=self.max_size,
            stretch_to=self.stretch_to,
        )
        own = most_boxes(self.train_set.annotations)
        if own <= num_queries < self.most_boxes:
            found.append(
                f"An image can have up to {self.most_boxes} boxes with mosaic or drawn plans, {own} without, and "
                f"the model has {num_queries} queries: boxes in excess are not learnt there. Raise --model.num_queries."
            )
        return found

    def class_table(self) -> str:
        """Category id, label, name, and the number of training and validation boxes of each class."""
        return class_table(self.classes, self.train_set.annotations, self.val_set.annotations)

    def summary(self) -> str:
        """One line per split: what it holds and where it comes from."""
        test = None if self.test_set is None else self.test_set.annotations
        return summary({"train": self.train_set.annotations, "val": self.val_set.annotations, "test": test})
