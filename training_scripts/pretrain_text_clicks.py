"""Pretrain two towers on a log of texts: a query finds the document that was clicked.

The log here is on every machine, names of Python functions and the first sentences of their docstrings. For clicks of
your own put ``load_clicks("clicks.parquet", query="search", document="product")`` in its place.

    python training_scripts/pretrain_text_clicks.py --output_dir runs/docstrings
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from docstrings import docstring_clicks
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import set_seed

from st_fpsloss import FPSLoss, LossStateCallback, Tower, align_towers, two_tower
from st_fpsloss.data import hold_out
from st_fpsloss.evaluation import clicks_evaluator


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate and save; returns the metrics on clicks that were held out."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="encoder: Hub id or folder")
    parser.add_argument("--output_dir", default="runs/docstrings")
    parser.add_argument("--packages", nargs="+", default=["numpy", "pandas"], help="whose docstrings to read")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--max_steps", type=int, default=-1, help="-1: one epoch")
    options = parser.parse_args(argv)
    set_seed(0)

    # 1. The clicks: columns "query" and "document"; some are held out.
    clicks = hold_out(docstring_clicks(options.packages), fraction=0.02)
    evaluator = clicks_evaluator(clicks["test"], documents=clicks["train"]["document"], at=(1, 10))

    # 2. The model: two layers for queries, which are encoded at run time, all layers for documents.
    model = two_tower(
        query=Tower(options.model, num_hidden_layers=2),
        document=Tower(options.model, max_seq_length=64),
        similarity="cosine",
    )
    # The short query tower first learns the document tower's embeddings, on texts that need no clicks.
    align_towers(model, [*clicks["train"]["query"], *clicks["train"]["document"]])

    # 3. The loss: all documents of a batch compete; log_q corrects for how popular each of them is.
    loss = FPSLoss(model, log_q="corrected", max_scale=30.0)

    # 4. The stock trainer. router_mapping says which column goes to which tower.
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{options.output_dir}/checkpoints",
        router_mapping={"query": "query", "document": "document"},
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=1,
        max_steps=options.max_steps,
        learning_rate=1e-4,
        learning_rate_mapping={"logit_scale": 1e-3},  # of log α
        warmup_steps=0.1,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=clicks["train"],
        loss=loss,
        evaluator=evaluator,
        callbacks=[LossStateCallback(loss)],  # saves, restores and logs α
    )
    before = evaluator(model)
    trainer.train()
    after = evaluator(model)
    print(f"NDCG@10 {before['ndcg@10']:.3f} before, {after['ndcg@10']:.3f} after; α = {loss.alpha:.1f}")

    # 5. Modules of sentence-transformers alone: SentenceTransformer(path) loads it anywhere.
    model.save_pretrained(f"{options.output_dir}/model")
    return after


if __name__ == "__main__":
    main()
