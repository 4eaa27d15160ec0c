import pytest
from tiny_run import prepare_tiny_vqa


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    return prepare_tiny_vqa(tmp_path_factory.mktemp("data"))
