import random

import pytest

from st_fpsloss import DocumentIndex
from tests.serving.models import WORDS, feature_model, text_model

TOKEN = "a token of twenty ch"


def corpus(seed=0, count=300):
    """Documents as (id, text, columns)."""
    rng = random.Random(seed)
    return [
        (f"d{number}", " ".join(rng.choices(WORDS, k=6)), {"year": 1990 + number % 30, "colour": rng.choice(WORDS[:3])})
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def served_model():
    return text_model()


@pytest.fixture(scope="session")
def query_folder(served_model, tmp_path_factory):
    """The query tower of served_model, exported."""
    return _exported(served_model, tmp_path_factory)


@pytest.fixture(scope="session")
def feature_folder(tmp_path_factory):
    """The query tower of feature_model, exported."""
    return _exported(feature_model(), tmp_path_factory)


def _exported(model, tmp_path_factory):
    from st_fpsloss.serving import export_query_encoder

    folder = tmp_path_factory.mktemp("queries") / "exported"
    export_query_encoder(model, folder)
    return folder


@pytest.fixture
def index_folder(served_model, tmp_path):
    DocumentIndex.build(served_model, corpus(), tmp_path / "index", columns=["year", "colour"])
    return tmp_path / "index"


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path
