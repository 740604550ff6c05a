"""Image folders and tar files: the folder of a split, its classes, its files; the same for training and evaluation.

timm reads the data folder itself where it has no folder for a split, takes hidden folders for classes, and leaves out
the images of classes that a class map does not name. All of that is silent, and changes what labels mean; here it is an
error, or does not happen.
"""
import contextlib
import logging
import numbers
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from timm.data import ImageDataset, create_dataset
from timm.data.readers import get_img_extensions, set_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

from .errors import OptionError, WorkerError, one_line
from .fields import CheckedReader, CheckedTarget, Reader
from .image_files import EXTENSIONS, counted, extension, is_hidden, open_file, readable

_logger = logging.getLogger(__name__)

# Names that stand for each other, the first that exists; as timm has them.
SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
_NAMED = ("torch", "hfds", "hfids", "tfds", "wds")
_SPLITS = frozenset(name for names in SYNONYMS for name in names) | {"test", "testing", "dev"}


def split_root(data_dir: str, split: str, origin: str) -> str:
    """The folder, or tar file, of a split: the one of its name, in whatever case, else one of a name like it.

    Args:
        data_dir: Folder of the splits, or of the classes if there are no splits, or a tar file.
        split: Its name; empty: all of ``data_dir``.
        origin: The flag that the split is from, with its value.

    Returns:
        Its path: ``data_dir`` where that has no splits.

    Raises:
        OptionError: There are other splits but not this one.
    """
    if not os.path.isdir(data_dir):
        return data_dir
    name = split.split("[")[0]
    path = os.path.join(data_dir, name)
    if name and (os.path.isdir(path) or os.path.isfile(path) and extension(path) == ".tar"):
        return path
    folders = _folders(data_dir, origin)
    names = next((names for names in SYNONYMS if name.lower() in names), (name.lower(),))
    for wanted in (name.lower(), *names) if name else ():
        found = [folder for folder in folders if folder.lower() == wanted]
        if len(found) > 1 and wanted not in found:
            raise OptionError(
                f"{origin}: --data-dir {data_dir} has {' and '.join(found)}; name one of them, in its case")
        if found:
            return os.path.join(data_dir, wanted if wanted in found else found[0])
    if any(folder.lower() in _SPLITS for folder in folders):
        raise OptionError(f"{origin}: --data-dir {data_dir} has no such folder, but {_some(folders)}, whose images "
                          f"would be mixed; name one of them")
    return data_dir


def _folders(folder: str, origin: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    except OSError as e:
        raise OptionError(f"{origin}: {folder} cannot be read: {e.strerror}; check its permissions") from None


def _some(names: Collection[str], limit: int = 6) -> str:
    return ", ".join(list(names)[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def read_class_map(path: str, *folders: str) -> dict[Any, int]:
    """Class names and their numbers: the lines of a text file, or a pickled dictionary.

    Args:
        path: Of the file.
        folders: Where it is looked for if there is none of this path.

    Raises:
        OptionError: It cannot be read, or does not give each class a number of its own place.
    """
    def wrong(what: object) -> OptionError:
        return OptionError(f"--class-map {path}: {what}; give a text file with a class per line")

    places = [path, *(os.path.join(folder, path) for folder in folders if folder)]
    found = next((place for place in places if os.path.isfile(place)), None)
    if found is None:
        raise wrong("there is no such file")
    if extension(found) != ".txt":
        try:
            classes = load_class_map(found)
        except Exception as e:  # unpickling raises almost anything
            raise wrong(one_line(e)) from None
        numbered = all(isinstance(index, numbers.Integral) and int(index) >= 0 for index in classes.values())
        if not classes or not numbered:
            raise wrong("it does not map names to numbers from 0 on")
        return {name: int(index) for name, index in classes.items()}
    try:
        with open(found, encoding="utf-8-sig") as f:  # a byte-order mark is no part of the first name
            lines = [line.strip() for line in f.read().rstrip().split("\n")]
    except (OSError, ValueError) as e:
        raise wrong(one_line(e)) from None
    if "" in lines:
        raise wrong(f"line {lines.index('') + 1} is blank, which would count as a class")
    twice = sorted({line for line in lines if lines.count(line) > 1}) if len(set(lines)) < len(lines) else []
    if twice:
        raise wrong(f"it names {_some(twice)} twice")
    return {line: i for i, line in enumerate(lines)}


def numbered_classes(labels: Collection[str], folders: Collection[str], class_map: Mapping[Any, int] | None,
                     origin: str, path: str) -> dict[Any, int]:
    """The number of each class: of the class map, else its place in timm's natural order.

    Args:
        labels: Names of the classes that have images.
        folders: Names of all folders, empty ones too.
        class_map: Of :func:`read_class_map`; None: there is none.
        origin: The flag that the images are from, with its value.
        path: Of the class map.

    Raises:
        OptionError: The class map and the folders do not name the same classes.
    """
    if class_map is None:
        # of names such as 1 and 01, which are alike to natural_key, the order would be that of a set
        return {name: i for i, name in enumerate(sorted(set(labels), key=lambda name: (natural_key(name), name)))}
    unknown = sorted(set(labels) - set(class_map), key=natural_key)
    missing = sorted(map(str, set(class_map) - set(folders)), key=natural_key)
    if unknown or missing:
        parts = []
        if unknown:
            parts.append(f"it does not name {len(unknown)} of {len(labels)} folders with images ({_some(unknown)}), "
                         f"which would be left out")
        if missing:
            parts.append(f"{len(missing)} of its {len(class_map)} classes have no folder ({_some(missing)})")
        raise OptionError(f"{origin}: --class-map {path}: {', and '.join(parts)}; mend the names, or add what is "
                          f"missing (a folder may be empty)")
    return dict(class_map)


class FolderReader(ReaderImageFolder):
    """timm's reader of class folders, in its order, after one walk that passes over what is hidden.

    Args:
        root: The folder.
        extensions: Of the files that are read, in lower case.
        class_map: Of :func:`read_class_map`; None: classes are numbered in timm's natural order.
        class_map_path: Of its file.
        img_mode: That images will be converted to.
        origin: The flag that the folder is from, with its value.
        flat: Whether folders in class folders are an error: nothing says that these are classes, and not splits.

    Raises:
        OptionError: There are no images, or what is there are no classes.
    """

    def __init__(self, root: str, extensions: Collection[str], class_map: Mapping[Any, int] | None, class_map_path: str,
                 img_mode: str | None, origin: str, flat: bool) -> None:
        self.root, self.img_mode = root, img_mode
        labelled: list[tuple[str, str]] = []
        others: list[str] = []
        folders: set[str] = set()
        for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_unreadable(origin)):
            subfolders[:] = [name for name in subfolders if not is_hidden(name)]
            folders.update(subfolders)
            inside = os.path.relpath(folder, root) if folder != root else ""
            images = [name for name in files if not is_hidden(name) and extension(name) in extensions]
            others += [name for name in files if not is_hidden(name) and extension(name) not in extensions]
            if images and flat and os.sep in inside:
                raise OptionError(f"{origin}: {root} has no such folder, but {_some(_folders(root, origin))}, which "
                                  f"hold folders of images; are these splits? Name one of them, or '' for all of them")
            labelled += [(os.path.join(folder, name), os.path.basename(inside)) for name in images]
        labels = {label for _, label in labelled}
        self.left_out = counted(others)
        if not labelled:
            raise OptionError(f"{origin}: no images in folders of {root}{f' ({self.left_out})' if others else ''}; "
                              f"give the folder of the classes' folders, with {', '.join(sorted(extensions))}")
        if "" in labels and len(labels) > 1:
            stray = [os.path.basename(path) for path, label in labelled if not label]
            raise OptionError(f"{origin}: {root} has {len(stray)} images beside its class folders ({_some(stray, 3)}), "
                              f"which would be a class of their own; move them away")
        self.class_to_idx = numbered_classes(labels, folders | labels, class_map, origin, class_map_path)
        labelled.sort(key=lambda sample: (natural_key(sample[0]), sample[0]))
        self.samples = [(path, self.class_to_idx[label]) for path, label in labelled]

    def __getitem__(self, index: int) -> Any:
        path, target = self.samples[index]
        return readable(open_file(path), self.img_mode), target


class TarReader(ReaderImageInTar):
    """timm's reader of a tar file of class folders; arguments and errors are those of :class:`FolderReader`."""

    def __init__(self, root: str, extensions: Collection[str], class_map: Mapping[Any, int] | None, class_map_path: str,
                 img_mode: str | None, origin: str) -> None:
        self.img_mode, self.left_out = img_mode, ""
        try:
            with _read_by_timm(extensions):
                super().__init__(root)
        except Exception as e:  # tarfile raises errors of its own, timm ValueError for a tar without images
            raise OptionError(f"{origin}: {root} has no images, or cannot be read ({one_line(e, 120)}); give a tar "
                              f"file of class folders") from None
        shown = [i for i, (info, *_) in enumerate(self.samples)
                 if not any(is_hidden(part) for part in info.path.split("/") if part != ".")]
        names = [self.class_idx_to_name[self.targets[i]] for i in shown]
        if not names:
            raise OptionError(f"{origin}: {root} has hidden files only; give a tar file of class folders")
        if len(set(names)) > 1 and {"", "."} & set(names):
            raise OptionError(f"{origin}: {root} has images beside its class folders, which would be a class of their "
                              f"own; take them out")
        self.class_to_idx = numbered_classes(set(names), set(names), class_map, origin, class_map_path)
        self.samples = self.samples[shown]
        self.targets = np.array([self.class_to_idx[name] for name in names])
        self.class_name_to_idx = self.class_to_idx
        self.class_idx_to_name = {index: name for name, index in self.class_to_idx.items()}

    def __getitem__(self, index: int) -> Any:
        file, target = super().__getitem__(index)
        return readable(file, self.img_mode), target


class EightBitReader(Reader):
    """Another reader's samples, whose images have 8 bits.

    Args:
        reader: As of :class:`Reader`.
        img_mode: That images will be converted to.
    """

    def __init__(self, reader: Any, img_mode: str | None) -> None:
        super().__init__(reader)
        self.img_mode = img_mode

    def __getitem__(self, index: int) -> Any:
        file, *rest = super().__getitem__(index)
        return readable(file, self.img_mode), *rest


class NothingReadable(WorkerError):
    """So many images in a row cannot be read that none may be left."""


class Images(ImageDataset):
    """timm's data set of images, which goes on with the next one where one cannot be read, but not for ever.

    Attributes:
        origin: The flag that the images are from, with its value.
    """

    origin = ""

    def __getitem__(self, index: int) -> Any:
        """Raises NothingReadable where timm gives up."""
        try:
            return super().__getitem__(index)
        except RuntimeError as e:
            if "consecutive samples" not in str(e):
                raise
            raise NothingReadable(f"{self.origin}: {self._max_retries} images in a row cannot be read, from "
                                  f"{self.filename(index)} on, for the reasons above; restore the files") from None


def open_files(data_dir: str, split: str, origin: str, *, class_map: str = "", input_key: str | None = None,
               img_mode: str | None = "RGB", load_bytes: bool = False, verbose: bool = True,
               target_transform: Any = None, **fields: str | None) -> ImageDataset:
    """The images of a split in a folder, or in a tar file.

    Args:
        data_dir, split, origin: As of :func:`split_root`.
        class_map: Path of the class map, also below the split's folder or ``data_dir``; empty: none.
        input_key: Extensions of the files, separated by semicolons; None: ``EXTENSIONS``.
        img_mode: PIL mode that images are converted to.
        load_bytes: Give the files' bytes instead of images.
        verbose: Whether to log how many files are left out.
        target_transform: Of the numbers of the classes.
        fields: Options for data sets with named fields, which files have not: None.

    Raises:
        OptionError: They are not there, or what is there are no classes.
    """
    for name, value in fields.items():
        if value is not None:
            raise OptionError(f"--{name.replace('_', '-')} {value}: a folder or a tar file has no named fields; leave "
                              f"it out, or name the data set by --dataset")
    root = split_root(data_dir, split, origin)
    classes = read_class_map(class_map, root, data_dir) if class_map else None
    extensions = EXTENSIONS
    if input_key:
        extensions = frozenset(f".{key.strip().lower().lstrip('.')}" for key in input_key.split(";") if key.strip())
    where = f"{origin} of --data-dir {data_dir}"
    reader: FolderReader | TarReader
    if os.path.isfile(root):
        reader = TarReader(root, extensions, classes, class_map, img_mode, where)
    else:
        # an empty name asks for all of the folder
        flat = bool(split) and os.path.realpath(root) == os.path.realpath(data_dir)
        reader = FolderReader(root, extensions, classes, class_map, img_mode, where, flat)
    if reader.left_out and verbose:
        _logger.info(f"{root}: {reader.left_out}")
    images = Images(root, reader=reader, load_bytes=load_bytes, input_img_mode=img_mode,
                    target_transform=target_transform)
    images.origin = where
    return images


def open_named(name: str, data_dir: str | None, split: str, origin: str, *, num_classes: int, class_map: str = "",
               img_mode: str = "RGB", target_transform: Any = None, counted_by: str = "--num-classes",
               **options: Any) -> Any:
    """One of the data sets that a library knows by its name, through timm.

    Args:
        name: ``torch/NAME``, ``hfds/NAME``, ``hfids/NAME``, ``tfds/NAME`` or ``wds/NAME``.
        data_dir: Where it is, or is kept.
        split: Its name.
        origin: The flag that the split is from, with its value.
        num_classes: How many there are.
        class_map: Path of the class map, also below ``data_dir``; empty: none.
        img_mode: PIL mode that images are converted to.
        target_transform: Makes targets of what the samples hold; None: that is a class.
        counted_by: The flag that ``num_classes`` is from.
        options: Further arguments of ``timm.data.create_dataset``.

    Raises:
        OptionError: It is of no known kind, or timm or the library cannot open it.
    """
    kind, separator, rest = name.partition("/")
    if kind.lower() not in _NAMED or not separator:
        raise OptionError(f"--dataset {name} is of no known kind: use {', '.join(f'{k}/NAME' for k in _NAMED)}, or "
                          f"leave it out for a folder or a tar file")
    where = f"{origin} of --data-dir {data_dir} --dataset {name}"
    of_files = kind.lower() == "torch" and rest.lower() in ("folder", "image_folder") and bool(data_dir)
    if class_map:
        options["class_map"] = read_class_map(class_map, data_dir or "")
    root = split_root(data_dir or "", split, origin) if of_files else data_dir
    try:
        dataset = create_dataset(
            name, root=root, split=split, search_split=False, input_img_mode=img_mode,
            target_transform=CheckedTarget(target_transform, num_classes, where, counted_by), **options)
    except Exception as e:  # a library's own, of its files, its network or the options
        raise OptionError(f"{where}: {one_line(e)}; check the data set's name, the folder and the split") from e
    if of_files and (hidden := [label for label in class_to_idx(dataset) if is_hidden(label)]):
        raise OptionError(f"{where}: torchvision takes hidden folders for classes ({_some(hidden)}); leave out "
                          f"--dataset, or remove them")
    if isinstance(dataset, ImageDataset):
        dataset.reader = EightBitReader(dataset.reader, img_mode)
    if hasattr(dataset, "reader"):  # torchvision's own have none
        dataset.reader = CheckedReader(dataset.reader, where)
    return dataset


def class_to_idx(dataset: Any) -> dict[Any, int]:
    """The number of each class of any of timm's or torchvision's data sets; empty if it does not say."""
    for holder in (getattr(dataset, "reader", None), dataset):
        classes = getattr(holder, "class_to_idx", None)
        if isinstance(classes, dict) and classes:
            return classes
    return {}


@contextlib.contextmanager
def _read_by_timm(extensions: Collection[str]) -> Iterator[None]:
    """Makes these the formats that timm looks for."""
    before: Sequence[str] = get_img_extensions()
    set_img_extensions(sorted(extensions))
    try:
        yield
    finally:
        set_img_extensions(before)


def _unreadable(origin: str) -> Any:
    def refuse(error: OSError) -> None:
        raise OptionError(f"{origin}: {error.filename} cannot be read: {error.strerror}; check its permissions")
    return refuse
