"Which tests one worker runs together (those of a file, which share what was costly to make, but for those that stand alone), and what the tests of the lessons share"
import pytest


@pytest.hookimpl(tryfirst=True)  # before the plugin that reads the groups
def pytest_collection_modifyitems(items):
    for item in items: item.add_marker(pytest.mark.xdist_group(item.nodeid if item.get_closest_marker('alone') else item.path.name))


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    "Progress, runs and generated data go to a folder of the test's own; no setting of the shell changes how a lesson behaves"
    monkeypatch.setenv('NANOCHAT_HOME', str(tmp_path))
    for name in ('IN_TEST', 'NANOCHAT_STRICT', 'NANOCHAT_WIDGETS'): monkeypatch.delenv(name, raising=False)
