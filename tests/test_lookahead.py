"""The look-ahead goes where the attacker goes, and comes back bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench import rows
from hardener.errors import DivergedError, RecipeError
from hardener.lookahead import NormalisedStep, Snapshot, simulated_attack


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).to(dtype)


def objective(model: nn.Module, seed: int = 1):
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 4, generator=generator).to(dtype)
    y = torch.randint(0, 3, (16,), generator=generator)

    def backward() -> None:
        nn.functional.cross_entropy(model(x).float(), y).backward()

    return backward


ATTACKERS = {
    "normalised": lambda params: NormalisedStep(params, 0.5),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
}


@pytest.mark.parametrize("name", ATTACKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("host", [False, True])
def test_everything_is_restored_bit_for_bit(name, dtype, host):
    model = network(dtype)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    with simulated_attack(model, ATTACKERS[name], host=host) as there:
        for _ in range(3):
            there.step(objective(model))
            there.keep(objective(model, 2))
        assert not torch.equal(model[0].weight, before["0.weight"])
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None


class OnDevice(TorchDispatchMode):
    """Storages on a GPU that are met, but those of `known` tensors."""

    def __init__(self, known: list[nn.Parameter]) -> None:
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in known}
        self.found: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_cuda:
            storage = made.untyped_storage()
            self.found[storage._cdata] = storage
        return made

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for key, storage in self.found.items() if key not in self.known)


def test_a_copy_in_the_hosts_memory_takes_no_byte_of_the_device():
    """Of weights that are on a GPU by their word, and have no memory anywhere."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(30, 10, device="cuda")) for _ in range(2)]
        found = {}
        for host in (False, True):
            with OnDevice(params) as made:
                Snapshot(params, host)
            found[host] = made.bytes
    assert found == {False: 2 * 300 * 4, True: 0}


def test_once_back_only_what_was_kept_is_held():
    with rows.Live() as live:
        model = nn.Linear(64, 64)
        size = sum(p.numel() * 4 for p in model.parameters())
        with simulated_attack(model, ATTACKERS["adamw"]) as there:
            there.step(lambda: model(torch.ones(1, 64)).square().mean().backward())
            there.keep(lambda: model(torch.ones(1, 64)).square().mean().backward())
            assert live.now > 4.9 * size  # the weights, their copy, two moments, and what is kept
        assert live.now < 2.1 * size
    assert there.norm() > 0


def test_everything_is_restored_when_the_attack_fails():
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), simulated_attack(model, ATTACKERS["sgd"]) as there:  # noqa: PT012
        there.step(objective(model))
        raise KeyError
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_the_normalised_step_has_the_length_of_its_radius():
    model = nn.Linear(5, 5).double()
    start = [p.detach().clone() for p in model.parameters()]
    with simulated_attack(model, lambda params: NormalisedStep(params, 0.3)) as there:
        there.step(lambda: model(torch.randn(7, 5, dtype=torch.float64)).square().mean().backward())
        moved = sum(((p.detach() - s) ** 2).sum() for p, s in zip(model.parameters(), start, strict=True)).sqrt()
    assert float(moved) == pytest.approx(0.3, rel=1e-5)


def parabola(point: torch.Tensor, curvature: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * (point - target) @ curvature @ (point - target)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_kept_gradient_is_the_one_at_the_attacked_point(seed):
    """Closed form on a parabola: after one plain step of α the penalty's gradient is B(θ − αA(θ − a) − b)."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    a_curve, b_curve = root @ root.transpose(1, 2) / 5
    a, b, start = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    model = nn.ParameterList([nn.Parameter(start.clone())])
    with simulated_attack(model, lambda params: torch.optim.SGD(params, lr=0.1)) as there:
        there.step(lambda: parabola(model[0], a_curve, a).backward())
        there.keep(lambda: parabola(model[0], b_curve, b).backward(), 0.7)
    there.add_kept()
    attacked = start - 0.1 * a_curve @ (start - a)
    assert torch.allclose(model[0].grad, 0.7 * b_curve @ (attacked - b), atol=1e-12)


def test_the_kept_gradient_agrees_with_finite_differences_at_the_attacked_point():
    model = network(torch.float64).eval()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])

    def loss(at: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(at(x), y)

    with simulated_attack(model, ATTACKERS["adamw"]) as there:
        for _ in range(2):
            there.step(objective(model))
        there.keep(lambda: loss(model).backward())
        attacked = copy.deepcopy(model)
    weight, eps = attacked[4].weight, 1e-6
    for i, j in ((0, 0), (1, 3), (2, 7)):
        with torch.no_grad():
            weight[i, j] += eps
            up = loss(attacked)
            weight[i, j] -= 2 * eps
            down = loss(attacked)
            weight[i, j] += eps
        kept = there.kept[-2][i, j]  # parameters end with the last layer's weight and bias
        assert float(kept) == pytest.approx(float((up - down) / (2 * eps)), rel=1e-5)


def test_streaming_equals_autograd_through_detached_steps():
    """The mean of the kept gradients is what autograd gives for θ − detached moves (first-order MAML)."""
    model = nn.Linear(3, 2).double()
    data = torch.randn(4, 6, 3, dtype=torch.float64)
    labels = torch.randint(0, 2, (4, 6))

    def loss(weight: torch.Tensor, bias: torch.Tensor, k: int) -> torch.Tensor:
        return nn.functional.cross_entropy(data[k] @ weight.T + bias, labels[k])

    with simulated_attack(model, lambda params: torch.optim.SGD(params, lr=0.2)) as there:
        for k in range(3):
            there.step(lambda k=k: loss(model.weight, model.bias, k).backward())
            there.keep(lambda k=k: loss(model.weight, model.bias, k + 1).backward(), 1 / 3)

    weight, bias = model.weight.detach().requires_grad_(), model.bias.detach().requires_grad_()
    w, b, total = weight, bias, 0.0
    for k in range(3):
        gw, gb = torch.autograd.grad(loss(w, b, k), (w, b))
        w, b = w - 0.2 * gw.detach(), b - 0.2 * gb.detach()
        total = total + loss(w, b, k + 1) / 3
    expected = torch.autograd.grad(total, (weight, bias))
    assert torch.allclose(there.kept[0], expected[0], atol=1e-12)
    assert torch.allclose(there.kept[1], expected[1], atol=1e-12)


def test_kept_gradient_joins_the_gradient_at_theta():
    model = network().eval()
    objective(model)()
    own = model[4].weight.grad.clone()
    with simulated_attack(model, ATTACKERS["sgd"]) as there:
        there.keep(objective(model, 2), 0.5)
    there.add_kept()
    assert torch.allclose(model[4].weight.grad, own + there.kept[-2])
    assert torch.allclose(there.kept[-2], alone(model, 2) * 0.5, atol=1e-6)


def alone(model: nn.Module, seed: int) -> torch.Tensor:
    twin = copy.deepcopy(model)
    twin.zero_grad()
    objective(twin, seed)()
    return twin[4].weight.grad


def test_what_is_added_is_cut_to_the_cap_first():
    model = network().eval()
    with simulated_attack(model, ATTACKERS["sgd"]) as there:
        there.keep(objective(model, 2))
    whole = there.norm()
    there.add_kept(weight=3.0, cap=whole / 2)
    added = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float(added.norm()) == pytest.approx(1.5 * whole, rel=1e-5)
    model.zero_grad()
    there.add_kept(weight=3.0, cap=whole * 2)
    assert torch.allclose(model[4].weight.grad, 3 * there.kept[-2])


@pytest.mark.parametrize("same", [True, False])
def test_passes_see_the_same_dropout_where_that_is_asked_for(same):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(30, 1, bias=False))

    def drop() -> None:
        model(torch.ones(1, 30)).sum().backward()  # the gradient is the mask

    torch.manual_seed(4)
    drop()
    mask, model[1].weight.grad = model[1].weight.grad, None
    torch.manual_seed(4)
    with simulated_attack(model, lambda params: torch.optim.SGD(params, lr=0.0), same_noise=same) as there:
        there.step(drop)
        there.keep(drop)
    assert torch.equal(there.kept[0], mask) == same
    drop()
    assert torch.equal(model[1].weight.grad, mask)  # at θ as if nobody had looked ahead


def curved(model: nn.Module, power: int):
    return lambda: (model.weight**power).sum().backward()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_second_order_is_refused_after_an_attacker_with_state(name):
    model = nn.Linear(3, 1, bias=False)
    with simulated_attack(model, ATTACKERS[name]) as there:
        there.step(curved(model, 4))
        there.keep(curved(model, 2))
        with pytest.raises(RecipeError, match="second order is defined after one normalised step, not after 1 of"):
            there.differentiate(curved(model, 4))


def test_second_order_is_refused_after_two_steps_and_leaves_everything_restored():
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    with simulated_attack(model, ATTACKERS["normalised"]) as there:
        for _ in range(2):
            there.step(curved(model, 4))
        there.keep(curved(model, 2))
        with pytest.raises(RecipeError, match="not after 2 of NormalisedStep"):
            there.differentiate(curved(model, 4))
    assert torch.equal(model.weight, before)


def test_second_order_on_a_parabola_is_the_closed_form():
    """v − (α/‖g‖)·A·(v − ĝ(ĝ·v)); differences of a linear gradient are exact."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    a_curve, b_curve = root @ root.transpose(1, 2) / 5
    a, b, start = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    model = nn.ParameterList([nn.Parameter(start.clone())])
    with simulated_attack(model, lambda params: NormalisedStep(params, 0.4)) as there:
        there.step(lambda: parabola(model[0], a_curve, a).backward())
        there.keep(lambda: parabola(model[0], b_curve, b).backward())
        there.differentiate(lambda: parabola(model[0], a_curve, a).backward())
    g = a_curve @ (start - a)
    v = b_curve @ (start - 0.4 * g / g.norm() - b)
    unit = g / g.norm()
    expected = v - 0.4 / g.norm() * a_curve @ (v - unit * (unit @ v))
    assert not torch.allclose(v, expected, rtol=0.1)
    assert torch.allclose(there.kept[0], expected, rtol=1e-6, atol=1e-6)


def test_second_order_of_no_step_at_all_is_first_order():
    model = nn.Linear(3, 1, bias=False).double()
    with simulated_attack(model, ATTACKERS["normalised"]) as there:
        there.step(lambda: (model.weight * 0).sum().backward())
        there.keep(curved(model, 2))
        there.differentiate(lambda: (model.weight * 0).sum().backward())
    assert torch.equal(there.kept[0], 2 * model.weight.detach())


@pytest.mark.slow
def test_sharded_weights_keep_the_same_second_order_gradient(tmp_path):
    """Two processes under FSDP against one whole model: norms, dot products and differences are over all shards."""
    torch.multiprocessing.spawn(sharded, (tmp_path,), nprocs=2)
    whole, shards = kept_and_cut(small()), torch.load(tmp_path / "kept.pt")
    for one, other in zip(whole, shards, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def sharded(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = small()
    before = copy.deepcopy(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    kept = [gradient.full_tensor() for gradient in kept_and_cut(model)]
    assert all(torch.equal(p.full_tensor(), before[name]) for name, p in model.named_parameters())
    if rank == 0:
        torch.save(kept, folder / "kept.pt")
    torch.distributed.destroy_process_group()


def kept_and_cut(model: nn.Module) -> list[torch.Tensor]:
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def harmful() -> None:
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1, 2])).backward()

    def collapsed() -> None:
        nn.functional.cross_entropy(model(x), torch.tensor([2, 2, 2, 2, 2, 2])).backward()

    with simulated_attack(model, lambda params: NormalisedStep(params, 0.3)) as there:
        there.step(harmful)
        there.keep(collapsed)
        there.differentiate(harmful)
    there.add_kept(0.5, cap=0.1)
    return [p.grad for p in model.parameters()]


def test_a_gradient_that_is_no_number_stops_the_attack():
    model = nn.Linear(2, 2)
    with (
        pytest.raises(DivergedError, match="gradient norm is"),
        simulated_attack(model, ATTACKERS["normalised"]) as there,
    ):
        there.step(lambda: (model(torch.ones(1, 2)).sum() * float("nan")).backward())


def test_frozen_weights_cost_no_copy_and_do_not_move():
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    with simulated_attack(model, ATTACKERS["sgd"]) as there:
        there.step(objective(model))
        assert torch.equal(model[0].weight, before)
        assert len(there.kept) == len([p for p in model.parameters() if p.requires_grad])
