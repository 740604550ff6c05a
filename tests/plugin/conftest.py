"""Starts on two ranks that several files of tests have in common."""
import pytest
from support.scenarios import of_both_ranks


@pytest.fixture(scope='session')
def wrapped_models(tmp_path_factory):
    return of_both_ranks('support.wrapped_ranks', tmp_path_factory.mktemp('wrapped'))


@pytest.fixture(scope='session')
def sharded_models(tmp_path_factory):
    return of_both_ranks('support.fsdp_ranks', tmp_path_factory.mktemp('sharded'), timeout=3600)  # slow tests only
