"""What can be wrong with a dataset: one name, one severity and one piece of advice for each kind.

An error is what `fit` refuses at its defaults (on_bad_image=error), no more and no less. So copies of training images
in the validation split, which make its metrics meaningless, are a warning: training itself works.
`inspect --strict` fails for warnings too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        severity: an error keeps training from starting; with a warning it starts, but not on the data the user
            expects; a note is for information.
        title: what was found, in a few words.
        advice: what it means and what to do.
    """

    severity: Severity
    title: str
    advice: str


KINDS: dict[str, Kind] = {
    "file-unreadable": Kind("error", "annotation file cannot be used", "Repair or export it again."),
    "entry-malformed": Kind("error", "malformed entries", "Repair these entries; the sentence says what is missing."),
    "duplicate-image-id": Kind("error", "image ids listed twice", "Give each image its own id."),
    "duplicate-category-id": Kind("error", "category ids listed twice", "Give each category its own id."),
    "unknown-image": Kind(
        "error", "annotations of images that are not listed", "Correct the image_id, or add the image."
    ),
    "unknown-category": Kind(
        "error", "annotations of categories that are not listed", "Correct the category_id, or add the category."
    ),
    "nothing-to-learn": Kind(
        "error", "no box to learn from", "Export the dataset with its boxes; the sentence says what there is instead."
    ),
    "class-unknown": Kind("error", "classes that the options name and no file has", "Use the names of the file."),
    "box-format": Kind(
        "error",
        "boxes that are not x, y, width, height in pixels",
        "Read them as what they are, with --data.box_format.",
    ),
    "box-malformed": Kind(
        "error", "boxes that are not four finite numbers", "Write x, y, width, height in pixels; NaN is no number."
    ),
    "segmentation-only": Kind("error", "neither a box nor a usable outline", "Write each bbox: x, y, width, height."),
    "too-few-images": Kind(
        "error", "too few images to hold some out for validation", "Add images, or give a validation split."
    ),
    "file-name-escapes": Kind(
        "error", "file names that leave the image folder", "Use names relative to the image folder, without '..'."
    ),
    "classes-differ": Kind(
        "error", "classes that differ between the splits", "Use the same ids and names in all annotation files."
    ),
    "image-missing": Kind(
        "error", "images listed but absent", "Restore the files, or take the images out of the annotations."
    ),
    "image-undecodable": Kind(
        "error", "images that cannot be decoded", "Replace damaged or truncated files, or train with on_bad_image=skip."
    ),
    "size-swapped": Kind(
        "error",
        "width and height swapped by EXIF rotation",
        "The annotations give the size before rotation; boxes are read in the frame in which the image is displayed. "
        "Annotate the image as displayed, or remove its EXIF orientation.",
    ),
    "size-differs": Kind(
        "error", "size in the annotations unlike the file's", "Boxes would be misplaced: correct the size or the file."
    ),
    "class-slivers": Kind(
        "warning",
        "classes whose boxes are nearly all slivers",
        "Are they walls or lines under the name of a class, or a wrong format? Look at the samples of the class. "
        "Slivers of a few pixels are hardly learnt, and boxes around walls are no rooms: annotate what the name "
        "says, or take the class out.",
    ),
    "class-all-the-same": Kind(
        "warning",
        "classes whose boxes are all the same",
        "Left from a template, or written by a wrong export? Look at the samples of the class. A detector would learn "
        "one size or one place, not what the objects look like.",
    ),
    "image-damaged": Kind(
        "warning",
        "images that the decoder repaired",
        "Bytes are missing or wrong, so parts of the image may be grey, shifted or of other colours under boxes that "
        "were right. Training uses it as it is. Look at it, and restore the file; the sentence is the decoder's.",
    ),
    "box-without-area": Kind(
        "warning", "boxes without area inside their image", "They are dropped. Zero or negative width or height?"
    ),
    "box-outside": Kind("warning", "boxes that stick out of their image", "Training clips them to the border."),
    "box-covers-image": Kind(
        "warning", "boxes that cover the whole image", "Often an image-level label exported as a box. Is it meant?"
    ),
    "box-tiny": Kind(
        "warning",
        "boxes of less than 4 pixels at the training size",
        "They can hardly be learnt. Train at a larger image_size, or cut the images into tiles.",
    ),
    "duplicate-box": Kind(
        "warning", "the same box of the same class twice", "A detector can find it once only. Remove one of them."
    ),
    "duplicate-annotation-id": Kind(
        "warning", "annotation ids used twice", "Harmless here, but other tools lose one of the two."
    ),
    "too-many-boxes": Kind(
        "warning",
        "more boxes in an image than the model has queries",
        "Those in excess are never learnt. Raise model.num_queries, or cut the images into tiles.",
    ),
    "beyond-evaluation": Kind(
        "warning",
        "more boxes in an image than evaluation counts",
        "It keeps the best detections of each image, and COCO's metrics count 100 of each class, so recall cannot be "
        "full. Raise model.max_detections where an image has more boxes than that, or cut the images into tiles.",
    ),
    "area-malformed": Kind(
        "warning",
        "areas that are no number or negative",
        "Width times height is taken. The area decides whether evaluation counts a box as small, medium or large.",
    ),
    "area-implausible": Kind(
        "warning",
        "areas that cannot be those of their boxes",
        "Width times height is taken. The area decides whether evaluation counts a box as small, medium or large.",
    ),
    "other-annotations": Kind(
        "warning",
        "annotation files that are not used",
        'Several files of a split are read where all are named: --data.train_annotations "[a.json, b.json]".',
    ),
    "unused-annotations": Kind("note", "annotation files of no split", "They are not used."),
    "same-file": Kind("warning", "image files listed under two ids", "Merge their annotations under one id."),
    "duplicate-image": Kind(
        "warning", "copies of the same image", "Their annotations may contradict each other. Keep one."
    ),
    "leak": Kind(
        "warning",
        "images that are also in another split",
        "Metrics on them measure memorisation, not generalisation. Take them out of one of the splits.",
    ),
    "leak-near": Kind(
        "warning",
        "near-duplicates of an image in another split",
        "Scaled or saved again? Then metrics on them measure memorisation, not generalisation.",
    ),
    "duplicate-category-name": Kind(
        "warning", "categories of the same name", "They are learnt as different classes. Merge them."
    ),
    "category-unused": Kind(
        "warning", "categories without a box to train on", "A class that cannot be learnt. Remove it, or add examples."
    ),
    "animated": Kind("warning", "animated or multi-page images", "Only the first frame or page is read."),
    "near-duplicate": Kind("note", "near-duplicates of another image", "Scaled or saved again? Keep one of them."),
    "near-unfinished": Kind(
        "note",
        "not all images were compared for likeness",
        "Too many of them look alike at a small size. Exact copies were found all the same.",
    ),
    "category-missing": Kind("note", "training classes without a box in this split", "They get no metrics here."),
    "root-category": Kind(
        "note",
        "a category that is no class",
        "The root that Roboflow exports put above all classes. It is left out of training.",
    ),
    "no-boxes": Kind("note", "images without boxes", "Fine as examples of what is not there; check that it is meant."),
    "not-listed": Kind("note", "image files that the annotations do not list", "They are not used."),
    "no-validation": Kind("note", "no validation split", "A tenth of the training images is held out for it."),
    "exif-rotated": Kind("note", "images rotated by EXIF", "They are turned upright; boxes must fit that frame."),
    "grey": Kind("note", "grey images", "Read as RGB with three equal channels."),
    "sixteen-bit": Kind("note", "16-bit images", "Scaled to 8 bits: 65535 becomes 255."),
    "palette": Kind("note", "palette images", "Read as RGB."),
    "transparent": Kind("note", "images with transparency", "Laid on white."),
    "value-converted": Kind(
        "note", "numbers and ids written as another type", "Read without loss. Other tools may refuse them."
    ),
    "classes-chosen": Kind("note", "classes left out or merged", "As the options say; their boxes are background."),
    "empty-dropped": Kind("note", "training images without a box left out", "As drop_empty says."),
    "id-numbered": Kind("note", "ids that are words", "They are numbered; predictions name files and classes."),
    "image-size-from-file": Kind("note", "images listed without width and height", "Read from the files' headers."),
    "box-from-outline": Kind("note", "outlines without a box", "The extent of the outline is the box."),
    "category-repeated": Kind("note", "categories listed several times", "Read as one category."),
    "classes-by-name": Kind(
        "note", "category ids unlike the training file's", "The names agree, and classes are matched by name."
    ),
    "file-name-matched": Kind(
        "note", "file names of another machine or program", "Matched with the files in the image folder."
    ),
    "split-field": Kind("note", "one file for several splits", "Its images say which they belong to."),
    "images-of-no-split": Kind("note", "images of no split", "The file gives each image a split, and these have none."),
    "other-format": Kind("note", "a dataset in another format than COCO's", "Read as that format defines it."),
    "box-rounded": Kind(
        "note", "boxes that stick out of their image by a pixel or less", "Rounding; training clips them to the border."
    ),
    "crowd-odd": Kind("note", "values of iscrowd that are no number", "Read as 0: an ordinary box. Write 0 or 1."),
    "cmyk": Kind("note", "CMYK images", "Converted to RGB."),
    "name-unlike-format": Kind("note", "file names unlike the format", "Read by content; other tools go by the name."),
}


@dataclass(frozen=True)
class Case:
    """One instance of a finding.

    Attributes:
        detail: what distinguishes this case from the others of its kind.
        image_id: the image concerned.
        annotation_id: the annotation concerned.
        file_name: the image file, as the annotations name it.
    """

    detail: str = ""
    image_id: int | None = None
    annotation_id: int | None = None
    file_name: str | None = None


@dataclass(frozen=True)
class Finding:
    """All cases of one kind in one split.

    Attributes:
        kind: a key of `KINDS`.
        split: "train", "val" or "test".
        cases: at least one.
    """

    kind: str
    split: str
    cases: tuple[Case, ...]

    @property
    def severity(self) -> Severity:
        """The severity of its kind: "error", "warning" or "note"."""
        return KINDS[self.kind].severity
