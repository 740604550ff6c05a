"""Runs as one CSV file, small enough for a repository: what they were asked for, and what came out, without weights.

One line per option or line of a file: ``run,file,key,value``. Options that all runs have in common stand once, under
the run ``*``. Of the outputs of ``validate.py --save-outputs`` the images that were right are kept, as bits, and the
names of the images once, under the run ``*``: comparisons over images need no more.
"""
import csv
import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from ..cli.errors import OptionError, one_line
from ..cli.parser import read_yaml
from ..cli.text import csv_text, write_table
from ..evaluation import outputs
from ..report.runs import find_runs
from ..runs import files, timing
from ..runs.sameness import NOT_COMPARED, data_dir_of, placeless

HEADER = ("run", "file", "key", "value")
_ALL = "*"
_IMAGES = "names"  # of images, under the run _ALL and by a digest
_LINES = (files.SUMMARY, timing.FILE)


def pack(root: str, path: str) -> int:
    """Writes all runs below a folder into one file.

    Args:
        root: The folder.
        path: The CSV file.

    Returns:
        How many runs there are.

    Raises:
        OptionError: There are none, one cannot be read, or the file cannot be written, or holds something else.
    """
    folders = sorted(find_runs([root]))
    options = {folder: _options(folder) for folder in folders}
    first = next(iter(options.values()))
    common = {key: value for key, value in first.items()
              if key != "seed"  # so that each run has a line, though nothing came of it
              and all(key in other and other[key] == value for other in options.values())}
    rows: list[Sequence[object]] = [(_ALL, files.ARGS, key, _text(value)) for key, value in common.items()]
    images: dict[str, str] = {}
    for folder, args in options.items():
        run = os.path.relpath(folder, root)
        rows += [(run, files.ARGS, key, _text(value)) for key, value in args.items() if key not in common]
        # a run that went on with other options is no run of these
        rows += [(run, name, key, _text(value)) for name in sorted(filter(_is_before, os.listdir(folder)))
                 for key, value in _options(folder, name).items()]
        for name in sorted(_names(folder)):
            rows += [(run, name, *line) for line in _content(folder, name, images)]
    rows += [(_ALL, _IMAGES, digest, names) for digest, names in images.items()]
    write_table(path, csv_text(HEADER, rows), "--to")
    return len(folders)


def unpack(path: str, root: str) -> int:
    """Writes the folders of the runs in a file of :func:`pack`.

    Args:
        path: The CSV file.
        root: A folder that is not there yet.

    Returns:
        How many runs there are.

    Raises:
        OptionError: The file is none of these, or the folder is in use or cannot be written.
    """
    if os.path.lexists(root):
        raise OptionError(f"{root} is in use: remove it, or name another folder")
    rows = _read(path)
    common = {row["key"]: row["value"] for row in rows if row["run"] == _ALL and row["file"] == files.ARGS}
    images = {row["key"]: row["value"] for row in rows if row["run"] == _ALL and row["file"] == _IMAGES}
    runs: dict[str, dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        if row["run"] != _ALL:
            runs.setdefault(row["run"], {}).setdefault(row["file"], []).append(row)
    try:
        # of all runs before anything is written
        options = {run: _options_again({**common, **_by_key(parts.pop(files.ARGS, []))}) for run, parts in runs.items()}
        earlier = {(run, name): _options_again(_by_key(parts.pop(name)))
                   for run, parts in runs.items() for name in list(filter(_is_before, parts))}
        saved = {(run, name): _outputs_again(parts.pop(name), images)
                 for run, parts in runs.items() for name in list(filter(_holds_outputs, parts))}
    except (ValueError, KeyError) as e:
        raise OptionError(f"{path}: {one_line(e)}; give a file that pack has written") from e
    try:
        for run, parts in runs.items():
            folder = os.path.join(root, run)
            os.makedirs(folder, exist_ok=True)  # a run may lie in another one
            _write(folder, files.ARGS, [options[run]])
            for name, lines in parts.items():
                _write(folder, name, [row["value"] for row in lines])
        for (run, name), text in earlier.items():
            _write(os.path.join(root, run), name, [text])
        for (run, name), arrays in saved.items():
            os.makedirs(os.path.dirname(os.path.join(root, run, name)), exist_ok=True)
            np.savez(os.path.join(root, run, name), allow_pickle=False, **arrays)
    except OSError as e:
        raise OptionError(f"{root} cannot be written ({e.strerror}): name another folder") from e
    return len(runs)


def _is_before(name: str) -> bool:
    """Whether a file holds the options of a run up to where it went on with others."""
    return fnmatch.fnmatchcase(name, files.ARGS_BEFORE.format("*"))


def _by_key(rows: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {row["key"]: row["value"] for row in rows}


def _options_again(values: Mapping[str, str]) -> str:
    """What ``args.yaml`` is to hold, of values as :func:`_text` has written them."""
    return yaml.safe_dump({key: json.loads(value) for key, value in values.items()},
                          default_flow_style=False).rstrip("\n")


def _outputs_again(lines: Sequence[Mapping[str, str]], images: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The arrays of a file of outputs, of lines as :func:`_bits` has written them."""
    found = _by_key(lines)
    names = np.array(json.loads(images[found["names"]]))
    bits = np.frombuffer(bytes.fromhex(found["right"]), np.uint8)
    if names.ndim != 1 or names.dtype.kind != "U" or len(bits) != -(-len(names) // 8):
        raise ValueError("outputs are torn")
    return dict(names=names, right=np.unpackbits(bits, count=len(names)).astype(bool))


def _names(folder: str) -> list[str]:
    """The files that are kept: tables of the training, results of evaluations, in folders too, and outputs."""
    found = [os.path.relpath(os.path.join(place, name), folder)
             for place, _, names in os.walk(folder) for name in names]
    return [*(name for name in found if name.endswith(".json") or _holds_outputs(name)),
            *(name for name in _LINES if os.path.isfile(os.path.join(folder, name)))]


def _holds_outputs(name: str) -> bool:
    return name.endswith(".npz") and os.path.dirname(name).endswith(".outputs")


def _portable(value: Any) -> Any:
    """Results without the folders of the machine: of a path its last two parts."""
    if isinstance(value, dict):
        return {key: _portable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_portable(part) for part in value]
    return os.path.join(*value.split(os.sep)[-2:]) if isinstance(value, str) and os.path.isabs(value) else value


def _bits(path: str, images: dict[str, str]) -> list[tuple[object, str]]:
    """Which images were right, eight a byte in hexadecimal, and the digest of their names, which go to ``images``."""
    saved = outputs.read(path)
    names = _text(list(saved.names))
    digest = hashlib.sha256(names.encode()).hexdigest()[:12]
    images[digest] = names
    return [("names", digest), ("right", np.packbits(saved.right).tobytes().hex())]


def _content(folder: str, name: str, images: dict[str, str]) -> list[tuple[object, str]]:
    """The lines of a table with their numbers, all of a JSON file in one, or what is kept of outputs."""
    try:
        if _holds_outputs(name):
            return _bits(os.path.join(folder, name), images)
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            if name in _LINES:
                lines = list(f)
                if lines and not lines[-1].endswith("\n"):
                    raise ValueError("its last line does not end")  # unpacked it would pass for a whole one
                return [(number, line.rstrip("\n")) for number, line in enumerate(lines)]
            return [("", _text(_portable(json.load(f))))]  # of an evaluation
    except (OSError, ValueError, RecursionError) as e:
        raise OptionError(f"{folder}: {name} cannot be read: {one_line(e)}; remove the file, or the folder") from e


def _options(folder: str, name: str = files.ARGS) -> dict[str, Any]:
    """What the run was asked for, without what is of the machine."""
    try:
        found = read_yaml(os.path.join(folder, name))
        if not isinstance(found, dict):
            raise ValueError("it holds no options of a training")
        _text(found)
    except (OSError, ValueError, TypeError, RecursionError) as e:  # dates and sets are no option's value
        raise OptionError(f"{folder}: {name} cannot be read: {one_line(e)}; remove the folder") from e
    kept = {key: placeless(key, value) for key, value in found.items() if key not in NOT_COMPARED or key == "seed"}
    kept["data_dir"] = placeless("data_dir", data_dir_of(found))
    return kept


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _read(path: str) -> list[dict[str, str]]:
    limit = csv.field_size_limit(1 << 28)  # of the whole process
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    except (OSError, ValueError, csv.Error) as e:
        raise OptionError(f"{path} cannot be read: {one_line(e)}; give a file that pack has written") from e
    finally:
        csv.field_size_limit(limit)
    names = {(row.get("run") or "", row.get("file") or "") for row in rows}
    # a line that is torn has fewer fields, which are None, and one that is none of ours more, under the key None
    whole = all(tuple(row) == HEADER and None not in row.values() for row in rows)
    if not rows or not whole or not all(map(_is_inside, (part for pair in names for part in pair))):
        raise OptionError(f"{path} is no file that pack has written: give one")
    return [{**row, "value": row["value"].removeprefix("'") if row["value"].startswith("'-") else row["value"]}
            for row in rows]


def _is_inside(name: str) -> bool:
    """Whether a name leads nowhere else."""
    return bool(name) and not os.path.isabs(name) and ".." not in name.split("/")


def _write(folder: str, name: str, lines: Iterable[str]) -> None:
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(f"{line}\n" for line in lines)
