"""The defences' steps against a second, simpler road to the same numbers."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import small
import torch
from torch import nn
from torch.func import functional_call

from hardener import checkpoint, lookahead, registry
from hardener.defenses import configs
from hardener.defenses.ctrap import Ctrap, collapse_token
from hardener.defenses.low_rank import LowRank, linear_weights
from hardener.errors import RecipeError
from hardener.lookahead import NormalisedStep, simulated_attack
from hardener.losses import collapse, cross_entropy
from hardener.recipe import Lora


def gradient(task, model: nn.Module, loss, examples) -> list[torch.Tensor]:
    """The gradient of the mean loss over all answer tokens, plainly."""
    batch = task.collate(examples)
    logits, labels = task.targets(model, batch)
    params = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss(logits, labels), params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


def close(one: list[torch.Tensor], other: list[torch.Tensor], rtol: float) -> None:
    """Agree to `rtol` of each tensor's norm."""
    for a, b in zip(one, other, strict=True):
        assert float((a - b).norm()) <= rtol * float(b.norm()) + 1e-12


class Recorded:
    """Keeps the gradient that an outer step is taken with, and the rows that it drew."""

    def __init__(self, outer) -> None:
        self.outer, self.drawn, self.gradients, self.clips = outer, [], {}, {}
        draw, step = outer.draw, outer.step

        def drawing(role, n):
            self.drawn.append((role, draw(role, n)))
            return self.drawn[-1][1]

        def stepping(name, clip):
            self.gradients[name] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in outer.params]
            self.clips[name] = clip
            return step(name, clip=clip)

        outer.draw, outer.step = drawing, stepping

    def rows(self, *roles: str):
        return [example for role in roles for drawn, rows in self.drawn if drawn == role for example in rows]


@pytest.fixture
def double(letters, paths):
    """CTRAP on float64 weights: (defense, outer)."""

    def make(*more: str):
        defense, outer = small.defended(small.recipe(paths, *more), letters)
        outer.model.double()
        outer.optimizers = defense.optimizers(outer.params)
        return defense, outer

    return make


def test_ctraps_gradient_is_that_of_the_equation(double):
    """∇L(θ; A∪G) + λ ∇C(θ − α g/‖g‖; A∪G) with g = ∇L(θ; H), on copies of the model."""
    defense, outer = double("defense.lam=0.7", "defense.radius=0.3")
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    defense.step(outer)
    h, r = seen.rows("restricted"), seen.rows("alignment", "retain")
    assert len(h) == len(r) == 8
    task = outer.task
    g = gradient(task, start, cross_entropy, h)
    norm = torch.sqrt(sum(x.square().sum() for x in g))
    attacked = copy.deepcopy(start)
    with torch.no_grad():
        for p, x in zip(attacked.parameters(), g, strict=True):
            p -= 0.3 * x / norm
    trap = gradient(task, attacked, collapse(defense.token), r)
    keep = gradient(task, start, cross_entropy, r)
    close(seen.gradients["outer"], [k + 0.7 * t for k, t in zip(keep, trap, strict=True)], 1e-5)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_ctrap_with_lambda_zero_is_plain_training_bit_for_bit(letters, paths, dropout, order):
    settings = ("defense.lam=0", f"defense.order={order}", "train.clip=0.5", "train.weight_decay=0.1")
    defense, outer = small.defended(small.recipe(paths, *settings), letters)
    with_dropout(outer.model, dropout)
    plain, seen = copy.deepcopy(outer.model), Recorded(outer)
    torch.manual_seed(3)
    for _ in range(3):
        defense.step(outer)
    refusals, general = ([rows for drawn, rows in seen.drawn if drawn == role] for role in ("alignment", "retain"))

    torch.manual_seed(3)
    adamw = torch.optim.AdamW(plain.parameters(), lr=defense.train.lr, weight_decay=0.1)
    for rows in map(list.__add__, refusals, general):
        adamw.zero_grad()
        logits, labels = outer.task.targets(plain, outer.task.collate(rows))
        cross_entropy(logits, labels).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(outer.model.parameters(), plain.parameters(), strict=True))


def with_dropout(model: nn.Module, rate: float) -> None:
    """Attention that drops out, as only an adapter can do outside of tests."""
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = rate


def test_the_passes_at_the_attacked_point_see_the_dropout_of_the_pass_at_theta(double):
    defense, outer = double("defense.lam=0.7")
    with_dropout(outer.model, 0.3)
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    torch.manual_seed(3)
    defense.step(outer)
    after = torch.get_rng_state()
    h, r = seen.rows("restricted"), seen.rows("alignment", "retain")

    def noisy(model, loss, rows):
        torch.manual_seed(3)
        return gradient(outer.task, model, loss, rows)

    attacked = moved(start, noisy(start, cross_entropy, h), 0.1)
    trap, keep = noisy(attacked, collapse(defense.token), r), noisy(start, cross_entropy, r)
    assert torch.equal(torch.get_rng_state(), after)
    close(seen.gradients["outer"], [k + 0.7 * t for k, t in zip(keep, trap, strict=True)], 1e-5)
    other = gradient(outer.task, attacked, collapse(defense.token), r)  # drawn anew
    assert not torch.allclose(other[0], trap[0], rtol=1e-2)


def moved(model: nn.Module, g: list[torch.Tensor], radius: float) -> nn.Module:
    """A copy, one normalised step further."""
    there = copy.deepcopy(model)
    norm = torch.sqrt(sum(x.square().sum() for x in g))
    with torch.no_grad():
        for p, x in zip(there.parameters(), g, strict=True):
            p -= radius * x / norm
    return there


def test_the_trap_agrees_with_finite_differences_of_the_collapse_loss_at_a_held_displacement(double):
    """C(θ + d) along random directions, d = −α g/‖g‖ computed once and held: no derivative of the code's own."""
    defense, outer = double("defense.lam=1.0", "defense.radius=0.2")
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    defense.step(outer)
    h, r = seen.rows("restricted"), seen.rows("alignment", "retain")
    attacked = moved(start, gradient(outer.task, start, cross_entropy, h), 0.2)
    keep = gradient(outer.task, start, cross_entropy, r)
    trap = [whole - own for whole, own in zip(seen.gradients["outer"], keep, strict=True)]

    @torch.no_grad()
    def c(direction: list[torch.Tensor], length: float) -> float:
        there = copy.deepcopy(attacked)
        for p, d in zip(there.parameters(), direction, strict=True):
            p += length * d
        return float(collapse(defense.token)(*outer.task.targets(there, outer.task.collate(r))))

    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in start.parameters()]
        slope = (c(direction, 1e-5) - c(direction, -1e-5)) / 2e-5
        assert float(sum((t * d).sum() for t, d in zip(trap, direction, strict=True))) == pytest.approx(slope, rel=1e-4)


def test_accumulation_gives_ctraps_gradient_of_the_large_batch(double):
    """The attack step, the trap and the retain term are each that of the whole batch, not only their sum."""
    gradients, logs = [], []
    for parts in (1, 3, 8):
        defense, outer = double("defense.lam=0.7", "defense.radius=0.3", f"train.grad_accumulation={parts}")
        seen = Recorded(outer)
        logs.append({name: v for name, v in defense.step(outer).items() if not name.startswith("#")})
        gradients.append(seen.gradients["outer"])
    for other, log in zip(gradients[1:], logs[1:], strict=True):
        close(other, gradients[0], 1e-9)
        assert log == pytest.approx(logs[0], rel=1e-9)


def test_the_log_tells_both_norms_and_what_the_clip_left(double):
    defense, outer = double("train.clip=0.01", "defense.lam=5.0")
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    log = defense.step(outer)
    h, r = seen.rows("restricted"), seen.rows("alignment", "retain")
    keep = gradient(outer.task, start, cross_entropy, r)
    attacked = moved(start, gradient(outer.task, start, cross_entropy, h), 0.1)
    trap = gradient(outer.task, attacked, collapse(defense.token), r)
    assert log["norm retain"] == pytest.approx(length(keep), rel=1e-5)
    assert log["norm collapse"] == pytest.approx(length(trap), rel=1e-5)
    assert log["clip"] == pytest.approx(0.01 / length(seen.gradients["outer"]), rel=1e-3)
    for name, model in (("p(e)", start), ("p(e) attacked", attacked)):
        with torch.no_grad():
            logits, _ = outer.task.targets(model, outer.task.collate(r))
        assert log[name] == pytest.approx(float(logits.softmax(-1)[:, defense.token].mean()), rel=1e-5)


def length(tensors: list[torch.Tensor]) -> float:
    return float(torch.sqrt(sum(t.square().sum() for t in tensors)))


def test_without_a_clip_nothing_is_clipped(double):
    defense, outer = double("train.clip=null")
    assert defense.step(outer)["clip"] == 1.0


def test_the_clip_acts_on_the_sum_of_both_gradients(double):
    defense, outer = double("train.clip=0.01", "defense.lam=5.0")
    seen = Recorded(outer)
    applied: list[torch.Tensor] = []
    optimizer = outer.optimizers["outer"]
    optimizer.register_step_pre_hook(lambda *_: applied.extend(p.grad.clone() for p in outer.params))
    defense.step(outer)
    whole = torch.sqrt(sum(g.square().sum() for g in seen.gradients["outer"]))
    assert seen.clips == {"outer": 0.01}
    close(applied, [g * 0.01 / whole for g in seen.gradients["outer"]], 1e-4)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ctrap_leaves_weights_where_a_zero_rate_leaves_them(double, dtype, order):
    """The look-ahead itself moves nothing."""
    defense, outer = double(f"defense.order={order}")
    outer.model.to(dtype)
    outer.optimizers = defense.optimizers(outer.params)
    before = copy.deepcopy(outer.model.state_dict())
    outer.optimizers["outer"].param_groups[0]["lr"] = 0.0
    defense.step(outer)
    assert all(torch.equal(value, before[key]) for key, value in outer.model.state_dict().items())


def test_the_collapse_token_is_the_last_of_its_text(letters, paths):
    task, _ = small.opened(small.recipe(paths), letters)
    assert task.tokenizer.decode([collapse_token(task, "an error")]) == "error"


def test_the_report_is_told_the_collapse_token(letters, paths):
    task, _ = small.opened(small.recipe(paths), letters)
    made = Ctrap(configs.CtrapConfig(), small.recipe(paths).train, task)
    assert made.notes == (f"the collapse token e is {made.token}, 'error'",)


@pytest.mark.parametrize("text", ["an <end>", "<pad>", "an errör", " "])
def test_a_special_token_is_no_collapse_token(letters, paths, text):
    task, _ = small.opened(small.recipe(paths), letters)
    with pytest.raises(RecipeError, match="does not end in an ordinary token") as caught:
        collapse_token(task, text)
    assert caught.value.exit_code == 2


def test_ctrap_refuses_a_classifier(bert, text_paths):
    task, _ = small.opened(small.recipe(text_paths, name="tiny-sophon-text"), bert)
    with pytest.raises(RecipeError, match="ctrap hardens causal language models, not sequence-classification"):
        Ctrap(configs.CtrapConfig(), small.recipe(text_paths, name="tiny-sophon-text").train, task)


# --- the length of the step ---------------------------------------------------------------------------------


def test_a_radius_in_attacker_steps_is_their_length_by_adamw(letters, paths):
    """k·η·√P: what AdamW's first step, which moves every weight by its rate, is long, k times."""
    settings = ["defense.radius=null", "defense.radius_steps=2.0", "defense.attacker_lr=1.0e-3"]
    defense, outer = small.defended(small.recipe(paths, *settings), letters)
    start = [p.detach().clone() for p in outer.params]
    for p in outer.params:
        p.grad = torch.randn_like(p)
    torch.optim.AdamW(outer.params, lr=1e-3, weight_decay=0.0).step()
    step = length([p.detach() - s for p, s in zip(outer.params, start, strict=True)])
    count = sum(p.numel() for p in outer.params)
    assert defense.config.length(count) == pytest.approx(2 * step, rel=1e-3)


def test_the_papers_radius_is_two_of_its_attackers_steps():
    config = configs.CtrapConfig(radius_steps=2.0, attacker_lr=1e-5)
    assert config.radius is None
    assert config.length(25_200_000) == pytest.approx(configs.CtrapConfig().length(1), rel=0.01)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("defense.radius_steps=2.0", "`radius` or `radius_steps`, one of them"),
        ("defense.radius=null", "`radius` or `radius_steps`, one of them"),
        ("defense.attacker_lr=1.0e-5", "`radius_steps` and `attacker_lr` go together"),
    ],
)
def test_the_length_is_given_once_and_whole(paths, setting, message):
    with pytest.raises(RecipeError, match=message):
        small.recipe(paths, setting)


# --- where the copy lives --------------------------------------------------------------------------------------


LOOKING: dict[str, dict[str, object]] = {
    "first order": {"name": "ctrap"},
    "second order": {"name": "ctrap", "order": "second"},
    "rollout": {"name": "ctrap-rollout", "inner_steps": [2, 2], "benign_weight": 0.5},
    "adaptive": {"name": "ctrap-adaptive", "inner_steps": [2, 2]},
}


@pytest.mark.parametrize("which", LOOKING)
def test_a_step_has_the_same_bits_wherever_its_snapshot_lives(paths, letters, monkeypatch, which):
    asked = []

    class Noted(lookahead.Snapshot):
        def __init__(self, params, host=False):
            asked.append(host)
            super().__init__(params, host)

    monkeypatch.setattr(lookahead, "Snapshot", Noted)
    found = {}
    for place in ("device", "host"):
        asked.clear()
        made, outer = small.defended(
            small.recipe(paths, "defense=" + json.dumps(LOOKING[which]), f"train.snapshot={place}"), letters
        )
        made.step(outer)
        assert set(asked) == {place == "host"}
        found[place] = outer.params
    assert all(map(torch.equal, *found.values()))


# --- second order -------------------------------------------------------------------------------------------


def exact(outer, model: nn.Module, h, r, token: int, radius: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """∇C at θ' and ∇_θ C(θ − α·g/(‖g‖ + 1e-7)) by autograd's double backward."""
    weights = dict(model.named_parameters())

    def loss(at, function, rows):
        return function(*outer.task.targets(lambda **inputs: functional_call(model, at, (), inputs), rows))

    h, r = outer.task.collate(h), outer.task.collate(r)
    g = torch.autograd.grad(loss(weights, cross_entropy, h), list(weights.values()), create_graph=True)
    norm = torch.sqrt(sum(x.square().sum() for x in g))
    there = {n: p - radius * x / (norm + 1e-7) for (n, p), x in zip(weights.items(), g, strict=True)}
    trap = loss(there, collapse(token), r)
    first = torch.autograd.grad(trap, list(there.values()), retain_graph=True)
    return list(first), list(torch.autograd.grad(trap, list(weights.values())))


def differentiated(outer, h, r, token: int, radius: float, span: float) -> list[torch.Tensor]:
    """The same by `differentiate`."""
    harmful = outer.gradient(cross_entropy, h, {}, "harmful")
    with simulated_attack(outer.model, lambda params: NormalisedStep(params, radius)) as there:
        there.step(harmful)
        there.keep(outer.gradient(collapse(token), r, {}, "collapse"))
        there.differentiate(harmful, span)
    return there.kept


def minus(one, other) -> list[torch.Tensor]:
    return [a - b for a, b in zip(one, other, strict=True)]


@pytest.fixture
def rows(double):
    """A letters model with eager attention: (outer, token, harmful rows, answers)."""
    defense, outer = double()
    outer.model.set_attn_implementation("eager")
    return outer, defense.token, outer.draw("restricted", 6), outer.draw("alignment", 3) + outer.draw("retain", 3)


def test_the_second_order_gradient_is_autograds_and_half_the_span_is_a_quarter_of_the_error(rows):
    outer, token, h, r = rows
    first, second = exact(outer, outer.model, h, r, token, 0.3)
    assert length(minus(second, first)) > 0.02 * length(second)  # there is something to be right about
    errors = [length(minus(differentiated(outer, h, r, token, 0.3, span), second)) for span in (1e-3, 5e-4, 2.5e-4)]
    assert errors[0] < 0.02 * length(minus(second, first))
    for wide, narrow in itertools.pairwise(errors):
        assert wide / narrow == pytest.approx(4, rel=0.1)


def test_second_order_takes_fused_attention_in_float32(rows):
    """At the default span, against eager attention in float64."""
    outer, token, h, r = rows
    first, second = exact(outer, outer.model, h, r, token, 0.3)
    outer.model.set_attn_implementation("sdpa")
    outer.model.float()
    found = differentiated(outer, h, r, token, 0.3, 1e-3)
    assert length(minus([f.double() for f in found], second)) < 0.03 * length(minus(second, first))


def test_an_outer_step_of_second_order_is_taken_with_that_gradient(double):
    defense, outer = double("defense.order=second", "defense.lam=0.7", "defense.radius=0.3")
    outer.model.set_attn_implementation("eager")
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    log = defense.step(outer)
    h, r = seen.rows("restricted"), seen.rows("alignment", "retain")
    first, second = exact(outer, start, h, r, defense.token, 0.3)
    trap = [
        (g - k) / 0.7
        for g, k in zip(seen.gradients["outer"], gradient(outer.task, start, cross_entropy, r), strict=True)
    ]
    assert length(minus(trap, second)) < 0.02 * length(minus(first, second))
    with torch.no_grad():
        logits, labels = outer.task.targets(start, outer.task.collate(h))
    assert log["harmful"] == pytest.approx(
        float(cross_entropy(logits, labels))
    )  # of θ, not of the two points beside it
    assert configs.CtrapConfig(order="second").passes == 5 == configs.CtrapConfig().passes + 2


def test_second_order_is_refused_where_differences_are_rounded_away(letters, paths):
    with pytest.raises(RecipeError, match="second order is a difference of gradients, which bfloat16 rounds away"):
        small.defended(small.recipe(paths, "defense.order=second", "train.dtype=bfloat16"), letters)


# --- the rollout --------------------------------------------------------------------------------------------


def rollout(double, *more: str, steps: int = 3, **settings: object):
    """A rollout of a fixed number of steps at a fixed rate: (defense, outer)."""
    own = {"inner_steps": [steps, steps], "inner_lr": [1e-2, 1e-2], "name": "ctrap-rollout", "cap": None} | settings
    return double("defense=" + json.dumps(own), *more)


def walked(outer, model: nn.Module, optimizer, batches, keep) -> None:
    """A plain attack on `model`, with `keep` called after each step."""
    for k, rows in enumerate(batches):
        for p, g in zip(model.parameters(), gradient(outer.task, model, cross_entropy, rows), strict=True):
            p.grad = g
        optimizer.step()
        keep(k)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("kept", "weights"), [([1.0], [0, 0, 1]), ([0.5, 2.0], [0, 0.5, 2]), ("even", [1 / 3] * 3)])
def test_a_rollouts_gradient_is_that_of_a_plain_attack_on_a_copy(double, optimizer, kept, weights):
    """∇L(θ) + λ Σ_k w_k ∇C(θ_k), each step on rows of its own."""
    defense, outer = rollout(double, inner_optimizer=optimizer, kept=kept, lam=0.7)
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    log = defense.step(outer)
    batches, r = [rows for role, rows in seen.drawn if role == "restricted"], seen.rows("alignment", "retain")
    assert len({example.key for rows in batches for example in rows}) > len(batches[0])
    total = gradient(outer.task, start, cross_entropy, r)
    made = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
        "sgd": lambda p: torch.optim.SGD(p, 1e-2),
    }
    there = copy.deepcopy(start)

    def keep(k: int) -> None:
        found = gradient(outer.task, there, collapse(defense.token), r)
        total[:] = [t + 0.7 * weights[k] * f for t, f in zip(total, found, strict=True)]

    walked(outer, there, made[optimizer](list(there.parameters())), batches, keep)
    close(seen.gradients["outer"], total, 1e-6)
    assert (log["K"], log["rate"]) == (3, pytest.approx(1e-2))


def test_the_collapse_gradient_is_cut_to_the_cap_before_its_weight(double):
    traps = {}
    for cap in (None, 1e-3, 1e3):
        defense, outer = rollout(double, cap=cap, lam=0.5)
        start, seen = copy.deepcopy(outer.model), Recorded(outer)
        log = defense.step(outer)
        keep = gradient(outer.task, start, cross_entropy, seen.rows("alignment", "retain"))
        traps[cap] = minus(seen.gradients["outer"], keep)
    close(traps[1e3], traps[None], 1e-9)
    assert length(traps[1e-3]) == pytest.approx(0.5e-3, rel=1e-3)
    assert length(traps[None]) == pytest.approx(0.5 * log["norm collapse"], rel=1e-6)


def test_the_counter_term_is_the_ordinary_loss_after_the_same_walk_on_retain_rows(double):
    defense, outer = rollout(double, lam=0.0, benign_weight=0.3)
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    defense.step(outer)
    general = [rows for role, rows in seen.drawn if role == "retain"]
    r = seen.rows("alignment") + general[0]
    there = copy.deepcopy(start)
    adamw = torch.optim.AdamW(there.parameters(), lr=1e-2, weight_decay=0.0)
    walked(outer, there, adamw, general[1:], lambda k: None)
    counter = gradient(outer.task, there, cross_entropy, r)
    keep = gradient(outer.task, start, cross_entropy, r)
    close(seen.gradients["outer"], [k + 0.3 * c for k, c in zip(keep, counter, strict=True)], 1e-6)


def test_a_rollout_moves_no_weight_of_its_own(double):
    for settings in ({}, {"inner_adapter": {"r": 2, "alpha": 4}}, {"inner_state": "warm"}, {"benign_weight": 1.0}):
        defense, outer = rollout(double, **settings)
        outer.optimizers["outer"].param_groups[0]["lr"] = 0.0
        before, random = copy.deepcopy(outer.model.state_dict()), torch.get_rng_state()
        defense.step(outer)
        assert all(torch.equal(value, before[key]) for key, value in outer.model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(("state", "steps"), [("fresh", 3), ("warm", 6)])
def test_a_warm_attacker_has_its_moments_and_a_fresh_one_has_none(double, state, steps):
    """In the second outer step of K = 3 its Adam has counted to K or to 2K."""
    defense, outer = rollout(double, inner_state=state)
    made = []
    optimizer = defense.optimizer
    defense.optimizer = lambda *how: made.append(optimizer(*how)) or made[-1]
    defense.step(outer)
    defense.step(outer)
    attacker = made[-1] if state == "fresh" else outer.optimizers["restricted"]
    assert {int(s["step"]) for s in attacker.state.values()} == {steps}
    assert attacker.param_groups[0]["lr"] == pytest.approx(1e-2)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_a_simulated_lora_goes_where_pefts_goes(double, targets):
    """Merged weights after three AdamW steps of the factors, from the same A."""
    _, outer = double()
    lora, rows = Lora(r=2, alpha=8, target_modules=targets), outer.draw("restricted", 8)
    theirs = checkpoint.attach(copy.deepcopy(outer.model), lora, outer.task).double()
    generator = torch.Generator().manual_seed(0)
    ours = LowRank(linear_weights(outer.model, lora), adamw, lora, generator)
    layers = [m for m in theirs.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    assert len(layers) == len(ours.factors)
    with torch.no_grad():
        for layer, (_, _, a) in zip(layers, ours.factors, strict=True):
            assert float(layer.lora_A["default"].weight.abs().max()) <= float(a.shape[1] ** -0.5)
            layer.lora_A["default"].weight.copy_(a)
    trained = adamw([p for p in theirs.parameters() if p.requires_grad])
    for _ in range(3):
        for model, optimizer in ((outer.model, ours), (theirs, trained)):
            model.zero_grad()
            cross_entropy(*outer.task.targets(model, outer.task.collate(rows))).backward()
            optimizer.step()
    merged = checkpoint.merged(theirs).state_dict()
    for name, value in outer.model.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=0, atol=1e-10)
    head = outer.model.get_output_embeddings().weight
    assert not any(p is head for p, _, _ in ours.factors)


def adamw(params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)


def test_through_a_simulated_lora_the_gradient_kept_is_that_of_the_base_weights_at_the_merged_point(double):
    defense, outer = rollout(double, inner_adapter={"r": 2, "alpha": 8}, lam=1.0)
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    defense.step(outer)
    batches, r = [rows for role, rows in seen.drawn if role == "restricted"], seen.rows("alignment", "retain")
    there = copy.deepcopy(start)
    lora = defense.config.inner_adapter
    attacker = LowRank(linear_weights(there, lora), adamw, lora, defense.draw(1).generator)
    walked(outer, there, attacker, batches, lambda k: None)
    assert sum(not torch.equal(a, b) for a, b in zip(there.parameters(), start.parameters(), strict=True)) == len(
        attacker.factors
    )
    trap = gradient(outer.task, there, collapse(defense.token), r)
    keep = gradient(outer.task, start, cross_entropy, r)
    close(seen.gradients["outer"], [k + t for k, t in zip(keep, trap, strict=True)], 1e-6)


def test_a_simulated_lora_needs_trainable_linear_weights(letters, paths):
    recipe = small.recipe(
        paths, "defense=" + json.dumps({"name": "ctrap-rollout", "inner_adapter": {"r": 2, "alpha": 4}})
    )
    task, _ = small.opened(recipe, letters)
    hardened = checkpoint.attach(task.load(letters), Lora(r=2, alpha=4), task)
    with pytest.raises(RecipeError, match="`adapter: none`"):
        linear_weights(hardened, Lora(r=2, alpha=4))
    with pytest.raises(RecipeError, match="no trainable linear layer is"):
        linear_weights(task.load(letters), Lora(r=2, alpha=4, target_modules=("c_attn",)))


def test_every_outer_step_draws_another_attacker_and_the_same_one_again(letters, paths):
    recipe = small.recipe(paths, 'defense={"name": "ctrap-rollout"}')
    task, _ = small.opened(recipe, letters)
    made = registry.find("defenses", "ctrap-rollout")(configs.CtrapRolloutConfig(), recipe.train, task)
    drawn = [made.draw(number) for number in range(1, 401)]
    assert [(d.steps, d.rate) for d in drawn] == [(d.steps, d.rate) for d in map(made.draw, range(1, 401))]
    assert {d.steps for d in drawn} == set(range(2, 17))
    rates = torch.tensor([d.rate for d in drawn]).double()
    assert 3e-5 <= float(rates.min()) < 3.3e-5
    assert 2.7e-4 < float(rates.max()) <= 3e-4
    assert float(rates.log().mean()) == pytest.approx(math.log(3e-5 * 3e-4) / 2, abs=0.1)
    other = registry.find("defenses", "ctrap-rollout")(
        configs.CtrapRolloutConfig(), recipe.train.model_copy(update={"seed": 1}), task
    )
    assert other.draw(1).rate != made.draw(1).rate


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "second"}, "defense.order: second order is defined for one normalised step"),
        ({"inner_steps": [4, 2]}, "defense.inner_steps: the lower end comes first"),
        ({"inner_lr": [1e-3, 1e-4]}, "defense.inner_lr: the lower end comes first"),
        ({"kept": [1.0, 1.0, 1.0]}, "`kept` has more weights than the shortest rollout has steps"),
        ({"inner_state": "warm", "inner_optimizer": "sgd"}, "only adamw on all weights has moments"),
        ({"inner_state": "warm", "inner_adapter": {"r": 2, "alpha": 4}}, "only adamw on all weights has moments"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused_before_anything_is_loaded(paths, settings, message):
    with pytest.raises(RecipeError, match=message):
        small.recipe(paths, "defense=" + json.dumps({"name": "ctrap-rollout", **settings}))


@pytest.mark.parametrize(
    ("settings", "passes"),
    [({}, 11), ({"benign_weight": 1.0}, 21), ({"kept": "even"}, 19), ({"inner_steps": (4, 4), "kept": (1, 1)}, 7)],
)
def test_the_passes_of_a_rollout_are_counted_at_its_mean_length(settings, passes):
    assert configs.CtrapRolloutConfig(**settings).passes == passes


@pytest.mark.parametrize("defense", configs.CONFIGS)
def test_a_defence_has_the_title_and_paper_of_its_settings(defense):
    assert configs.CONFIGS[defense].title
    assert configs.CONFIGS[defense].paper.url.startswith("https://arxiv.org/abs/")
