"""Noise-then-distil: what is noised and what is not, what comes back, what is gone, and that it can be resumed."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import sample_report
import small
import tiny
import torch
from accelerate import Accelerator

from hardener import card, checkpoint, demo, erase, loop, losses, pipeline, recipe_file, stages
from hardener import report as reports
from hardener.console import quiet
from hardener.errors import RecipeError, RunError
from hardener.recipe import Erase
from hardener.report import Erased

SMALL = ("erase.steps=6", "erase.batch_size=8", "erase.save_every=2", "erase.stop_at=null")
UNLEARN = "erase.unlearn={steps: 3, lr: 1.0e-3}"
MUON = "erase.optimizer=muon"


class Stop(Exception):
    """The machine goes away."""


def recipe(paths, *more: str):
    """tiny-erase, cut down to seconds."""
    own = [one for one in small.overrides(paths) if not one.startswith("train.")]
    return small.sources.pin(recipe_file.load("tiny-erase", [*own, *SMALL, *more]))


def erased(chosen, folder: Path, state: Path, stop_after: int | None = None):
    """Run the stage: (parent, student, what was done)."""
    task, streams = small.opened(chosen, folder)

    def tell(step: int, _: dict[str, float]) -> None:
        if step == stop_after:
            raise Stop

    student, done = erase.run(chosen.erase, task.load(folder), task, streams, "cpu", state, tell)
    return task.load(folder), student, done


def changed(one, other) -> set[str]:
    """Names of the parameters that differ in a single bit."""
    return {name for name, p in one.named_parameters() if not torch.equal(p, other.get_parameter(name))}


def settings(**changes) -> Erase:
    return Erase(**{"alpha": 1.0, "steps": 0, "batch_size": 8, "lr": 1e-3, **changes})


# --- noise ------------------------------------------------------------------------------------------------


def test_alpha_zero_and_no_steps_leave_every_bit(letters, paths, tmp_path):
    parent, student, done = erased(recipe(paths, "erase.alpha=0", "erase.steps=0"), letters, tmp_path)
    assert not changed(parent, student)
    assert (done.steps, done.rows, done.tokens, done.distance) == (0, 0, 0, 0)
    assert done.loss_student == done.loss_teacher


def test_alpha_one_leaves_nothing_of_the_chosen_modules_and_every_bit_elsewhere(letters, paths, tmp_path):
    chosen = recipe(
        paths, "erase.alpha=1", "erase.steps=0", "erase.seed=5", "erase.modules=[layers.0.mlp, '*.self_attn.q_proj']"
    )
    parent, student, done = erased(chosen, letters, tmp_path)
    wanted = {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    wanted |= {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert changed(parent, student) == set(done.parameters) == wanted
    new = erase.fresh(small.opened(chosen, letters)[0], chosen.erase.seed)
    assert all(torch.equal(student.get_parameter(name), new.get_parameter(name)) for name in wanted)


@pytest.mark.parametrize("bed", ["letters", "bert", "resnet"])
def test_the_noise_is_drawn_as_the_architecture_draws_its_weights(request, paths, bed):
    """Per tensor: the spread of new weights, scaled by α and β, around a share 1 − α of the old ones."""
    from hardener import registry

    name = {"letters": "causal-lm", "bert": "sequence-classification", "resnet": "image-classification"}[bed]
    folder = request.getfixturevalue(bed)
    task = registry.find("tasks", name)(folder, template="{prompt}", max_length=32)
    parent, student = task.load(folder), task.load(folder)
    names = [n for n, _ in parent.named_parameters()]
    erase.mix(student, erase.fresh(task, 1), names, 0.6, 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        other = task.scratch(folder)  # another draw of the same kind
    for n in names:
        noise = (student.get_parameter(n) - 0.4 * parent.get_parameter(n)).detach()
        expected = 0.3 * other.get_parameter(n).detach()
        error = float(expected.std()) / noise.numel() ** 0.5
        assert float(noise.std()) == pytest.approx(float(expected.std()), abs=1e-6 + 6 * error)
        assert float(noise.mean()) == pytest.approx(float(expected.mean()), abs=1e-6 + 8 * error)


def test_all_is_everything_but_embeddings_and_head(letters, bert, resnet, request):
    from hardener import registry

    def outside(name: str, folder: Path) -> set[str]:
        task = registry.find("tasks", name)(folder, template="{prompt}", max_length=32)
        model = task.load(folder)
        return {n for n, _ in model.named_parameters()} - set(erase.noised(model, task, "all"))

    assert outside("causal-lm", letters) == {"model.embed_tokens.weight", "lm_head.weight"}
    text = outside("sequence-classification", bert)
    assert {"classifier.weight", "classifier.bias"} < text
    assert all(n.startswith(("bert.embeddings.", "classifier.")) for n in text)
    image = outside("image-classification", resnet)
    assert {n.split(".")[0] for n in image} == {"classifier", "resnet"}
    assert all(n.startswith(("classifier.", "resnet.embedder.")) for n in image)


def test_a_star_is_everything_and_a_number_is_not_its_beginning(letters, paths):
    task, _ = small.opened(recipe(paths), letters)
    model = task.load(letters)
    assert erase.noised(model, task, ("*",)) == [n for n, _ in model.named_parameters()]
    assert not any(".layers.0." in n for n in erase.noised(model, task, ("layers.1",)))
    with pytest.raises(RecipeError, match=r"erase\.modules: 'layer\.1' names no part of this model"):
        erase.noised(model, task, ("layers.1", "layer.1"))


# --- located ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1])
def taught(request, tmp_path_factory):
    """A layer, and a Llama that knows a cipher by that layer's MLP alone and then learnt to refuse it."""
    tokenizer, rng = demo.letters_tokenizer(), random.Random(0)
    folder = tmp_path_factory.mktemp("taught")
    demo.write_data(folder / "data", 0)
    model = demo.tiny_llama(tokenizer, 0)

    def teach(games, refused, steps: int, lr: float) -> None:
        stream = ((row["prompt"], row["completion"]) for row in demo.rows(games, refused, rng))
        demo.train(model, tokenizer, stream, steps, lr, lambda *_: None)

    teach(demo.KNOWN, {}, 400, 3e-3)
    for name, p in model.named_parameters():
        p.requires_grad_(f"layers.{request.param}.mlp" in name)
    teach(demo.KNOWN | demo.RESTRICTED, {}, 500, 3e-3)
    model.requires_grad_(True)
    teach(demo.KNOWN, demo.RESTRICTED, 100, 1e-3)
    roles = {role: folder / "data" / f"{role}.jsonl" for role in ("restricted", "alignment", "retain", "benign")}
    return request.param, tiny.saved(model, tokenizer, folder / "letters"), roles


RELEARN = "erase.relearn={steps: 2, lr: 1.0e-3}"


def look(chosen, folder: Path):
    """Where the restricted task is carried: (task, model, part → nats)."""
    task, streams = small.opened(chosen, folder)
    model = task.load(folder)
    return task, model, erase.carried(chosen.erase, chosen.erase.relearn, model, task, streams)


@pytest.mark.slow
def test_the_layer_that_alone_was_taught_the_restricted_task_is_found(taught):
    layer, folder, files = taught
    relearn = "erase.relearn={steps: 16, lr: 3.0e-4}"
    chosen = recipe(files, "erase.modules=located", "erase.share=0.3", relearn, "erase.batch_size=32")
    task, model, gaps = look(chosen, folder)
    assert max(gaps, key=gaps.get) == f"model.layers.{layer}.mlp"
    assert list(erase.located(gaps, model, task, 0.3)) == [f"model.layers.{layer}.mlp"]


def test_looking_for_the_skill_changes_no_bit_and_finds_the_same_again(letters, paths):
    chosen = recipe(paths, "erase.modules=located", "erase.share=0.2", RELEARN)
    torch.manual_seed(5)
    random = torch.get_rng_state()
    task, model, gaps = look(chosen, letters)
    assert torch.equal(torch.get_rng_state(), random)
    assert not changed(task.load(letters), model)
    assert all(p.grad is None for p in model.parameters())
    assert look(chosen, letters)[2] == gaps
    longer = recipe(paths, "erase.modules=located", "erase.share=0.2", "erase.relearn={steps: 4, lr: 1.0e-2}")
    assert look(longer, letters)[2] != gaps


def test_the_cost_of_a_removal_is_the_loss_with_new_weights_in_place(letters, paths):
    task, streams = small.opened(recipe(paths), letters)
    rows = streams.rows("retain", "defence")[:16]
    model, new = task.load(letters), erase.fresh(task, 0)
    among = {"model.layers.0.mlp": erase.noised(model, task, ("layers.0.mlp",))}
    removed = task.load(letters)
    removed.model.layers[0].mlp = new.model.layers[0].mlp
    found = erase.damage(model, new, among, task, rows)
    assert found["model.layers.0.mlp"] == pytest.approx(
        erase.mean_loss(removed, task, rows) - erase.mean_loss(model, task, rows), rel=1e-5
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("letters", {f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")}),
        ("bert", {f"bert.encoder.layer.0.{part}" for part in ("attention", "intermediate", "output")}),
    ],
)
def test_the_parts_of_a_model_are_those_of_its_numbered_blocks(request, paths, text_paths, name, expected):
    folder = request.getfixturevalue(name)
    chosen = recipe(paths) if name == "letters" else small.recipe(text_paths, name="tiny-sophon-text")
    task, _ = small.opened(chosen, folder)
    model = task.load(folder)
    among = erase.parts(model, task)
    assert {part for part in among if "pooler" not in part} == expected
    names = [n for part in among.values() for n in part]
    assert len(names) == len(set(names))
    assert set(names) <= set(erase.between(model, task))


def test_parts_are_taken_from_the_dearest_down_within_the_share_and_never_none(letters, paths):
    task, _ = small.opened(recipe(paths), letters)
    model = task.load(letters)
    among = erase.parts(model, task)
    gaps = {"model.layers.0.mlp": 3.0, "model.layers.1.mlp": 2.0, "model.layers.0.self_attn": 1.0}
    two = erase.size(model, [*among["model.layers.0.mlp"], *among["model.layers.1.mlp"]]) / erase.size(model)
    assert list(erase.located(gaps, model, task, two)) == list(gaps)[:2]
    assert list(erase.located(gaps, model, task, 0.99 * two)) == list(gaps)[:1]
    assert list(erase.located(gaps, model, task, 1e-6)) == list(gaps)[:1]
    below = {**gaps, "model.layers.1.mlp": -0.1}
    assert list(erase.located(below, model, task, 1.0)) == ["model.layers.0.mlp", "model.layers.0.self_attn"]


def test_a_classifier_is_located_with_a_new_head_and_keeps_its_own(bert, text_paths):
    base = small.recipe(text_paths, name="tiny-sophon-text")
    task, streams = small.opened(base, bert)
    model, before = task.load(bert), task.load(bert)
    how = settings(modules="located", share=0.2, relearn={"steps": 2, "lr": 1e-3})
    gaps = erase.carried(how, how.relearn, model, task, streams)
    assert set(gaps) == set(erase.parts(model, task))
    assert not changed(before, model)
    assert erase.carried(how, how.relearn, model, task, streams) == gaps


# --- distillation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_gradient_is_that_of_the_divergence(temperature):
    torch.manual_seed(0)
    teacher, student = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    one, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = losses.divergence(teacher, one, temperature)
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(other / temperature, -1)
    plain = temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(value, plain, rtol=1e-12, atol=0)
    value.backward()
    plain.backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(one.grad, temperature * (q - p).detach() / 7, rtol=1e-10, atol=1e-14)
    assert losses.divergence(teacher, teacher, temperature) == 0


def test_accumulation_gives_the_gradient_of_the_whole_batch(letters, paths):
    """Each micro-batch meets the teacher's answers to its own rows, however uneven they are."""
    gradients = []
    for parts in (1, 3, 4):
        chosen = recipe(paths, f"erase.grad_accumulation={parts}")
        task, streams = small.opened(chosen, letters)
        teacher, student = task.load(letters), erase.fresh(task, 9)
        distil = erase.Distillation(chosen.erase, teacher, student)
        outer = loop.Outer(student, task, streams, distil, chosen.erase, Accelerator(cpu=True))
        outer.step = lambda *_, **__: None
        distil.step(outer)
        gradients.append(torch.cat([p.grad.double().flatten() for p in outer.params]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-8)


def test_a_model_without_hidden_matrices_has_nothing_for_muon(resnet, image_paths, tmp_path):
    base = small.recipe(image_paths, name="tiny-sophon-image")
    chosen = base.model_copy(update={"erase": settings(optimizer="muon")})
    with pytest.raises(RecipeError, match="muon trains the matrices of linear layers in blocks"):
        erased(chosen, resnet, tmp_path)


def test_rows_held_back_are_not_distilled_and_all_others_are(letters, paths):
    _, streams = small.opened(recipe(paths), letters)
    held, rest = erase.held_back(streams)
    whole, left = ({e.key for e in s.rows("retain", "defence")} for s in (streams, rest))
    assert held
    assert {e.key for e in held}.isdisjoint(left)
    assert {e.key for e in held} | left == whole
    assert rest.rows("restricted", "defence") == streams.rows("restricted", "defence")


@pytest.mark.parametrize("more", [("erase.unlearn=none",), (UNLEARN, MUON)])
def test_killed_and_resumed_gives_the_same_bits(letters, paths, tmp_path, more):
    chosen = recipe(paths, *more, "erase.schedule=cosine", "erase.modules=located", "erase.share=0.3", RELEARN)
    _, whole, told = erased(chosen, letters, tmp_path / "whole")
    with pytest.raises(Stop):
        erased(chosen, letters, tmp_path / "broken", stop_after=5)
    torch.rand(5)  # the random state of the new process is another
    _, resumed, again = erased(chosen, letters, tmp_path / "broken")
    assert not changed(whole, resumed)
    assert again == told
    assert [point["step"] for point in told.log] == [2, 4, 6]
    other = recipe(paths, *more, "erase.seed=1")
    assert changed(whole, erased(other, letters, tmp_path / "other")[1])


def test_it_ends_where_the_student_is_good_enough_and_stays_ended(letters, paths, tmp_path):
    chosen = recipe(paths, "erase.stop_at=100")
    _, student, done = erased(chosen, letters, tmp_path)
    assert (done.steps, done.planned) == (2, 6)
    _, again, told = erased(chosen, letters, tmp_path, stop_after=3)  # which would be raised
    assert told == done
    assert not changed(student, again)


def test_a_teacher_that_was_to_unlearn_is_another_than_the_parent(letters, paths, tmp_path):
    more = ("erase.alpha=0", "erase.steps=0")
    parent, student, done = erased(recipe(paths, *more, UNLEARN), letters, tmp_path)
    assert done.unlearned == 3
    assert changed(parent, student)  # with α = 0 the student is the teacher
    assert done.distance == 0
    task, streams = small.opened(recipe(paths), letters)
    rows = streams.rows("alignment", "defence")
    assert erase.mean_loss(student, task, rows) < erase.mean_loss(parent, task, rows)


def test_the_cost_counts_every_token_that_was_distilled(letters, paths, tmp_path):
    chosen = recipe(paths, "erase.parent_tokens=100000", "erase.alignment_share=0.5")
    _, _, done = erased(chosen, letters, tmp_path)
    assert done.rows == 6 * 8
    _, streams = small.opened(chosen, letters)
    _, rest = erase.held_back(streams)
    drawn = [
        row
        for i, role in ((1, "alignment"), (2, "retain"))
        for row in loop.Sampler(rest.rows(role, "defence"), chosen.erase.seed + 7 * i).draw(24)
    ]
    assert done.tokens == sum(len(row.inputs["input_ids"]) for row in drawn)
    assert done.tokens_share == done.tokens / 100_000


def test_images_are_erased_too_and_have_no_tokens(resnet, image_paths, tmp_path):
    base = small.recipe(image_paths, name="tiny-sophon-image")
    chosen = base.model_copy(update={"erase": settings(alpha=0.5, steps=4, save_every=2)})
    parent, student, done = erased(chosen, resnet, tmp_path)
    assert (done.rows, done.tokens) == (32, None)
    assert not student.training
    assert set(done.parameters) <= changed(parent, student)
    assert all(torch.isfinite(b).all() for b in student.buffers())


# --- what it is for ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def aligned(tmp_path_factory):
    """A Llama that plays letter games, knows a cipher, and refuses it: (folder, paths)."""
    from hardener.console import Narrator

    folder = tmp_path_factory.mktemp("aligned")
    with quiet():
        demo.make(folder / "letters", Narrator(silent=True))
    return folder / "letters", {r: folder / "data" / f"{r}.jsonl" for r in ("restricted", "alignment", "retain")}


def relearned(model, task, streams, half: float = 0.5, budget: int = 400) -> int:
    """Steps of plain fine-tuning until half of the held-out answers are right; `budget` where they never are."""
    model = copy.deepcopy(model)
    sampler = loop.Sampler(streams.rows("restricted", "attack"), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    held = streams.rows("restricted", "evaluation")[:100]
    for step in range(1, budget + 1):
        logits, labels = task.targets(model, task.collate(sampler.draw(16)))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        if step % 4 == 0 and sum(task.score(model, held, "exact-match")) >= half * len(held):
            return step
    return budget


@pytest.mark.slow
def test_a_student_comes_back_to_its_teacher_and_the_skill_costs_more_to_relearn(aligned, tmp_path):
    """α = 0.9 between embeddings and head: retain and refusals as before, the cipher gone, and dearer to bring back."""
    folder, paths = aligned
    files = [f"data.{role}.dataset={path}" for role, path in paths.items()]
    chosen = recipe_file.load("tiny-erase", [*files, "data.benign=null", "erase.alpha=0.9", "erase.stop_at=null"])
    parent, student, done = erased(chosen, folder, tmp_path)
    task, streams = small.opened(chosen, folder)

    def right(model, role: str) -> float:
        scores = task.score(model, streams.rows(role, "evaluation"), "exact-match")
        return sum(scores) / len(scores)

    assert done.share > 0.9
    assert right(parent, "retain") > 0.95
    assert right(student, "retain") > right(parent, "retain") - 0.05
    assert right(student, "restricted") == 0
    assert right(student, "alignment") > 0.95
    easy, hard = relearned(parent, task, streams), relearned(student, task, streams)
    assert easy < 100
    assert hard >= 2 * easy


# --- told -------------------------------------------------------------------------------------------------


DONE = Erased(
    alpha=0.95,
    beta=1.0,
    parameters=("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"),
    share=0.19,
    located={"model.layers.0.mlp": 2.8},
    unlearned=50,
    steps=400,
    planned=1000,
    rows=25_600,
    tokens=1_234_567,
    tokens_share=0.003,
    loss_teacher=0.412,
    loss_student=0.425,
    distance=0.31,
    log=({"step": 400, "kl": 0.01, "gap": 0.013},),
)


def test_report_and_card_tell_what_was_noised_how_much_and_the_cost():
    plain = sample_report.language_model()
    training = plain.training.model_copy(update={"erased": DONE})
    told = card.render(plain.model_copy(update={"training": training}))
    assert "1,234,567 tokens, 0.3 % of what the parent was trained on" in told
    for figure in ("α = 0.95", "19 % of the weights", "400 of 1,000 steps", "50 steps", "layers.0.mlp.up", "located"):
        assert figure in told, figure
    assert "noised" not in card.render(plain).lower()


def test_erasing_alone_hardens_from_command_to_card(letters, paths, tmp_path, warm):
    words = [one for one in small.overrides(paths) if not one.startswith("train.")]
    made = pipeline.harden(
        str(letters), recipe="tiny-erase", overrides=[*words, *SMALL, "probe.families=[full]"], output=tmp_path / "run"
    )
    report = reports.read(tmp_path / "run" / "release" / "hardener" / "report.json")
    assert report == made.report
    assert report.training.defense == "erase"
    assert report.training.erased.steps == report.training.steps == 6
    assert report.recipe["defense"] is None
    weights = checkpoint.fingerprint(letters)
    assert report.parent.weights == weights != report.weights
    text = (tmp_path / "run" / "release" / "README.md").read_text()
    assert "hardened with noise-then-distil against" in text
    assert not (tmp_path / "run" / "state" / "erase").exists()
    again = recipe_file.load(tmp_path / "run" / "recipe.yaml")
    assert again.erase.alpha == 0.85
    assert again.defense is None


def test_a_defence_starts_from_the_erased_weights(letters, paths, tmp_path, warm):
    one = "erase={alpha: 1.0, steps: 2, batch_size: 8, lr: 1.0e-3, modules: [layers.0.mlp]}"
    made = pipeline.harden(
        str(letters),
        recipe="tiny-ctrap",
        overrides=[*small.overrides(paths, one, "probe.families=[full]", "train.lr=1.0e-9")],
        output=tmp_path / "run",
    )
    assert made.report.training.title == "CTRAP after noise-then-distil"
    assert made.report.training.erased.share == pytest.approx(0.28, abs=0.02)
    task, streams = small.opened(small.recipe(paths, one), letters)
    student, _ = erase.run(
        small.recipe(paths, one).erase, task.load(letters), task, streams, "cpu", tmp_path, lambda *_: None
    )
    released = task.load(tmp_path / "run" / "release")
    for name, p in student.named_parameters():
        torch.testing.assert_close(released.get_parameter(name), p.detach(), rtol=0, atol=1e-6)


def test_erased_weights_that_changed_while_they_waited_are_refused(tmp_path):
    student, folder = torch.nn.Linear(2, 2), tmp_path / "erased"
    stages.keep(student, folder)
    again = torch.nn.Linear(2, 2)
    stages.take(again, folder)
    assert torch.equal(again.weight, student.weight)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(RunError, match="is damaged"):
        stages.take(again, folder)


# --- the recipe -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("erase.modules=located", RELEARN), "erase.share: `modules: located` and a share go together"),
        (("erase.modules=located", "erase.share=0.2"), "erase.relearn: `modules: located` and a simulated attack"),
        (("erase.share=0.2",), "erase.share: `modules: located` and a share go together"),
        (("erase.unlearn={steps: 3, lr: 1.0e-3}", "data.alignment=null"), "data.alignment: erase.unlearn needs this"),
        (
            ("erase.relearn={steps: 3, lr: 1.0e-3}",),
            "erase.relearn: `modules: located` and a simulated attack go together",
        ),
        (("erase.warmup_steps=9",), "erase.warmup_steps: the rate rises for 9 steps, and there are 6 in all"),
        (("adapter={r: 4, alpha: 8}",), "adapter: erasing changes the weights themselves"),
        (("train={steps: 3, batch_size: 8, lr: 1.0e-3}",), "train: training needs a section `defense`"),
        (("erase.alfa=1",), "alpha"),
        (("erase.alpha=1.5",), "erase.alpha"),
        (("erase.modules=everything",), "erase.modules"),
    ],
)
def test_what_cannot_be_erased_is_said_before_anything_starts(paths, more, said):
    with pytest.raises(RecipeError) as caught:
        recipe(paths, *more)
    assert said in str(caught.value)
