"""Actions of a parser as the files of timm's flags in ``tests/data`` have them."""
import json


def record(action, with_type=True):
    """One action as ``train_flags.json`` has it; what is None there is left out, all but the default."""
    fields = {
        'flags': action.option_strings or [action.dest],
        'dest': action.dest,
        'action': type(action).__name__.lstrip('_'),
        'nargs': action.nargs,
        'const': action.const,
        'default': action.default,
        'type': action.type.__name__ if with_type and action.type is not None else None,
        'choices': None if action.choices is None else list(action.choices),
    }
    return {key: value for key, value in fields.items() if value is not None or key == 'default'}


def as_lines(records):
    """One line per flag, sorted, so that a drift reads as a diff of flags."""
    return sorted(json.dumps(record, sort_keys=True) for record in records)
