"What all tests share."
import pytest
from hypothesis import settings
from cmvc_nb import errors

settings.register_profile('cmvc', deadline=None, print_blob=True) # two busy cores make any deadline a coin toss
settings.load_profile('cmvc')

@pytest.fixture(autouse=True)
def _nothing_said(): errors._SAID.clear()
