"""Muon and AdamW as one optimizer: who moves what, by how much, and that it can be put away and gone on with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hardener.errors import RecipeError
from hardener.muon import Muon, matrices

RATE = 1e-3


@pytest.fixture
def model(letters):
    return AutoModelForCausalLM.from_pretrained(letters)


def stepped(model, optimizer, seed: int = 0):
    """One step on gradients that are drawn: every weight has one."""
    drawn = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=drawn)
    optimizer.step()


def test_muon_moves_the_hidden_matrices_adamw_the_rest(model):
    before = copy.deepcopy(model)
    stepped(model, Muon(model, RATE))
    hidden = {n for n, p in before.named_parameters() if p.dim() == 2 and ".layers." in n}
    for name, p in model.named_parameters():
        step = (p - before.get_parameter(name)).detach()
        if name in hidden:  # singular values about alike
            values = torch.linalg.svdvals(step)
            assert values.max() < 2 * values.median()
        else:  # each weight by the rate
            torch.testing.assert_close(step.abs(), torch.full_like(step, RATE), rtol=1e-2, atol=0)
    assert {id(p) for p in matrices(model)} == {id(model.get_parameter(name)) for name in hidden}


def test_a_step_has_the_same_length_per_weight_in_every_matrix(model):
    """Which is why one learning rate serves: 0.2 of it, as AdamW's steps have in training."""
    before = copy.deepcopy(model)
    stepped(model, Muon(model, RATE))
    names = {id(p): name for name, p in model.named_parameters()}
    for p in matrices(model):
        step = (p - before.get_parameter(names[id(p)])).detach()
        assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * RATE, rel=0.2)


def test_put_away_and_taken_up_again_it_goes_on_to_the_same_bits(model):
    other = copy.deepcopy(model)
    whole, first = Muon(model, RATE), Muon(other, RATE)
    stepped(model, whole, 1)
    stepped(other, first, 1)
    again = Muon(other, RATE)
    again.load_state_dict(first.state_dict())
    again.param_groups[0]["lr"] = whole.param_groups[0]["lr"] = 2 * RATE  # as a schedule sets it
    stepped(model, whole, 2)
    stepped(other, again, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert len(again.state) == len(list(model.parameters()))


def test_the_matrices_of_gpt_2_are_found_though_they_are_no_linear_layers():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8))
    assert len(list(matrices(model))) == 4


def test_where_there_is_no_matrix_it_says_so():
    with pytest.raises(RecipeError, match="this model has none; take adamw"):
        Muon(nn.Sequential(nn.Conv2d(3, 4, 3)), RATE)
