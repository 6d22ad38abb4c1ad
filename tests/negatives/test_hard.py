from __future__ import annotations

import pytest
from datasets import Dataset

from st_fpsloss import DocumentIndex
from st_fpsloss.negatives.hard import HARD_NEGATIVES, mine_hard_negatives
from st_fpsloss.negatives.sampled import with_negatives
from st_fpsloss.towers import Categorical, Tags, Tower, two_tower
from tests.losses.conftest import sentences, small_model

pytest.importorskip("faiss")
QUERIES, TEXTS = sentences(10, 5, 0), sentences(40, 8, 1)
DOCUMENTS = {f"d{number}": text for number, text in enumerate(TEXTS)}


@pytest.fixture(scope="module")
def model():
    return small_model(similarity="cosine")


@pytest.fixture(scope="module")
def index(model, tmp_path_factory):
    return DocumentIndex.build(model, DOCUMENTS, tmp_path_factory.mktemp("hard") / "index")


def log(**columns) -> Dataset:
    rows = [(number % 10, number * 7 % 40) for number in range(30)]
    return Dataset.from_dict(
        {"query": [QUERIES[q] for q, _ in rows], "document": [TEXTS[d] for _, d in rows], **columns}
    )


def ranking(model, query: str) -> list[tuple[str, float]]:
    """Every document and its similarity, best first."""
    scores = (model.encode_query([query]) @ model.encode_document(TEXTS).T)[0]
    return sorted(((f"d{n}", float(score)) for n, score in enumerate(scores)), key=lambda pair: -pair[1])


@pytest.mark.parametrize(("first", "last"), [(1, 5), (4, 12), (30, 60)])
@pytest.mark.parametrize("margin", [None, 0.0, 0.1])
def test_each_rows_negatives_are_the_window_of_ranks_without_positives_below_the_margin(
    model, index, first, last, margin
):
    clicks = log()
    mined = mine_hard_negatives(model, clicks, index, first, last, margin)
    for row in mined:
        positives = {
            d
            for d, text in DOCUMENTS.items()
            if (row["query"], text) in set(zip(clicks["query"], clicks["document"], strict=True))
        }
        ranked = ranking(model, row["query"])
        window = [pair for pair in ranked if pair[0] not in positives][first - 1 : last]
        own = dict(ranked)[next(d for d, text in DOCUMENTS.items() if text == row["document"])]
        expected = [d for d, score in window if margin is None or score <= own - margin * abs(own) + 1e-6]
        assert row[HARD_NEGATIVES] == expected


def test_known_positives_of_the_whole_log_are_left_out(model, index):
    clicks = log()
    first = mine_hard_negatives(model, clicks, index, last_rank=3)[0]
    known = [(first["query"], DOCUMENTS[first[HARD_NEGATIVES][0]])]
    again = mine_hard_negatives(model, clicks, index, last_rank=3, known_positives=known)[0]
    assert again[HARD_NEGATIVES][:2] == first[HARD_NEGATIVES][1:]


def test_rows_without_a_click_have_none_and_count_as_no_positives(model, index):
    shown = log(label=[0.0] * 10 + [1.0] * 20)
    mined = mine_hard_negatives(model, shown, index, last_rank=40)
    assert all(not row[HARD_NEGATIVES] for row in mined.select(range(10)))
    query, document = mined[0]["query"], mined[0]["document"]
    of_same_query = next(row for row in mined.select(range(10, 30)) if row["query"] == query)
    assert {d for d, text in DOCUMENTS.items() if text == document} <= set(of_same_query[HARD_NEGATIVES])


def test_mining_again_replaces_the_column(model, index):
    once = mine_hard_negatives(model, log(), index, last_rank=3)
    twice = mine_hard_negatives(model, once, index, last_rank=2)
    assert twice.column_names == once.column_names
    assert twice[0][HARD_NEGATIVES] == once[0][HARD_NEGATIVES][:2]


def test_mined_negatives_train_with_sampled_ones(model, index):
    mined = mine_hard_negatives(model, log(), index, first_rank=2, last_rank=9)
    dataset = with_negatives(mined, 3, documents=DOCUMENTS, power=0, num_hard=1)
    for row, before in zip(dataset, mined, strict=True):
        assert row["negative_1"] in [DOCUMENTS[d] for d in before[HARD_NEGATIVES]]


def test_inputs_may_be_dicts(tmp_path):
    genre = Categorical("genre", vocabulary=["a", "b"])
    model = two_tower(Tower(features=[genre]), Tower(features=[genre]), embedding_dim=4)
    documents = {1: {"genre": "a"}, 2: {"genre": "b"}}
    index = DocumentIndex.build(model, documents, tmp_path / "index")
    clicks = Dataset.from_dict(
        {"query": [{"genre": "a"}, {"genre": "b"}], "document": [{"genre": "a"}, {"genre": "a"}]}
    )
    mined = mine_hard_negatives(model, clicks, index)
    assert mined[HARD_NEGATIVES][:] == [[2], [2]]


def tagged_model():
    text = small_model()[0].sub_modules["document"][0]
    user = Tower(features=[Categorical("user", vocabulary=["u"])])
    return two_tower(user, Tower(text, features=[Tags("tags", vocabulary=["1", "2"], dim=4)]), embedding_dim=4)


def test_positives_are_known_however_they_are_spelled(tmp_path, caplog):
    model = tagged_model()
    documents = {"a": {"text": "quick fox", "tags": ["1", "2"]}, "b": "lazy dog", "c": {"text": "lazy dog", "tags": []}}
    index = DocumentIndex.build(model, documents, tmp_path / "index")
    rows = [{"text": "quick fox", "tags": ["2", "1"]}, {"text": "lazy dog", "tags": []}]
    clicks = Dataset.from_dict({"query": [{"user": "u"}, {"user": "v"}], "document": rows})
    of_fox, of_dog = mine_hard_negatives(model, clicks, index)[HARD_NEGATIVES][:]
    assert (sorted(of_fox), of_dog) == (["b", "c"], ["a"])
    assert not caplog.records
    known = [({"user": "u"}, {"text": "lazy dog", "tags": None})]
    assert mine_hard_negatives(model, clicks, index, known_positives=known)[HARD_NEGATIVES][:] == [[], ["a"]]


def test_positives_that_the_index_holds_without_their_input_are_warned_of(tmp_path, caplog):
    model = tagged_model()
    documents = {"a": {"text": "quick fox", "tags": {"1", "2"}}, "b": "lazy dog"}
    index = DocumentIndex.build(model, documents, tmp_path / "index")
    clicks = Dataset.from_dict(
        {"query": [{"user": "u"}] * 2, "document": [{"text": "quick fox", "tags": ["2", "1"]}] * 2}
    )
    mine_hard_negatives(model, clicks, index)
    assert "1 of 1 distinct positives are not in the index" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(first_rank=0), "`first_rank`"),
        (dict(first_rank=5, last_rank=4), "`last_rank`"),
        (dict(margin=-0.1), "`margin` must not be negative"),
        (dict(query="user"), "no column 'user'"),
    ],
)
def test_wrong_input_is_refused(model, index, options, message):
    with pytest.raises(ValueError, match=message):
        mine_hard_negatives(model, log(), index, **options)
