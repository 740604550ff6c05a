"""What a named data set gives for a sample: wrong fields and targets are found late, often in a worker process."""
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .errors import OptionError, WorkerError, one_line, shown

_OF_FIELDS = (KeyError, IndexError, TypeError, ValueError, AttributeError)


class FieldError(WorkerError):
    """A sample has not what the command line asks for."""


class Reader:
    """Another reader's samples.

    Args:
        reader: Gives an open file and a target, by index or one after the other.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __getitem__(self, index: int) -> Any:
        return self.reader[index]

    def __iter__(self) -> Iterator[Any]:
        yield from self.reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name == "reader":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.reader, name)


class CheckedReader(Reader):
    """A reader whose errors name the flags that say which fields to read.

    Args:
        reader: As of :class:`Reader`.
        origin: The data set by its flags.
    """

    def __init__(self, reader: Any, origin: str) -> None:
        super().__init__(reader)
        self.origin = origin

    def __getitem__(self, index: int) -> Any:
        """Raises FieldError if a field is not there, or the target is none."""
        with self._named():
            return self._whole(super().__getitem__(index))

    def __iter__(self) -> Iterator[Any]:
        """Raises FieldError if a field is not there, or a target is none."""
        with self._named():
            yield from map(self._whole, self.reader)

    def _whole(self, sample: Any) -> Any:
        if sample[1] is None:  # timm makes it -1, which no loss takes
            raise FieldError(f"{self.origin} has images without a target: name a split with labels, or mend "
                             f"--target-key")
        return sample

    def _named(self) -> contextlib.AbstractContextManager[None]:
        return _as_field_error(f"{self.origin}: ", "; check --input-key, --target-key and --class-map")


class CheckedTarget:
    """Makes a target of what a sample holds, and says which flags are about it where that is impossible.

    Args:
        transform: Makes it; None: it is a class.
        num_classes: How many classes there are.
        origin: The data set by its flags.
        flag: That says how many classes there are.
    """

    def __init__(self, transform: Callable[[Any], torch.Tensor] | None, num_classes: int, origin: str,
                 flag: str = "--num-classes") -> None:
        self.transform, self.num_classes, self.origin, self.flag = transform, num_classes, origin, flag

    def __call__(self, target: Any) -> Any:
        """Raises FieldError if it is none."""
        if self.transform is not None:
            with _as_field_error(f"{self.origin}: ", "; check --target-key, --target-format and --num-classes"):
                return self.transform(target)
        try:
            number = int(target)
            whole = bool(number == target)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            whole = False
        if not whole:
            raise FieldError(f"{self.origin} has the target {shown(target)}, which is no number of a class: name the "
                             f"field that holds one by --target-key, or give --class-map")
        if number == -1:  # what test splits have whose labels are kept secret
            raise FieldError(f"{self.origin} has images without a class (-1): name a split with labels, or mend "
                             f"--target-key")
        if not 0 <= number < self.num_classes:
            raise FieldError(f"{self.origin} has the class {target}, the model {self.num_classes} outputs: mend "
                             f"{self.flag}, --target-key or --class-map")
        return target


@contextlib.contextmanager
def _as_field_error(before: str, after: str) -> Iterator[None]:
    try:
        yield
    except OptionError:
        raise
    except _OF_FIELDS as e:
        raise FieldError(f"{before}{one_line(e).rstrip('.')}{after}") from e
