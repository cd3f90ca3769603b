"Which tests one worker runs together (those of a file, which share what was costly to make, but for those that stand alone), and what the tests of the lessons share"
import re
from contextlib import ExitStack, contextmanager

import pytest

from nanochat import lesson


@pytest.hookimpl(tryfirst=True)  # before the plugin that reads the groups
def pytest_collection_modifyitems(items):
    for item in items: item.add_marker(pytest.mark.xdist_group(item.nodeid if item.get_closest_marker('alone') else item.path.name))


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    "Progress, runs and generated data go to a folder of the test's own; no setting of the shell changes how a lesson behaves"
    monkeypatch.setenv('NANOCHAT_HOME', str(tmp_path))
    for name in ('IN_TEST', 'NANOCHAT_STRICT', 'NANOCHAT_WIDGETS'): monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refused():
    "Asserts that a check refuses a function, names its mistake, and shows what went in shortly: no printed tensor, no layers, no address"
    def refused(function, name: str, mistake: str):
        verdict = lesson.check(function, name)
        assert not verdict.passed and verdict.mistake == mistake, repr(verdict)
        assert len(verdict.message) > 20 and not re.search(r'tensor\(|Linear\(|0x', verdict.example.split('\n  yours:')[0]), repr(verdict)
    return refused


class Spy:
    "Writes down which of the library's functions are called"
    def __init__(self): self.used = set()

    def watched(self, name: str, function=None): # function: in place of the library's
        function = function or lesson.library(name)
        def seen(*arguments):
            self.used.add(name)
            return function(*arguments)
        return seen

    @contextmanager
    def on(self, *names: str):
        with ExitStack() as swaps:
            for name in names: swaps.enter_context(lesson.swap(name, self.watched(name)))
            yield


@pytest.fixture
def spy(): return Spy()
