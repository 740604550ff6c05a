"""Files of defaults by name: the recipes that come with the package, wherever it is installed."""
import difflib
import functools
import os

from .errors import OptionError

ENDING = ".yaml"
_FOLDER = "hparams"
_NEAREST = 3


def folder() -> str:
    """Where the recipes lie: inside an installed package, beside the package in a clone."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    inside = os.path.join(package, _FOLDER)
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), _FOLDER)


@functools.cache
def names() -> tuple[str, ...]:
    """All recipes, such as ``imagenet/resnet50/sam_all``; what only serves as a base is none."""
    found = []
    for here, _, files in os.walk(folder()):
        where = os.path.relpath(here, folder())
        found += [os.path.normpath(os.path.join(where, file)).replace(os.sep, "/").removesuffix(ENDING)
                  for file in files if file.endswith(ENDING) and not file.endswith(f"base{ENDING}")]
    return tuple(sorted(found))


def find(name: str, beside: str = "") -> str:
    """The file that is meant by a path, or by the name of a recipe; both with or without ``.yaml``.

    A file of one's own wins. ``hparams/`` may stand before a recipe's name, as in a clone.

    Args:
        name: As it was given.
        beside: The folder that a path is relative to; empty: the current one.

    Raises:
        OptionError: There is neither; the message, which goes on from whoever asked, names recipes that are like it.
    """
    own = os.path.join(beside, name)
    if os.path.lexists(own) and not os.path.isdir(own):
        return own
    if os.path.isfile(own + ENDING):
        return own + ENDING
    short = name.removeprefix(f"{_FOLDER}/")
    # a name goes down into the folder of recipes, never out of it
    if short and not os.path.isabs(short) and not {"", ".", ".."} & {*short.split("/")} and "\0" not in short:
        for path in (os.path.join(folder(), short), os.path.join(folder(), short + ENDING)):
            if path.endswith(ENDING) and os.path.isfile(path):
                return path
    if os.path.isdir(own):
        return own
    raise OptionError(f"No such file, and no recipe of this name; {_hint(short.removesuffix(ENDING))}")


def _hint(name: str) -> str:
    """Recipes that are like a name, by the whole of it or by its last part."""
    name = name[:200]  # comparing takes time
    close = difflib.get_close_matches(name, names(), _NEAREST)
    if not close:
        last = [recipe for recipe in names() if recipe.rpartition("/")[2] == name.rpartition("/")[2]]
        close = last[:_NEAREST] or [recipe for recipe in names() if recipe.startswith(f"{name}/")][:_NEAREST]
    return f"did you mean {', '.join(close)}?" if close else "give the path of a YAML file"
