"""Fine-tune a model on grades: documents that were judged better against those that were judged worse.

Clicks tell what people choose, grades what they like. The model of ``pretrain_users_items.py`` learns from the stars of
MovieLens-100K, and is judged by the order in which it puts the films that a user has rated.

    python training_scripts/pretrain_users_items.py
    python training_scripts/finetune_grades.py --model runs/users-items/model --output_dir runs/users-items-rated
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from datasets import Dataset
from pretrain_users_items import clicks_of
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import set_seed

from st_fpsloss import LossStateCallback, PairCELoss
from st_fpsloss.data import load_movielens_100k
from st_fpsloss.evaluation import clicks_evaluator
from st_fpsloss.negatives import graded_pairs


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train, evaluate and save; returns NDCG@10 of each user's rated films before and after."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/users-items/model", help="a pretrained model: Hub id or folder")
    parser.add_argument("--output_dir", default="runs/users-items-rated")
    parser.add_argument("--max_steps", type=int, default=-1)
    options = parser.parse_args(argv)
    set_seed(0)

    # 1. The grades: query, document and label. Of each user, the later ratings are held out.
    data = load_movielens_100k()
    ratings = data.ratings.sort("timestamp")
    judged = clicks_of(ratings, data).add_column("label", ratings["rating"][:])
    train, held_out = split_by_user(judged, ratings["user_id"][:], share=0.1)
    evaluator = clicks_evaluator(held_out, at=(10,), judged_only=True)

    # 2. Pairs: query, the better document, the worse one as its negative. At most 50 of a user, drawn at random.
    pairs = graded_pairs(train, grade="label", max_pairs=50)

    # 3. The loss. A film is the better in one pair and the worse in another: no positive is masked.
    model = SentenceTransformer(options.model, trust_remote_code=True)
    loss = PairCELoss(model, duplicates="keep")

    # 4. The stock trainer. Every column goes to a tower, negatives too.
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{options.output_dir}/checkpoints",
        router_mapping={"query": "query", "document": "document", "negative_1": "document"},
        per_device_train_batch_size=64,
        num_train_epochs=1,
        max_steps=options.max_steps,
        learning_rate=1e-4,
        logging_steps=100,
        save_strategy="no",
        report_to=[],
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=pairs, loss=loss, callbacks=[LossStateCallback(loss)]
    )
    before = evaluator(model)["ndcg@10"]
    trainer.train()
    after = evaluator(model)["ndcg@10"]
    print(f"NDCG@10 of the films that a user rated: {before:.4f} before, {after:.4f} after")
    model.save_pretrained(f"{options.output_dir}/model")
    return before, after


def split_by_user(rows: Dataset, users: Sequence[int], share: float) -> tuple[Dataset, Dataset]:
    """Holds out the last rows of each user, in the order of the rows."""
    total = {user: users.count(user) for user in set(users)}
    count = dict.fromkeys(total, 0)
    parts: tuple[list[int], list[int]] = ([], [])
    for row, user in enumerate(users):
        count[user] += 1
        parts[count[user] > (1 - share) * total[user]].append(row)
    return rows.select(parts[0]), rows.select(parts[1])


if __name__ == "__main__":
    main()
