"""Train a model further with hard negatives: documents that it takes for right and that nobody clicked.

The model mines them itself, with an index of all documents; the columns are sampled again every epoch, half of them
among the mined ones, half among all documents by popularity.

    python training_scripts/pretrain_text_clicks.py
    python training_scripts/hard_negatives.py --model runs/docstrings/model --output_dir runs/docstrings-hard
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from docstrings import docstring_clicks
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import set_seed

from st_fpsloss import DocumentIndex, LossStateCallback, SampledSoftmaxLoss
from st_fpsloss.data import hold_out
from st_fpsloss.evaluation import clicks_evaluator
from st_fpsloss.negatives import mine_hard_negatives, mixture_frequencies, with_negatives

NUM_NEGATIVES = 4


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Mine, train, evaluate and save; returns NDCG@10 before and after."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/docstrings/model", help="a pretrained model: Hub id or folder")
    parser.add_argument("--output_dir", default="runs/docstrings-hard")
    parser.add_argument("--packages", nargs="+", default=["numpy", "pandas"], help="whose docstrings to read")
    parser.add_argument("--max_steps", type=int, default=-1, help="-1: one epoch")
    options = parser.parse_args(argv)
    set_seed(0)

    # 1. The clicks, as in pretraining.
    clicks = hold_out(docstring_clicks(options.packages), fraction=0.02)
    train, documents = clicks["train"], dict(enumerate(dict.fromkeys(clicks["train"]["document"])))
    evaluator = clicks_evaluator(clicks["test"], documents=documents.values(), at=(1, 10))

    # 2. The model mines: ranks 5 to 50, since the very first are often right and were only never clicked.
    model = SentenceTransformer(options.model)
    index = DocumentIndex.build(model, documents, Path(options.output_dir) / "index", overwrite=True)
    mined = mine_hard_negatives(model, train, index, first_rank=5, last_rank=50)
    rows = with_negatives(mined, NUM_NEGATIVES, documents, num_hard=NUM_NEGATIVES // 2)

    # 3. The loss: the negative columns and the batch's documents, corrected for how often each is drawn.
    frequencies = mixture_frequencies(rows, model, in_batch=True)
    loss = SampledSoftmaxLoss(model, negatives="in_batch", log_q="corrected", frequencies=frequencies)

    # 4. The stock trainer.
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{options.output_dir}/checkpoints",
        router_mapping={name: "query" if name == "query" else "document" for name in rows.column_names},
        per_device_train_batch_size=128,
        num_train_epochs=1,
        max_steps=options.max_steps,
        learning_rate=2e-5,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=rows, loss=loss, callbacks=[LossStateCallback(loss)]
    )
    before = evaluator(model)["ndcg@10"]
    trainer.train()
    after = evaluator(model)["ndcg@10"]
    print(f"NDCG@10 {before:.4f} before, {after:.4f} after")
    model.save_pretrained(f"{options.output_dir}/model")
    return before, after


if __name__ == "__main__":
    main()
