"""Where the negatives of a fine-tuning come from: columns, grades, the batch, sampling, mining."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, load_from_disk
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from st_fpsloss.cli.loss import LossArguments, LossName
from st_fpsloss.cli.training import document_prompt
from st_fpsloss.data.inputs import distinct, is_positive
from st_fpsloss.negatives.graded import graded_pairs
from st_fpsloss.negatives.hard import HARD_NEGATIVES
from st_fpsloss.negatives.sampled import mine_hard_negatives, mixture_frequencies, with_negatives
from st_fpsloss.retrieval.index import DocumentIndex

logger = logging.getLogger(__name__)

Source = Literal["explicit", "in_batch", "sampled", "hard", "mixed"]
_DRAWN = ("sampled", "hard", "mixed")
# The Hub gets no file of output_dir whose name begins so.
_MINED = "_hard_negatives"


@dataclass
class NegativeArguments:
    """Which negatives to learn from."""

    _argument_group_name = "negatives"

    negatives: Source | None = field(
        default=None,
        metadata={
            "help": "explicit: columns, grades, rows with r <= 0 (default if any); in_batch (else); sampled; hard: by "
            "the model; mixed: in-batch, sampled and hard. fps and sigmoid always take the batch's documents"
        },
    )
    negative_columns: list[str] = field(default_factory=list, metadata={"help": "columns of negative documents"})
    num_negatives: int = field(default=10, metadata={"help": "columns to draw: sampled, hard, or half of each"})
    power: float = field(default=0.75, metadata={"help": "sampled in proportion to clicks to this power; 0: all alike"})
    hard_first_rank: int = field(default=1, metadata={"help": "hardest rank, among a query's negatives, to mine"})
    hard_last_rank: int = field(default=50, metadata={"help": "last rank to mine"})
    hard_margin: float | None = field(
        default=None, metadata={"help": "mine what is so much less similar than the positive, such as 0.05"}
    )
    grade_column: str | None = field(
        default=None, metadata={"help": "grades: of each query, better documents against worse ones"}
    )
    min_difference: float = field(default=0.0, metadata={"help": "of two grades, to be compared"})
    max_pairs: int | None = field(default=None, metadata={"help": "comparisons a query at most; default: all"})

    @property
    def are_drawn(self) -> bool:
        """Whether negatives come from the corpus."""
        return self.negatives in _DRAWN

    def check(self, loss: LossName, label_column: str | None, arguments: LossArguments) -> None:
        """Refuses arguments that do not go together, before anything is read.

        Raises:
            ValueError: Naming them.
        """
        if self.negatives == "mixed" and self.num_negatives < 2:
            raise ValueError(f"--negatives mixed draws sampled and hard ones: num_negatives={self.num_negatives} < 2.")
        if not 1 <= self.hard_first_rank <= self.hard_last_rank:
            raise ValueError(
                f"--hard_first_rank={self.hard_first_rank} has to be at least 1 and at most "
                f"--hard_last_rank={self.hard_last_rank}: pass a smaller first rank, or a larger last one."
            )
        if loss == "full_softmax" and (self.negatives or self.negative_columns):
            raise ValueError("--loss full_softmax takes all documents for negatives: leave out --negatives.")
        if self.grade_column is None:
            return
        if label_column is not None:
            raise ValueError("--grade_column and --label_column are two meanings of a row's number: pass one.")
        if loss in ("fps", "sigmoid", "full_softmax"):
            raise ValueError(
                f"--loss {loss} takes every other document for a negative, whatever its grade. With "
                "--grade_column use pair_ce, triplet or sampled_softmax."
            )
        if self.negatives not in (None, "explicit") or self.negative_columns:
            given = "--negative_columns" if self.negative_columns else f"--negatives {self.negatives}"
            raise ValueError(f"--grade_column makes the negatives, the worse documents: leave out {given}.")
        if arguments.mask_known_positives:
            raise ValueError(
                "--grade_column: a worse document may be a positive too. Leave out --mask_known_positives."
            )

    def compare_grades(self, rows: Dataset, arguments: LossArguments, seed: int) -> Dataset:
        """Turns rows with a grade as ``label`` into pairs of a better and a worse document.

        Raises:
            ValueError: If positives are to be masked and there are more than two grades, and as
                :func:`st_fpsloss.negatives.graded.graded_pairs`.
        """
        grades = np.unique(rows["label"])
        if arguments.duplicates == "mask" and len(grades) > 2:
            raise ValueError(
                f"--duplicates mask: --grade_column {self.grade_column} has {len(grades)} grades, so a document may be "
                "the better in one row and the worse in another, and would be no negative. Leave out --duplicates."
            )
        return graded_pairs(
            rows, grade="label", min_difference=self.min_difference, max_pairs=self.max_pairs, seed=seed
        )

    def source(self, rows: Dataset) -> Source:
        """Returns where the negatives come from.

        Raises:
            ValueError: If they are to be explicit and there are none.
        """
        has_explicit = "negative_1" in rows.column_names or not is_positive(rows).all()
        if self.negatives == "explicit" and not has_explicit:
            raise ValueError(
                "--negatives explicit: the rows have none. Pass --negative_columns, --grade_column, or a "
                "--label_column with 0 for what was shown and not clicked; or draw them with --negatives sampled."
            )
        return self.negatives or ("explicit" if has_explicit else "in_batch")

    def add_columns(
        self,
        rows: Dataset,
        model: SentenceTransformer,
        corpus: Sequence[Any],
        training: SentenceTransformerTrainingArguments,
    ) -> Dataset:
        """Adds columns of negatives that are sampled again every epoch, where they are to be drawn.

        Args:
            rows: The training rows.
            model: The model to mine with, as it is before training.
            corpus: The documents to draw from.
            training: The training arguments: the seed, and the folder and the processes to mine in.
        """
        source = self.source(rows)
        if source not in _DRAWN:
            return rows
        documents = dict(enumerate(distinct(corpus).values()))
        num_hard = {"sampled": 0, "hard": self.num_negatives, "mixed": self.num_negatives // 2}[source]
        if num_hard:
            rows = self._mined(rows, model, documents, training)
            self.check_mined(rows, len(documents))
        return with_negatives(
            rows, self.num_negatives, documents, power=self.power, num_hard=num_hard, seed=training.seed
        )

    def _mined(
        self,
        rows: Dataset,
        model: SentenceTransformer,
        documents: dict[int, Any],
        training: SentenceTransformerTrainingArguments,
    ) -> Dataset:
        """Mines on the main process; the others read what it found."""
        folder = Path(training.output_dir) / _MINED
        with training.main_process_first(local=False, desc="mining"):
            if training.process_index == 0:
                with tempfile.TemporaryDirectory() as temporary:
                    batch_size = training.per_device_eval_batch_size
                    index = DocumentIndex.build(model, documents, Path(temporary) / "index", batch_size=batch_size)
                    mined = mine_hard_negatives(
                        model,
                        rows,
                        index,
                        first_rank=self.hard_first_rank,
                        last_rank=self.hard_last_rank,
                        margin=self.hard_margin,
                        batch_size=batch_size,
                    )
                mined.save_to_disk(folder)
            return load_from_disk(folder)

    def check_mined(self, rows: Dataset, num_documents: int) -> None:
        """Refuses rows of which none has a mined negative, and warns where most have none.

        Args:
            rows: What :func:`st_fpsloss.negatives.sampled.mine_hard_negatives` returned.
            num_documents: Distinct documents that were searched.

        Raises:
            ValueError: If there is no mined negative at all.
        """
        asks = is_positive(rows)
        has_none = np.array([not ids for ids in rows.with_format(None)[HARD_NEGATIVES]])[asks]
        limits = (
            f"--hard_first_rank={self.hard_first_rank}, --hard_margin={self.hard_margin} and {num_documents} "
            "distinct documents"
        )
        if has_none.all():
            raise ValueError(
                f"--negatives {self.negatives}: no row has a hard negative, with {limits}. Pass a smaller "
                "--hard_first_rank or --hard_margin, or --negatives sampled."
            )
        if has_none.mean() > 0.5:
            logger.warning(
                "--negatives %s: %d of %d rows with r > 0 have no hard negative, with %s; sampled ones take their "
                "place. A smaller --hard_first_rank or --hard_margin finds more.",
                *(self.negatives, has_none.sum(), len(has_none), limits),
            )

    def settings(
        self,
        loss: LossName,
        rows: Dataset,
        model: SentenceTransformer,
        arguments: LossArguments,
        training: SentenceTransformerTrainingArguments,
    ) -> dict[str, Any]:
        """Returns the arguments of the loss that follow from the choice.

        A softmax over what was drawn by popularity is corrected for it, with the exact log Q where the columns are
        drawn here.

        Args:
            loss: The loss's name.
            rows: What :meth:`add_columns` returned.
            model: The model.
            arguments: What the command line says of the loss, which comes first.
            training: The training arguments with the columns' prompts.
        """
        source = self.source(rows)
        in_batch = source in ("in_batch", "mixed")
        settings: dict[str, Any] = {"negatives": "in_batch" if in_batch else "explicit"}
        if self.grade_column is not None:
            settings["duplicates"] = "keep"
        is_drawn_by_popularity = loss == "fps" or source in ("in_batch", "sampled", "mixed")
        log_q = arguments.log_q
        if log_q is None and is_drawn_by_popularity:
            log_q = "standard" if arguments.duplicates == "keep" else "corrected"
        if loss not in ("fps", "sampled_softmax") or log_q in (None, "none"):
            return settings
        settings["log_q"] = log_q
        if source in _DRAWN:
            settings["frequencies"] = mixture_frequencies(
                rows, model, in_batch=in_batch or loss == "fps", prompt=document_prompt(training)
            )
        return settings
