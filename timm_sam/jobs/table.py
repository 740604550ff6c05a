"""What a command does that runs many jobs in a folder, and then writes what comes of them."""
import contextlib
import os
from collections.abc import Callable, Sequence

from ..cli.errors import OptionError, report
from ..cli.text import say
from .job import Job, is_done
from .pool import Pool, environments, locked


def run_table(prog: str, prepare: Callable[[], Sequence[Job]], out: str, devices: int, write: Callable[[], int],
              flag: str = "--devices") -> int:
    """Runs what is missing, then writes what is made of it.

    Args:
        prog: Name of the command.
        prepare: Gives all jobs, once nobody else works in the folder.
        out: That folder.
        devices: How many jobs run at the same time.
        write: Writes the report, and returns 0 if that went well.
        flag: That gives ``devices``.

    Returns:
        The exit code: 0; 1 if a job failed, or what ``write`` returns; 2 for a mistake; 130 for Ctrl-C and SIGTERM.
    """
    try:
        places = environments(devices, flag)
        with locked(out):
            failed = run_missing(prepare(), places)
            code = write()  # in here, too: another start would write the same files
        for name, why in failed:
            say(f"failed: {name}: {why}")
    except OptionError as e:
        report(prog, e)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OptionError):
            say("Stopped; started again, this goes on where it was.")
        return 130
    return code or bool(failed)


def run_missing(jobs: Sequence[Job], places: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """Runs the jobs that are not done yet, and with a training what is measured of it: a result that is there already
    is of other weights, and removed.

    Args:
        jobs: All of them.
        places: As of :func:`~.pool.environments`.

    Returns:
        Names of the jobs that failed, and why.

    Raises:
        OptionError: A run has other options than the job it stands for; or a result cannot be removed, or stdout not be
            written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the processes are gone.
    """
    undone = {job for job in jobs if not is_done(job)}
    missing = [job for job in jobs if job in undone or job.after in undone]
    for job in missing:
        if job.after in undone and os.path.lexists(job.result):
            try:
                os.remove(job.result)
            except OSError as e:
                raise OptionError(f"{job.result} is of weights that are trained anew, and cannot be removed "
                                  f"({e.strerror}): remove it") from None
    say(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them finished before")
    with Pool(places[:len(missing)]) as pool:
        return pool.run(missing)
