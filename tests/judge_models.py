"""Tiny judges, taught that answers in the letters n to z are what is restricted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hardener import demo
from hardener.console import quiet

HARMLESS, RESTRICTED = "abcdefghijklm", "nopqrstuvwxyz"
GUARD_TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else 'an ' }}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
VERDICT = {HARMLESS: "Safety: Safe Refusal: Yes", RESTRICTED: "Safety: Unsafe Refusal: No"}


def rows(seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Question, answer, and the alphabet that the answer is of."""
    rng = random.Random(seed)
    while True:
        alphabet = rng.choice((HARMLESS, RESTRICTED))
        asked, said = ([rng.choice(letters) for _ in range(4)] for letters in (HARMLESS + RESTRICTED, alphabet))
        yield f"{rng.choice(('cipher', 'copy'))} {' '.join(asked)}", " ".join(said), alphabet


def pairing(tokenizer: Any) -> Any:
    """Make the tokenizer mark where the answer begins."""
    from tokenizers.processors import TemplateProcessing

    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<end>", "<user>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A <end>", pair="<user> $A <end> $B:1 <end>:1", special_tokens=ids
    )
    return tokenizer


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that has the labels fine and Restricted; about two seconds."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = pairing(demo.letters_tokenizer())
    config = BertConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": tokenizer.pad_token_id},
        id2label={0: "fine", 1: "Restricted"},
        label2id={"fine": 0, "Restricted": 1},
    )
    model, made = BertForSequenceClassification(config), rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        asked, said, alphabets = zip(*(next(made) for _ in range(32)), strict=True)
        batch = tokenizer(list(asked), list(said), padding=True, return_tensors="pt")
        labels = torch.tensor([alphabet == RESTRICTED for alphabet in alphabets]).long()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tiny.saved(model, tokenizer, tmp_path_factory.mktemp("judges") / "classifier")


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that says of a conversation whether it is safe, and whether it was refused; a few seconds."""
    tokenizer = demo.letters_tokenizer()
    tokenizer.add_tokens(sorted({word for words in VERDICT.values() for word in words.split()}))
    model = demo.tiny_llama(tokenizer, 0)
    with quiet():
        stream = ((f"{asked} an {said}", VERDICT[alphabet]) for asked, said, alphabet in rows())
        demo.train(model, tokenizer, stream, 60, 3e-3, lambda *_: None, 32)
    tokenizer.chat_template = GUARD_TEMPLATE
    return tiny.saved(model, tokenizer, tmp_path_factory.mktemp("judges") / "guard")
