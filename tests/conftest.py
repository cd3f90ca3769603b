"Which tests one worker runs together: those of a file, which share what was costly to make, but for those that stand alone"
import pytest


@pytest.hookimpl(tryfirst=True)  # before the plugin that reads the groups
def pytest_collection_modifyitems(items):
    for item in items: item.add_marker(pytest.mark.xdist_group(item.nodeid if item.get_closest_marker('alone') else item.path.name))
