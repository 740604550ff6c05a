"""Names of evaluation sets: those of published ones in any case, and names that are almost one."""
from ...cli.errors import OptionError
from . import corruptions
from .folders import PUBLISHED
from .suites import REAL

KNOWN = (*PUBLISHED, REAL)


def canonical(name: str) -> str:
    """A name as tables have it: that of a published set, or of a part of one, in lower case, any other as it is."""
    return name.lower() if name.lower() in KNOWN or corruptions.is_part(name.lower()) else name


def meant(name: str, origin: str) -> str:
    """The set that a name stands for.

    Args:
        name: As it was given.
        origin: The flag that it is from, with its value.

    Raises:
        OptionError: It is that of a published set but for what stands between its letters: its own label space is
            what this set would miss. Or it is that of a part of ImageNet-C which there is not.
    """
    found = canonical(name)
    if corruptions.is_part(found) and found not in corruptions.PARTS:
        whole = corruptions.NAME
        raise OptionError(f"{origin}: {whole} has no such part: write {whole}/CORRUPTION/SEVERITY, such as "
                          f"{corruptions.PARTS[0]}, {whole}=DIR for all of it, or another name")
    same = [known for known in KNOWN if _letters(known) == _letters(name) and known != found]
    if same and found not in KNOWN:
        raise OptionError(f"{origin}: is this {same[0]}, which has a label space of its own? Write {same[0]}=..., or "
                          f"give a name that differs by more than signs")
    return found


def like(name: str) -> str | None:
    """A published set that an unknown name may be a slip of; None: there is none."""
    if name in KNOWN:
        return None
    return next((known for known in KNOWN if _is_slip(name.lower(), known)), None)


def _is_slip(name: str, known: str) -> bool:
    """Whether a letter is wrong, missing or too many, or two are exchanged."""
    start = 0
    while start < min(len(name), len(known)) and name[start] == known[start]:
        start += 1
    end = 0
    while end < min(len(name), len(known)) - start and name[-1 - end] == known[-1 - end]:
        end += 1
    ours, theirs = name[start:len(name) - end], known[start:len(known) - end]
    return max(len(ours), len(theirs)) <= 1 or (len(ours) == 2 and ours == theirs[::-1])


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
