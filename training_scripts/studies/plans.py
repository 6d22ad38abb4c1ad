"""The studies of compare_losses: which runs each consists of, under which names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from training_scripts.studies.runs import LEARNING_RATE, NUM_NEGATIVES, Stage

FIXED_SCALES = (3.0, 5.0, 7.0, 10.0, 14.0, 20.0)
SCALE_STARTS = (5.0, 10.0, 1 / 0.07)
BATCH_SIZES = (64, 256, 1024, 4096)
NORM_PENALTIES = (1e-4, 1e-3, 1e-2)
SCALE = 10.0  # fixed, of every softmax and of PairCE, where a study is not about it; see the study "scale"
WITH_FIXED_SCALE = {"scale": SCALE, "learn_scale": False}

Configuration = tuple[tuple[Stage, ...], str]  # stages, similarity


def fps(**settings: Any) -> Stage:
    """FPSLoss with the popularity correction and a fixed α, unless ``settings`` say otherwise."""
    return Stage("fps", {"log_q": "corrected", **WITH_FIXED_SCALE, **settings})


PAIR_CE = Stage("pair_ce", WITH_FIXED_SCALE, negatives=NUM_NEGATIVES, power=0.0)
TRIPLET = Stage("triplet", {"margin": 0.3}, negatives=NUM_NEGATIVES, power=0.0)
FINE_TUNING = {
    "PairCE": PAIR_CE,
    "PairCE, popular negatives": replace(PAIR_CE, power=0.75),
    "triplet": TRIPLET,
    "triplet, popular negatives": replace(TRIPLET, power=0.75),
    "sampled softmax": Stage("sampled_softmax", {**WITH_FIXED_SCALE, "log_q": "corrected"}, negatives=NUM_NEGATIVES),
    "sampled softmax without log_q": Stage("sampled_softmax", WITH_FIXED_SCALE, negatives=NUM_NEGATIVES),
    "catalogue softmax": Stage("full_softmax", WITH_FIXED_SCALE),
    "sigmoid": Stage("sigmoid", {"scale": SCALE}),
}


def losses() -> dict[str, Configuration]:
    """Each loss alone, and two thirds of the tokens with FPSLoss before one third with each of the others."""
    first = replace(fps(), share=2 / 3)
    configurations: dict[str, Configuration] = {
        "FPS": ((fps(),), "cosine"),
        "FPS without log_q": ((fps(log_q=None),), "cosine"),
    }
    for name, stage in FINE_TUNING.items():
        configurations[name] = ((stage,), "cosine")
        configurations[f"FPS, then {name}"] = ((first, replace(stage, share=1 / 3)), "cosine")
    return configurations


def graded() -> dict[str, Configuration]:
    """Clicks alone, grades alone, and two thirds of the tokens on clicks before one third on grades."""
    first = replace(fps(), share=2 / 3)
    configurations: dict[str, Configuration] = {"FPS on clicks": ((fps(),), "cosine")}
    for name, stage in (("PairCE", PAIR_CE), ("triplet", TRIPLET)):
        stage = replace(stage, settings={**stage.settings, "duplicates": "keep"}, negatives=0, graded=True)
        configurations[f"{name} on grades"] = ((stage,), "cosine")
        configurations[f"FPS on clicks, then {name} on grades"] = ((first, replace(stage, share=1 / 3)), "cosine")
    return configurations


def log_q() -> dict[str, Configuration]:
    """The popularity correction, repeated positives, and directions, as far as they go together."""
    forms = ((None, "keep"), (None, "mask"), ("standard", "keep"), ("standard", "mask"), ("corrected", "mask"))
    directions = {"query to document": ("query_to_doc",), "both directions": ("query_to_doc", "doc_to_query")}
    return {
        f"log_q {form or 'off'}, {duplicates}, {name}": (
            (fps(log_q=form, duplicates=duplicates, directions=choice),),
            "cosine",
        )
        for form, duplicates in forms
        for name, choice in directions.items()
    }


def similarity() -> dict[str, Configuration]:
    """Cosine, dot product, and dot product with a penalty on norms."""
    dot = {"log_q": "corrected", "scale": 1.0, "learn_scale": False}
    return {
        "cosine": ((fps(),), "cosine"),
        "dot product": ((Stage("fps", dot),), "dot"),
        "dot product, learned α": ((Stage("fps", {**dot, "learn_scale": True}),), "dot"),
        **{
            f"dot product, norm penalty {penalty:g}": (
                (Stage("fps_norm_penalty", {**dot, "norm_penalty": penalty}),),
                "dot",
            )
            for penalty in NORM_PENALTIES
        },
    }


def scale() -> dict[str, Configuration]:
    """Fixed α, and α learned from several starts: at the encoders' rate, and faster with a tighter bound."""
    configurations = {f"fixed {alpha:g}": ((fps(scale=alpha),), "cosine") for alpha in FIXED_SCALES}
    for start in SCALE_STARTS:
        configurations[f"learned from {start:.3g}"] = ((fps(scale=start, learn_scale=True),), "cosine")
    for start in SCALE_STARTS:
        stage = replace(fps(scale=start, learn_scale=True, max_scale=30.0), scale_learning_rate=10 * LEARNING_RATE)
        configurations[f"learned from {start:.3g}, ten times as fast, at most 30"] = ((stage,), "cosine")
    return configurations


def batch_size() -> dict[str, Configuration]:
    """Batch sizes, with and without the popularity correction."""
    return {
        f"{'log_q' if form else 'no log_q'}, M = {size}": ((replace(fps(log_q=form), batch_size=size),), "cosine")
        for form in ("corrected", None)
        for size in BATCH_SIZES
    }


STUDIES = {
    "losses": losses,
    "graded": graded,
    "log_q": log_q,
    "similarity": similarity,
    "scale": scale,
    "batch_size": batch_size,
}
