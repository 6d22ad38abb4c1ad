"""Encoders from scratch over item ids: a history of ids as text, or a bag of ids and words."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from numbers import Integral

import torch
from safetensors.torch import save_file
from sentence_transformers.sentence_transformer.modules import StaticEmbedding, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from st_fpsloss.towers.encoder import freeze_unused_parameters
from st_fpsloss.utils.checks import positive_int, probability

_PAD, _UNKNOWN, _START = "[PAD]", "[UNK]", "[CLS]"
_SPECIAL_TOKENS = (_PAD, _UNKNOWN, _START)


def id_transformer(
    ids: Iterable[str | int],
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 2,
    intermediate_size: int | None = None,
    max_seq_length: int = 50,
    dropout: float = 0.1,
) -> Transformer:
    """Makes a small BERT from scratch whose words are item ids, so that a history of items is a text.

    An input is the ids in the order of time, separated by spaces: ``"17 4 230"``. Every id is one token. A longer
    history loses its oldest items. An id that is not in ``ids`` is the unknown item. In front stands one start token:
    it gives a user without history something to read (a transformer cannot take an empty sequence), and
    ``pooling="cls"`` something to collect in. The module is a stock ``Transformer``, saved and loaded as any other.

    Args:
        ids: The items, each once; strings without white space, or whole numbers.
        hidden_size: Size of the token embeddings and of the output.
        num_hidden_layers: Number of transformer layers.
        num_attention_heads: Attention heads a layer; has to divide ``hidden_size``.
        intermediate_size: Width of the feed-forward layers. None is four times ``hidden_size``.
        max_seq_length: Tokens of a history at most, the start token counted as sentence-transformers counts it: the
            newest ``max_seq_length - 1`` items are kept.
        dropout: Dropout probability of embeddings, attention and feed-forward layers.

    Returns:
        A ``Transformer`` with random weights (drawn with torch's global generator), for ``Tower(transformer=...)``.

    Raises:
        ValueError: ``ids`` is empty, repeats an id or holds one with white space in it; a size is out of range.

    Example:
        >>> from st_fpsloss.towers import id_transformer
        >>> histories = id_transformer(["f1", "f2", "f3"], hidden_size=16, max_seq_length=3)
        >>> tokens = histories.preprocess(["f1 f2 f3", "f1"])["input_ids"]
        >>> [histories.tokenizer.decode(row) for row in tokens]
        ['[CLS] f2 f3', '[CLS] f1 [PAD]']
    """
    hidden_size = positive_int("hidden_size", hidden_size)
    num_attention_heads = positive_int("num_attention_heads", num_attention_heads)
    if hidden_size % num_attention_heads != 0:
        raise ValueError(f"num_attention_heads={num_attention_heads} does not divide hidden_size={hidden_size}.")
    if positive_int("max_seq_length", max_seq_length) < 2:
        raise ValueError("max_seq_length=1 has room for the start token alone; give at least 2.")
    dropout = probability("dropout", dropout)
    word_tokenizer = _word_level_tokenizer(ids)
    config = BertConfig(
        vocab_size=word_tokenizer.get_vocab_size(),
        hidden_size=hidden_size,
        num_hidden_layers=positive_int("num_hidden_layers", num_hidden_layers),
        num_attention_heads=num_attention_heads,
        intermediate_size=4 * hidden_size
        if intermediate_size is None
        else positive_int("intermediate_size", intermediate_size),
        max_position_embeddings=int(max_seq_length),
        type_vocab_size=1,
        pad_token_id=word_tokenizer.token_to_id(_PAD),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return _as_transformer(BertModel(config), _sequence_tokenizer(word_tokenizer, int(max_seq_length)))


def id_embedding(ids: Iterable[str | int], embedding_dim: int) -> StaticEmbedding:
    """Makes a table of embeddings from scratch, one row a word; an input is the mean of its words' rows.

    A word is anything between spaces: an item's id, ``"17"``, or its id and words that describe it,
    ``"17 genre:comedy genre:drama"``, if these are in ``ids`` too. A word that is not there is the unknown word; an
    empty input is the zero vector. The module is a stock ``StaticEmbedding``, saved and loaded as any other.

    Args:
        ids: The words, each once; strings without white space, or whole numbers.
        embedding_dim: Size of a row, and of the output.

    Returns:
        A ``StaticEmbedding`` for ``Tower(transformer=...)``, its rows normal with standard deviation
        ``1/sqrt(embedding_dim)``, so of length about 1, drawn with torch's global generator.

    Raises:
        ValueError: ``ids`` is empty, repeats an id or holds one with white space in it; ``embedding_dim`` is below 1.

    Example:
        >>> from st_fpsloss.towers import id_embedding
        >>> films = id_embedding(["f1", "f2", "comedy"], embedding_dim=16)
        >>> films.get_embedding_dimension()
        16
        >>> [films.tokenizer.encode(text, add_special_tokens=False).tokens for text in ("f1 comedy", "f9")]
        [['f1', 'comedy'], ['[UNK]']]
    """
    embedding_dim = positive_int("embedding_dim", embedding_dim)
    tokenizer = _word_level_tokenizer(ids)
    weights = torch.randn(tokenizer.get_vocab_size(), embedding_dim) / embedding_dim**0.5
    return StaticEmbedding(tokenizer, embedding_weights=weights)


def _word_level_tokenizer(ids: Iterable[str | int]) -> Tokenizer:
    """Returns a tokenizer that cuts at white space and knows the special tokens and the ids, in this order."""
    words = [*_SPECIAL_TOKENS, *_checked_words(ids)]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def _sequence_tokenizer(tokenizer: Tokenizer, max_seq_length: int) -> PreTrainedTokenizerFast:
    """Returns the tokenizer with a start token, and with truncation that keeps the right, the newest end."""
    tokenizer.post_processor = TemplateProcessing(
        single=f"{_START} $A", pair=f"{_START} $A $B", special_tokens=[(_START, tokenizer.token_to_id(_START))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        cls_token=_START,
        model_max_length=max_seq_length,
        truncation_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _as_transformer(model: BertModel, tokenizer: PreTrainedTokenizerFast) -> Transformer:
    """Puts model and tokenizer into a Transformer module, which reads nothing but folders and hub ids."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # Not model.save_pretrained: in a process group it writes on the first rank alone.
        save_file(model.state_dict(), os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    # The folder is gone: its name must not turn up as the base model of a model card.
    transformer.model.config._name_or_path = transformer.model.name_or_path = transformer.tokenizer.name_or_path = ""
    freeze_unused_parameters(transformer)
    return transformer


def _checked_words(ids: Iterable[str | int]) -> list[str]:
    """Returns the ids as words, each seen to be one token."""
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise ValueError(f"ids={ids!r} must be a collection of ids, such as a list.")
    words: dict[str, None] = {}
    for item in ids:
        word = _as_word(item)
        if word in words:
            raise ValueError(f"ids holds {word!r} more than once; give each id once, for instance sorted(set(ids)).")
        words[word] = None
    if not words:
        raise ValueError("ids is empty; give every id that the module is to know.")
    return list(words)


def _as_word(item: object) -> str:
    if isinstance(item, bool) or not isinstance(item, (str, Integral)):
        raise ValueError(f"ids holds {item!r}, a {type(item).__name__}; give strings or whole numbers.")
    word = str(item)
    if word.split() != [word]:
        raise ValueError(f"ids holds {word!r}: white space separates ids, so an id is one word; write '_' for a space.")
    if any(token in word for token in _SPECIAL_TOKENS):
        raise ValueError(f"ids holds {word!r}: {', '.join(_SPECIAL_TOKENS)} are reserved, rename the id.")
    return word
