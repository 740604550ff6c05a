"""What `run_in_turn` has asked for, inside a process of a rank."""
import json
import logging
import os
import shlex
from pathlib import Path


def turns(file):
    """Name and arguments of each command, one after another, each with a process group of its own to make."""
    for run in json.loads(Path(file).read_text()):
        logging.getLogger().handlers.clear()  # each command adds its own
        # the launcher's store remembers the first run's addresses: each run gets a store of its own
        os.environ.update(MASTER_PORT=str(run['port']), TORCHELASTIC_USE_AGENT_STORE='False')
        yield run['name'], shlex.split(run['command'])
