"""The loss of a language model, some rows at a time: its value, its gradients, and no logits of all rows."""

from __future__ import annotations

import pytest
import small
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from bench import step_cost
from bench.rows import peak
from hardener import checkpoint, demo, losses
from hardener.chunked import ROWS, chunked, headless, separable
from hardener.group import sharded
from hardener.loss import is_rowwise
from hardener.recipe import Lora
from hardener.tasks.base import Example
from hardener.tasks.causal_lm import CausalLM

LOSSES = {
    "cross-entropy": losses.cross_entropy,
    "collapse": losses.collapse(3),
    "p(e)": losses.probability(3),
    **{name: loss for name, loss in losses.SUPPRESSION.items() if name != "dos"},
}
N, H, V = 37, 6, 50


class Largest(TorchDispatchMode):
    """The most elements of any tensor that was made."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.seen = max(self.seen, tensor.numel())
        return made


class Capped(nn.Module):
    """A model with something behind its head."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = demo.tiny_llama(demo.letters_tokenizer(), 0)

    def get_output_embeddings(self) -> nn.Module:
        return self.inside.get_output_embeddings()

    def forward(self, **inputs):
        made = self.inside(**inputs)
        made.logits = made.logits.tanh()
        return made


class Shown:
    """A loss that knows how many rows it was shown at a time."""

    def __init__(self, loss) -> None:
        self.loss, self.rows = loss, []
        self.rowwise = is_rowwise(loss)

    def __call__(self, logits, labels):
        self.rows.append(len(labels))
        return self.loss(logits, labels)


def case(seed: int = 0):
    torch.manual_seed(seed)
    head = nn.Linear(H, V).double()
    hidden = (3 * torch.randn(N, H, dtype=torch.float64)).requires_grad_()
    return head, hidden, torch.randint(0, V, (N,))


@pytest.mark.parametrize("rows", [1, 8, 37, 100])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_plain_loss(name, rows):
    head, hidden, labels = case()
    found = []
    for value in (LOSSES[name](head(hidden), labels), chunked(LOSSES[name], head, hidden, labels, rows=rows)):
        gradients = torch.autograd.grad(value * 0.7, [hidden, *head.parameters()])
        found.append([value.detach(), *gradients])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-13)


def test_a_frozen_head_has_no_gradient_and_hidden_states_have():
    head, hidden, labels = case()
    head.requires_grad_(False)
    chunked(losses.cross_entropy, head, hidden, labels, rows=8).backward()
    assert all(p.grad is None for p in head.parameters())
    assert float(hidden.grad.abs().sum()) > 0


def test_logits_of_all_rows_never_exist():
    head, hidden, labels = case()
    with Largest() as plain:
        losses.cross_entropy(head(hidden), labels).backward()
    assert plain.seen == N * V
    with Largest() as pieces:
        chunked(losses.cross_entropy, head, hidden, labels, rows=4).backward()
    assert pieces.seen <= max(4 * V, V * H, N * H)


def test_the_head_of_a_model_is_told_what_to_leave_out():
    tokenizer = demo.letters_tokenizer()
    model = demo.tiny_llama(tokenizer, 0)
    inputs = {"input_ids": torch.randint(0, len(tokenizer), (2, 9)), "attention_mask": torch.ones(2, 9).long()}
    assert separable(model, inputs)
    whole = model(**inputs).logits
    with headless(model) as given:
        assert model(**inputs).logits.shape[1] == 1
    assert torch.equal(model.get_output_embeddings()(given[0]), whole)
    assert torch.equal(model(**inputs).logits, whole)


def test_a_model_with_a_cap_behind_its_head_is_not_separable():
    assert not separable(Capped(), {"input_ids": torch.randint(0, 5, (2, 9))})


# --- within a language model --------------------------------------------------------------------------------


def test_a_teacher_is_asked_some_rows_at_a_time_too():
    """Its hidden states are narrower, its head is another one."""
    head, hidden, labels = case()
    teacher, states = nn.Linear(3, V).double(), torch.randn(N, 3, dtype=torch.float64)
    loss = losses.distillation(2.0)
    found = []
    for value in (
        losses.divergence(teacher(states).detach(), head(hidden), 2.0),
        chunked(lambda z, y, told: loss(z, y, teacher(told)), head, hidden, labels, states, rows=8),
    ):
        found.append([value.detach(), *torch.autograd.grad(value * 0.7, [hidden, *head.parameters()])])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-13)


@pytest.fixture
def task(letters) -> CausalLM:
    return CausalLM(letters, template="{prompt}", max_length=64)


def rows(count: int) -> list[Example]:
    """Random letters, all but the first of which are answers; the last row is a short one."""
    torch.manual_seed(1)
    ids = [torch.randint(5, 30, (64,)).tolist() for _ in range(count - 1)] + [torch.randint(5, 30, (9,)).tolist()]
    return [
        Example(str(i), {"input_ids": row, "prompt": 1}, [-100, *row[1:]], len(row) - 1) for i, row in enumerate(ids)
    ]


def model(task: CausalLM, kind: str) -> nn.Module:
    made = task.load(task.folder)
    if kind == "tied":
        made.lm_head.weight = made.model.embed_tokens.weight
    if kind == "head frozen":
        made.lm_head.requires_grad_(False)
    if kind == "head alone":
        made.requires_grad_(False)
        made.lm_head.requires_grad_(True)
    if kind.startswith("lora"):
        targets = ("lm_head", "q_proj") if kind == "lora on the head" else "all-linear"
        made = checkpoint.attach(made, Lora(r=2, alpha=4, target_modules=targets), task)
        for p in made.parameters():
            p.data.add_(0.02 * torch.randn_like(p))  # an adapter that is fresh has gradients of zero
    return made.double().train()


@pytest.mark.parametrize("name", ["cross-entropy", "collapse", "klu"])
@pytest.mark.parametrize("kind", ["plain", "tied", "head frozen", "head alone", "lora", "lora on the head"])
def test_a_language_model_has_the_gradients_of_the_plain_loss(task, kind, name):
    trained = model(task, kind)
    params = [p for p in trained.parameters() if p.requires_grad]
    batch = task.collate(rows(10))
    loss = Shown(LOSSES[name])
    found = []
    for value in (LOSSES[name](*task.targets(trained, batch)), task.mean(trained, batch, loss)):
        found.append([value.detach(), *torch.autograd.grad(value / 3, params)])
    assert loss.rows == [ROWS, batch.targets - ROWS]
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-12, atol=1e-12 * float(plain.abs().max()))


@pytest.mark.parametrize("kind", ["plain", "tied", "head alone", "lora", "lora on the head"])
def test_a_language_model_has_the_gradients_of_the_plain_divergence_from_its_teacher(task, kind):
    trained, teacher = model(task, kind), model(task, "plain").eval()
    params = [p for p in trained.parameters() if p.requires_grad]
    for p in params:
        p.data.add_(0.05 * torch.randn_like(p))
    batch = task.collate(rows(10))
    logits, _ = task.targets(trained, batch)
    with torch.no_grad():
        told, _ = task.targets(teacher, batch)
    found = []
    for value in (
        losses.divergence(told, logits, 2.0),
        task.mean(trained, batch, losses.distillation(2.0), teacher),
    ):
        found.append([value.detach(), *torch.autograd.grad(value / 3, params)])
    assert float(found[0][0]) > 1e-3
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-12 * float(plain.abs().max()))
    assert all(p.grad is None for p in teacher.parameters())


def test_distilling_keeps_the_logits_of_neither_model(tmp_path):
    """Live bytes of the whole gradient, many words; in pieces there is room for the logits of one piece's rows."""
    size = step_cost.Size(hidden=16, layers=1, vocabulary=2000, rows=16, length=257, walks=(), repeats=1)
    bed = step_cost.Bed(size, "cpu", tmp_path)
    outer = bed.step(step_cost.Plain(bed.train()), bed.train(), False)[1]
    teacher, examples = bed.model(False).eval(), outer.draw("retain", size.rows)
    log: dict[str, float] = {}

    def gradient() -> None:
        outer.gradient(losses.distillation(1.0), examples, log, "kl", teachers=[teacher])()
        outer.model.zero_grad()

    found = {}
    for pieces in (True, False):
        bed.task.separable[outer.model] = pieces
        found[pieces] = peak(gradient)
    whole = 4 * size.rows * (size.length - 1) * size.vocabulary
    assert found[False] > 3 * whole  # the student's, the teacher's, and what is made of them
    assert found[True] < 1.2 * whole
    assert found[True] < 0.2 * found[False], found


def test_few_answers_have_the_same_bits(task):
    trained, batch = model(task, "plain").float(), task.collate(rows(8))
    params = list(trained.parameters())
    assert batch.targets <= ROWS
    found = []
    for value in (losses.cross_entropy(*task.targets(trained, batch)), task.mean(trained, batch, task.loss)):
        found.append([value.detach(), *torch.autograd.grad(value, params)])
    assert all(map(torch.equal, *found))


@torch.no_grad()
@pytest.mark.parametrize("why", ["a loss of all rows", "a cap behind the head", "sharded weights"])
def test_what_cannot_be_taken_apart_is_taken_whole(task, why):
    trained = Capped() if why == "a cap behind the head" else model(task, "plain")
    batch = task.collate(rows(10))
    loss = Shown(losses.cross_entropy)
    loss.rowwise = why != "a loss of all rows"
    plain = losses.cross_entropy(*task.targets(trained, batch))
    if why == "sharded weights":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if why == "sharded weights":
            sharded(trained, init_device_mesh("cpu", (1,)))
        assert float(task.mean(trained, batch, loss)) == pytest.approx(float(plain), rel=1e-6)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert loss.rows == [batch.targets]


def test_without_gradients_it_is_taken_some_rows_at_a_time_as_well(task):
    trained, batch = model(task, "plain"), task.collate(rows(10))
    loss = Shown(losses.cross_entropy)
    with torch.no_grad():
        value = task.mean(trained, batch, loss)
    assert not value.requires_grad
    assert len(loss.rows) == 2
    torch.testing.assert_close(value, losses.cross_entropy(*task.targets(trained, batch)).detach())


@pytest.mark.parametrize("score", ["exact-match", "likelihood", "likelihood-gain"])
def test_rows_are_scored_without_the_logits_of_all(task, score):
    judged, examples, seen = model(task, "plain").eval(), rows(40), list[int]()
    judged.get_output_embeddings().register_forward_hook(lambda *made: seen.append(made[-1].shape[:-1].numel()))
    found = task.score(judged, examples, score)
    assert max(seen) == ROWS
    task.separable[judged] = False
    assert found == pytest.approx(task.score(judged, examples, score), rel=1e-10)
    assert max(seen) == 40 * 64


def test_looking_at_a_model_changes_nothing_in_it(task):
    """An adapter with dropout: it stays in training, and nothing is drawn."""
    made = checkpoint.attach(task.load(task.folder), Lora(r=2, alpha=4, dropout=0.5), task).train()
    batch, state = task.collate(rows(10)), torch.get_rng_state()
    assert task.headed(made, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in made.modules())


def test_an_outer_gradient_is_that_of_the_plain_loss_with_what_is_watched_beside(paths, letters):
    _, outer = small.defended(small.recipe(paths, "train.grad_accumulation=2"), letters)
    outer.model.double()
    examples, beside = rows(20), {"p(e)": losses.probability(3)}
    found = []
    for plain in (True, False):
        outer.task.separable[outer.model] = not plain
        log: dict[str, float] = {}
        outer.gradient(losses.cross_entropy, examples, log, "loss", beside)()
        found.append([torch.tensor([log["loss"], log["p(e)"]], dtype=torch.float64), *(p.grad for p in outer.params)])
        for p in outer.params:
            p.grad = None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)
