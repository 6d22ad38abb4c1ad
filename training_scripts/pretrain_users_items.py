"""Pretrain two towers without texts: ids and side features of users and films, from MovieLens-100K.

    python training_scripts/pretrain_users_items.py --output_dir runs/users-items

``movielens.py`` reads users by their histories, which ranks better; ``st-fpsloss pretrain`` does the same as this.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import set_seed

from st_fpsloss import Categorical, FPSLoss, LossStateCallback, Numerical, Tags, Tower, two_tower
from st_fpsloss.data import MovieLens100K, load_movielens_100k
from st_fpsloss.evaluation import clicks_evaluator


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate and save; returns the metrics on each user's last film."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="runs/users-items")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--max_steps", type=int, default=-1)
    options = parser.parse_args(argv)
    set_seed(0)

    # 1. The clicks. A query is a dict of a user's features, a document one of a film's.
    data = load_movielens_100k()
    splits = {name: clicks_of(ratings, data) for name, ratings in data.splits().items()}
    train = splits["train"]
    evaluator = clicks_evaluator(splits["validation"], documents=train["document"], seen=train, at=(10,))

    # 2. The model. A feature learns its vocabulary or statistics from the training rows.
    users, films = train["query"][:], train["document"][:]
    model = two_tower(
        query=Tower(
            features=[
                Categorical("user").fit(user["user"] for user in users),
                Numerical("age").fit(user["age"] for user in users),
                Categorical("occupation").fit(user["occupation"] for user in users),
            ],
            hidden_dims=(256,),
            dropout=0.2,
        ),
        document=Tower(
            features=[
                Categorical("film").fit(film["film"] for film in films),
                Tags("genres").fit(film["genres"] for film in films),
                Numerical("year").fit(film["year"] for film in films),
            ],
            hidden_dims=(256,),
            dropout=0.2,
        ),
        embedding_dim=128,
        similarity="cosine",
    )

    # 3. The loss, and 4. the stock trainer.
    loss = FPSLoss(model, scale=5.0, log_q="corrected", max_scale=30.0)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{options.output_dir}/checkpoints",
        router_mapping={"query": "query", "document": "document"},
        per_device_train_batch_size=512,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        learning_rate=1e-3,
        learning_rate_mapping={"logit_scale": 1e-2},  # of log α
        logging_steps=100,
        save_strategy="no",
        report_to=[],
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=train, loss=loss, callbacks=[LossStateCallback(loss)]
    )
    trainer.train()
    metrics = evaluator(model)
    print(f"NDCG@10 {metrics['ndcg@10']:.3f} of the next film, all films ranked that a user has not seen")

    # 5. Features are read by modules of this package: SentenceTransformer(path, trust_remote_code=True) loads it.
    model.save_pretrained(f"{options.output_dir}/model")
    return metrics


def clicks_of(ratings: Dataset, data: MovieLens100K) -> Dataset:
    """Ratings as clicks, whatever their stars."""
    users = {row["user_id"]: {"user": str(row["user_id"]), **row} for row in data.users}
    films = {row["item_id"]: {"film": str(row["item_id"]), **row} for row in data.items}
    user_keys, film_keys = ("user", "age", "occupation"), ("film", "genres", "year")
    return Dataset.from_dict(
        {
            "query": [{key: users[user][key] for key in user_keys} for user in ratings["user_id"]],
            "document": [{key: films[film][key] for key in film_keys} for film in ratings["item_id"]],
        }
    )


if __name__ == "__main__":
    main()
