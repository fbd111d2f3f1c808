"""What a step costs, beside its bare passes and beside libraries that look ahead as well.

    python -m bench.step_cost [--quick] [--json FILE] [--device cuda]

A step is timed against the passes and optimizer steps that it cannot do without, written down plainly on batches that
are ready: forward, cross-entropy, backward; AdamW, Adam or SGD. Both take turns, and the figure is the median of the
quotients. Memory is the peak of live tensor bytes during a step, weights and optimizer state included.

higher and torchopt walk the same K steps of SGD with the same first-order gradient: the mean of the gradients at all
points of the walk. They keep the graph of every point until one backward pass at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from bench.rows import Row, main, peak, quotient, row
from hardener import checkpoint, demo
from hardener.data import Slice, Streams
from hardener.defenses.configs import CtrapConfig, SophonConfig
from hardener.defenses.ctrap import Ctrap
from hardener.defenses.sophon import Sophon
from hardener.lookahead import simulated_attack
from hardener.loop import Outer
from hardener.losses import cross_entropy
from hardener.recipe import Lora, Train
from hardener.tasks.base import Example, Task
from hardener.tasks.causal_lm import CausalLM

RATE = 1e-4
LORA = Lora(r=8, alpha=16.0)


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    hidden: int
    layers: int
    vocabulary: int
    rows: int
    length: int
    walks: tuple[int, ...]
    repeats: int


QUICK = Size(hidden=64, layers=2, vocabulary=256, rows=4, length=64, walks=(1, 4, 16), repeats=3)
FULL = Size(hidden=128, layers=2, vocabulary=1024, rows=8, length=512, walks=(1, 4, 16, 50), repeats=3)


class Bed:
    """A Llama with random weights, and rows of one length for it."""

    def __init__(self, size: Size, device: str, folder: Path) -> None:
        self.size, self.device = size, device
        tokenizer = demo.letters_tokenizer()
        tokenizer.save_pretrained(folder)
        self.config().save_pretrained(folder)
        self.task: Task = CausalLM(folder, template="{prompt}", max_length=size.length)
        roles = ("restricted", "alignment", "retain")
        slices = (Slice(role, "defence", role, "likelihood", self.examples(i)) for i, role in enumerate(roles))
        self.streams = Streams(tuple(slices), dict.fromkeys(roles, 0), (), ())
        self.batch = self.task.collate(self.streams.rows("restricted", "defence")[: size.rows]).to(torch.device(device))

    def config(self) -> Any:
        """Of the model."""
        from transformers import LlamaConfig

        size = self.size
        return LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=4 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            max_position_embeddings=size.length,
            tie_word_embeddings=False,
        )

    def examples(self, seed: int) -> tuple[Example, ...]:
        """Rows in which every token but the first is predicted."""
        generator = torch.Generator().manual_seed(seed)
        shape = (2 * self.size.rows, self.size.length)
        ids = torch.randint(0, min(self.size.vocabulary, 100), shape, generator=generator).tolist()
        return tuple(
            Example(f"{seed}-{i}", {"input_ids": row, "prompt": 1}, [-100, *row[1:]], self.size.length - 1)
            for i, row in enumerate(ids)
        )

    def model(self, lora: bool) -> nn.Module:
        """Random weights, all trainable or frozen under an adapter."""
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        made: nn.Module = LlamaForCausalLM(self.config())
        return (checkpoint.attach(made, LORA, self.task) if lora else made).to(self.device).train()

    def step(self, defense: Any, train: Train, lora: bool) -> tuple[Callable[[], object], Outer]:
        """One outer step, to be taken any number of times."""
        accelerator = Accelerator(cpu=self.device == "cpu")
        outer = Outer(self.model(lora), self.task, self.streams, defense, train, accelerator)
        return lambda: defense.step(outer), outer

    def train(self) -> Train:
        """The outer loop's settings."""
        return Train(steps=1000, batch_size=self.size.rows, lr=RATE)

    def loss(self, model: nn.Module) -> Tensor:
        """Cross-entropy on the batch, as plainly as it can be written."""
        logits = model(**self.batch.inputs).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, self.batch.labels[:, 1:].flatten())

    def bare(self, passes: int, optimizers: list[Callable[[list[nn.Parameter]], Optimizer]], walk: int, lora: bool):
        """So many passes; each of the first ones, up to `walk`, with a step of SGD; the optimizers step at the end."""
        model = self.model(lora)
        params = [p for p in model.parameters() if p.requires_grad]
        made = [make(params) for make in optimizers]
        attacker = SGD(params, lr=RATE)

        def step() -> None:
            for number in range(passes):
                self.loss(model).backward()
                if number < walk:
                    attacker.step()
                if number < passes - 1:
                    attacker.zero_grad()
            for optimizer in made:
                optimizer.step()
            attacker.zero_grad()

        return step


class Decoder(nn.Module):
    """A small decoder in plain torch: higher cannot take a transformers model apart."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.blocks = nn.ModuleList(Block(size.hidden) for _ in range(size.layers))
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) tokens → (B, T, V) logits."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


class Block(nn.Module):
    """Attention and a perceptron."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) → (B, T, H)."""
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        answer: Tensor = x + self.down(nn.functional.silu(self.up(self.second(x))))
        return answer


class Plain:
    """Ordinary fine-tuning; to the loop, a defence."""

    def __init__(self, train: Train) -> None:
        self.train = train

    def optimizers(self, params: list[nn.Parameter]) -> dict[str, Optimizer]:
        """One AdamW."""
        return {"outer": AdamW(params, lr=self.train.lr, weight_decay=0.0)}

    def step(self, outer: Outer) -> dict[str, float]:
        """One step on retain rows."""
        log: dict[str, float] = {}
        outer.gradient(cross_entropy, outer.draw("retain", self.train.batch_size), log, "loss")()
        outer.step("outer", clip=self.train.clip)
        return log


def ctrap(bed: Bed) -> Ctrap:
    made = object.__new__(Ctrap)  # its collapse token comes from words that a random model does not have
    made.config, made.train, made.token = CtrapConfig(), bed.train(), 7
    return made


def sophon(bed: Bed, k: int) -> Sophon:
    rows = bed.size.rows
    config = SophonConfig(inner_steps=k, inner_batch=rows, query_batch=rows, inner_lr=RATE, alpha_lr=RATE)
    return Sophon(config, bed.train(), bed.task)


def held(outer: Outer) -> int:
    """Bytes of weights, buffers and optimizer state."""
    states = [value for o in outer.optimizers.values() for state in o.state.values() for value in state.values()]
    tensors = [*outer.model.parameters(), *outer.model.buffers(), *(v for v in states if isinstance(v, Tensor))]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def whole_peak(step: Callable[[], object], outer: Outer, device: str) -> int:
    """Most live bytes of a step, with what stays between steps."""
    made = peak(step, device)
    return made + held(outer)


def times(bed: Bed, lora: bool) -> Iterator[Row]:
    """SFT, CTRAP and SOPHON against their bare passes."""
    which, train, turns = "LoRA" if lora else "all weights", bed.train(), (bed.size.repeats, bed.device)
    adamw: list[Any] = [lambda params: AdamW(params, lr=RATE)]
    adams: list[Any] = [lambda params: Adam(params, lr=RATE)] * 2
    sft = quotient(bed.step(Plain(train), train, lora)[0], bed.bare(1, adamw, 0, lora), *turns)
    yield row(f"SFT step / bare, {which}", sft, "×", 1.05)
    trap = quotient(bed.step(ctrap(bed), train, lora)[0], bed.bare(3, adamw, 1, lora), *turns)
    yield row(f"CTRAP step / 3 bare passes and steps, {which}", trap, "×", 1.05)
    for k in bed.size.walks:
        step = bed.step(sophon(bed, k), train, lora)[0]
        found = quotient(step, bed.bare(2 * k + 1, adams, k, lora), *turns)
        yield row(f"SOPHON step K={k} / {2 * k + 1} bare passes and steps, {which}", found, "×", 1.05)


def memory(bed: Bed, lora: bool) -> Iterator[Row]:
    """Peaks of SFT, CTRAP and SOPHON, and how they grow."""
    which, train = "LoRA" if lora else "all weights", bed.train()
    found: dict[str, int] = {}
    for name, defense in (("SFT", Plain(train)), ("CTRAP", ctrap(bed))):
        step, outer = bed.step(defense, train, lora)
        found[name] = whole_peak(step, outer, bed.device)
        copies = sum(p.numel() * p.itemsize for p in outer.params)
        yield row(f"peak of {name}, {which}", found[name] / 1e6, "MB", None)
    goal = 3 + 0.01 * found["SFT"] / copies if lora else None
    yield row(f"CTRAP over SFT, in copies of what trains, {which}", (found["CTRAP"] - found["SFT"]) / copies, "×", goal)
    walks = {k: whole_peak(*bed.step(sophon(bed, k), train, lora), bed.device) for k in bed.size.walks}
    for k, bytes_ in walks.items():
        yield row(f"peak of SOPHON K={k} / K=1, {which}", bytes_ / walks[1], "×", 1.05)


def predicted(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def ours(bed: Bed, k: int) -> Callable[[], object]:
    model, ids = Decoder(bed.size).to(bed.device), bed.batch.inputs["input_ids"]

    def look() -> None:
        with simulated_attack(model, lambda params: SGD(params, lr=RATE)) as there:
            for _ in range(k):
                there.step(lambda: predicted(model(ids), ids).backward())
                there.keep(lambda: predicted(model(ids), ids).backward(), 1 / k)
        there.add_kept()
        model.zero_grad()

    return look


def with_higher(bed: Bed, k: int) -> Callable[[], object]:
    import higher

    model, ids = Decoder(bed.size).to(bed.device), bed.batch.inputs["input_ids"]

    def look() -> None:
        attacker = SGD(model.parameters(), lr=RATE)
        first_order = {"grad_callback": lambda gradients: [g.detach() for g in gradients]}
        with higher.innerloop_ctx(model, attacker, copy_initial_weights=False) as (there, walk):
            total: Any = 0.0
            for _ in range(k):
                walk.step(predicted(there(ids), ids), **first_order)
                total = total + predicted(there(ids), ids) / k
            total.backward()
        model.zero_grad()

    return look


def with_torchopt(bed: Bed, k: int) -> Callable[[], object]:
    import torchopt

    model, ids = Decoder(bed.size).to(bed.device), bed.batch.inputs["input_ids"]
    names, start = zip(*model.named_parameters(), strict=True)

    def loss(point: tuple[Tensor, ...]) -> Tensor:
        there = dict(zip(names, point, strict=True))
        return predicted(torch.func.functional_call(model, there, (ids,)), ids)

    def look() -> None:
        optimizer = torchopt.sgd(lr=RATE)
        point, state = start, optimizer.init(start)
        total: Any = 0.0
        for _ in range(k):
            gradients = torch.autograd.grad(loss(point), point)
            moves, state = optimizer.update(gradients, state, inplace=False)
            point = torchopt.apply_updates(point, moves, inplace=False)
            total = total + loss(point) / k
        total.backward()
        model.zero_grad()

    return look


def peers(bed: Bed) -> Iterator[Row]:
    """The same look-ahead, K = 16, by us and by others; what is not installed is left out."""
    k, turns = 16, (bed.size.repeats, bed.device)
    growth = peak(ours(bed, k), bed.device) - peak(ours(bed, 1), bed.device)
    for name, look in (("higher", with_higher), ("torchopt", with_torchopt)):
        try:
            theirs = look(bed, k)
        except ImportError:
            continue
        yield row(f"look-ahead K={k}, ours / {name}, time", quotient(ours(bed, k), theirs, *turns), "×", 1 / 1.5)
        their_growth = peak(theirs, bed.device) - peak(look(bed, 1), bed.device)
        yield row(f"look-ahead K=1 to {k}, ours / {name}, memory growth", growth / their_growth, "×", 0.25)


def measured(quick: bool, device: str) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        bed = Bed(QUICK if quick else FULL, device, Path(folder))
        for lora in (False, True):
            yield from times(bed, lora)
            yield from memory(bed, lora)
        yield from peers(bed)


if __name__ == "__main__":
    main(__doc__, measured)
