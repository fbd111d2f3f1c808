"""The outer loop and its state: accumulation is exact, equal seeds give equal bits, and so does going on."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import small
import torch

from hardener import loop, registry
from hardener.defenses import configs
from hardener.errors import DivergedError
from hardener.group import ALONE, Group
from hardener.loop import Sampler
from hardener.losses import cross_entropy, probability
from hardener.state import States


class Stop(Exception):
    """The machine goes away."""


def train(chosen, folder: Path, state: Path, stop_after: int | None = None):
    """Run the loop; returns weights and log, or raises Stop after a step."""
    task, streams = small.opened(chosen, folder)
    defense = registry.find("defenses", chosen.defense.name)
    made = defense(configs.CONFIGS[chosen.defense.name](**chosen.defense.settings), chosen.train, task)
    model = task.load(folder)

    def tell(step: int, _: dict[str, float]) -> None:
        if step == stop_after:
            raise Stop

    log = loop.run(made, model, task, streams, chosen.train, "cpu", States(state), tell)
    return model.state_dict(), log


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def chosen(paths):
    return small.recipe(paths)


@pytest.fixture(scope="module")
def whole(chosen, letters, tmp_path_factory):
    """A CTRAP run that nothing interrupted: (weights, log, states)."""
    state = tmp_path_factory.mktemp("whole")
    return *train(chosen, letters, state), state


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(chosen, letters, paths, whole, tmp_path):
    assert same(train(chosen, letters, tmp_path / "again")[0], whole[0])
    other = small.recipe(paths, "train.seed=1")
    assert not same(train(other, letters, tmp_path / "other")[0], whole[0])


def test_a_run_interrupted_and_resumed_has_the_same_bits_and_log(chosen, letters, whole, tmp_path):
    with pytest.raises(Stop):
        train(chosen, letters, tmp_path, stop_after=3)
    assert [folder.name for folder in States(tmp_path).all()] == ["step-000001", "step-000002"]
    torch.rand(5)  # the random state of the new process is another
    weights, log = train(chosen, letters, tmp_path)
    assert same(weights, whole[0])
    assert log == whole[1]


@pytest.mark.parametrize("bed", ["image", "text"])
def test_sophon_too_goes_on_with_the_same_bits(request, tmp_path, bed):
    """Two Adams, a fresh head in every walk, BatchNorm buffers, schedules and sampler positions."""
    folder, files = (
        request.getfixturevalue(n) for n in {"image": ("resnet", "image_paths"), "text": ("bert", "text_paths")}[bed]
    )
    more = ("train.schedule=cosine", "train.warmup_steps=2", "defense.inner_optimizer=adamw")
    chosen = small.recipe(files, *more, name=f"tiny-sophon-{bed}")
    straight = train(chosen, folder, tmp_path / "straight")
    with pytest.raises(Stop):
        train(chosen, folder, tmp_path / "broken", stop_after=3)
    resumed = train(chosen, folder, tmp_path / "broken")
    assert same(resumed[0], straight[0])
    assert resumed[1] == straight[1]


@pytest.mark.parametrize(
    "settings", [{}, {"inner_state": "warm", "benign_weight": 0.5}, {"inner_adapter": {"r": 2, "alpha": 4}}]
)
def test_a_rollout_too_goes_on_with_the_same_bits(letters, paths, tmp_path, settings):
    """Its draws depend on the number of the step, warm moments of both walks are in the state, rows go on."""
    own = {"name": "ctrap-rollout", "inner_steps": [1, 3], "inner_lr": [1e-3, 1e-2], **settings}
    chosen = small.recipe(paths, "defense=" + json.dumps(own), "train.schedule=cosine")
    straight = train(chosen, letters, tmp_path / "straight")
    assert len({point["rate"] for point in straight[1]}) == 4
    with pytest.raises(Stop):
        train(chosen, letters, tmp_path / "broken", stop_after=3)
    resumed = train(chosen, letters, tmp_path / "broken")
    assert same(resumed[0], straight[0])
    assert resumed[1] == straight[1]


def test_an_adaptive_trap_too_goes_on_with_the_same_bits(letters, paths, tmp_path):
    """Who is drawn depends on the scores so far, and the price on the drift so far."""
    own = {"name": "ctrap-adaptive", "inner_steps": [1, 3], "lora": {"r": 2, "alpha": 4}, "bound": 1e-9}
    chosen = small.recipe(paths, "defense=" + json.dumps(own), "train.lr=1.0e-2")
    straight = train(chosen, letters, tmp_path / "straight")
    assert len({point["won"] for point in straight[1]}) == len({point["price"] for point in straight[1]}) == 4
    with pytest.raises(Stop):
        train(chosen, letters, tmp_path / "broken", stop_after=3)
    resumed = train(chosen, letters, tmp_path / "broken")
    assert same(resumed[0], straight[0])
    assert resumed[1] == straight[1]


def test_only_two_states_are_kept(whole):
    assert [folder.name for folder in States(whole[2]).all()] == ["step-000003", "step-000004"]
    assert sorted(path.name for path in whole[2].iterdir()) == ["step-000003", "step-000004"]


DAMAGE = {
    "tampered": lambda folder: flip(folder / "tensors.safetensors"),
    "torn": lambda folder: (folder / "tensors.safetensors").write_bytes(b""),
    "without json": lambda folder: (folder / "state.json").unlink(),
    "a number changed in json": lambda folder: (folder / "state.json").write_text(
        re.sub(r'"retain": \d+', '"retain": 0', (folder / "state.json").read_text())
    ),
    "half json": lambda folder: (folder / "state.json").write_text('{"step": 3, '),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_state_is_passed_over(chosen, letters, whole, tmp_path, kind):
    with pytest.raises(Stop):
        train(chosen, letters, tmp_path, stop_after=4)
    newest = States(tmp_path).all()[-1]
    assert newest.name == "step-000003"
    DAMAGE[kind](newest)
    weights, log = train(chosen, letters, tmp_path)
    assert same(weights, whole[0])
    assert log == whole[1]


def test_without_any_whole_state_the_run_starts_again(chosen, letters, whole, tmp_path):
    shutil.copytree(whole[2], tmp_path / "state")
    for folder in States(tmp_path / "state").all():
        DAMAGE["torn"](folder)
    assert same(train(chosen, letters, tmp_path / "state")[0], whole[0])


def test_accumulation_gives_the_gradient_of_the_whole_batch_for_uneven_answers(letters, paths):
    """Token-weighted: the mean over all answer tokens, not the mean of the micro-batches' means."""
    gradients = []
    for parts in (1, 3, 4):
        _, outer = small.defended(small.recipe(paths, f"train.grad_accumulation={parts}"), letters)
        outer.model.double()
        examples = sorted(outer.draw("restricted", 10), key=lambda e: e.targets)
        assert len({sum(e.targets for e in part) for part, _ in ALONE.share(examples, 4)}) > 1
        log: dict[str, float] = {}
        outer.gradient(cross_entropy, examples, log, "loss", {"p(e)": probability(5)})()
        gradients.append([p.grad for p in outer.params] + [torch.tensor([log["loss"], log["p(e)"]]).double()])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


def test_accumulation_gives_the_same_weights(letters, paths, tmp_path):
    weights = []
    for parts in (1, 4):
        # With a rate this small Adam's first steps do not turn rounding into sign changes that matter.
        chosen = small.recipe(paths, f"train.grad_accumulation={parts}", "train.lr=1.0e-5")
        weights.append(train(chosen, letters, tmp_path / str(parts))[0])
    start = torch.cat([v.flatten() for v in small.opened(chosen, letters)[0].load(letters).state_dict().values()])
    one, four = (torch.cat([v.flatten() for v in w.values()]) for w in weights)
    assert float((one - four).norm()) < 0.01 * float((one - start).norm())


@pytest.mark.parametrize(("n", "parts"), [(1, 4), (5, 4), (8, 3), (10, 4), (16, 16), (7, 1)])
def test_micro_batches_lose_no_row(n, parts):
    rows = list(range(n))
    cut = ALONE.share(rows, parts)
    assert list(itertools.chain(*(part for part, _ in cut))) == rows
    assert len(cut) <= parts
    assert {counts for _, counts in cut} == {1.0}


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize(("n", "parts"), [(1, 4), (5, 4), (8, 3), (10, 4), (16, 16), (7, 1)])
def test_processes_share_all_rows_once_and_meet_in_as_many_pieces(n, parts, processes):
    rows = list(range(n))
    shares = [Group(rank, processes).share(rows, parts) for rank in range(processes)]
    assert sorted(row for share in shares for part, counts in share if counts for row in part) == rows
    assert len({len(share) for share in shares}) == 1
    assert 0 < len(shares[0]) <= parts
    assert all(part for share in shares for part, _ in share)


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_last_state(chosen, letters, whole, tmp_path):
    with pytest.raises(Stop):
        train(chosen, letters, tmp_path, stop_after=3)
    before = {path.name: sorted(f.read_bytes() for f in path.iterdir()) for path in States(tmp_path).all()}
    task, streams = small.opened(chosen, letters)
    defense = registry.find("defenses", "ctrap")(configs.CtrapConfig(), chosen.train, task)
    model = task.load(letters)
    step = defense.step

    def poisoned(outer):
        with torch.no_grad():
            outer.params[0].fill_(float("nan"))
        return step(outer)

    defense.step = poisoned
    with pytest.raises(DivergedError, match=r"loss is nan; lower the learning rate") as caught:
        loop.run(defense, model, task, streams, chosen.train, "cpu", States(tmp_path), lambda *_: None)
    assert caught.value.exit_code == 5
    assert before == {path.name: sorted(f.read_bytes() for f in path.iterdir()) for path in States(tmp_path).all()}
    assert same(train(chosen, letters, tmp_path)[0], whole[0])


def test_every_epoch_has_every_row_once_in_another_order():
    rows = [str(i) for i in range(23)]
    sampler = Sampler(rows, seed=3)
    drawn = [row for n in (7, 16, 5, 18) for row in sampler.draw(n)]  # draws that cross the end of an epoch
    assert sorted(drawn[:23]) == sorted(drawn[23:]) == sorted(rows)
    assert drawn[:23] != drawn[23:]
    assert drawn[:23] != rows


def test_a_sampler_put_back_goes_on_where_it_was():
    rows = list(range(9))
    sampler, again = Sampler(rows, seed=1), Sampler(rows, seed=1)
    sampler.draw(13)
    again.drawn = sampler.drawn
    assert sampler.draw(11) == again.draw(11)


def test_the_log_has_a_step_and_finite_losses_and_at_most_two_hundred_points(whole, paths, letters):
    assert [point["step"] for point in whole[1]] == [1, 2, 3, 4]
    losses, told = {"harmful", "collapse", "retain"}, {"p(e)", "p(e) attacked", "norm retain", "norm collapse", "clip"}
    assert all(set(point) == {"step"} | losses | told for point in whole[1])
    assert all(math.isfinite(value) for point in whole[1] for value in point.values())
    assert json.loads(json.dumps(whole[1])) == list(whole[1])


def test_bfloat16_computes_coarsely_but_keeps_float32_weights(letters, paths, whole, tmp_path):
    chosen = small.recipe(paths, "train.dtype=bfloat16")
    weights, log = train(chosen, letters, tmp_path)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert log[0]["retain"] == pytest.approx(whole[1][0]["retain"], rel=1e-2)
    assert log[0]["retain"] != whole[1][0]["retain"]


def test_the_loop_leaves_the_model_ready_to_use(chosen, letters, tmp_path):
    task, streams = small.opened(chosen, letters)
    defense = registry.find("defenses", "ctrap")(configs.CtrapConfig(), chosen.train, task)
    model = task.load(letters)
    loop.run(defense, model, task, streams, chosen.train, "cpu", States(tmp_path), lambda *_: None)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
