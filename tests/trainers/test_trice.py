"""TRICE: its weights by hand, gradients against enumeration, the memory, and what cannot be learned from."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

import rollouts
from hf_logits.trainers import trice
from hf_logits.trainers.trice import (
    TRICEConfig,
    TRICETrainer,
    acceptance_rates,
    systematic_sample,
    trice_weights,
)
from preferences import Stop, StopAt, arguments, distance, equal, logged, weights


RIGHT = torch.tensor([True, False, False, True, False])
COVERED = torch.tensor([True, True, False, True, True])
WEIGHTS = (torch.tensor([2 / 3, -2 / 3, 0, 2 / 3, -2 / 3]), torch.tensor([0.0, 1, 0, 0, 1]))  # proposals, memories


def make(folder, **settings):
    return rollouts.make(TRICETrainer, TRICEConfig, folder, **settings)


@pytest.fixture
def script(monkeypatch):
    rollouts.follow_a_script(monkeypatch)


@pytest.fixture
def said(monkeypatch):
    """What was warned of."""
    lines: list[str] = []
    for kind in ("warning", "warning_once"):
        monkeypatch.setattr(trice.logger, kind, lines.append)
    return lines


# --- the numbers ---------------------------------------------------------------------------------------------------------


def test_the_rates_by_hand():
    assert acceptance_rates(RIGHT, COVERED).tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 3, 2 / 3])


def test_the_weights_by_hand():
    found = trice_weights(RIGHT, COVERED, control_variate=True)
    for ours, expected in zip(found, WEIGHTS, strict=True):
        assert torch.allclose(ours, expected)
    assert torch.stack(found).abs().sum().item() == pytest.approx(4.666667)


def test_the_weights_without_a_control_variate():
    proposals, memories = trice_weights(RIGHT, COVERED, control_variate=False)
    assert proposals.tolist() == [1, 0, 0, 1, 0] and memories.tolist() == [0, 1, 0, 0, 1]


def test_the_systematic_sample_by_hand():
    rows, counts = systematic_sample(torch.cat(WEIGHTS[::-1]), 4, offset=0.3)
    assert rows.tolist() == [1, 4, 6, 8]
    assert counts.tolist() == pytest.approx([1.166667, 1.166667, -1.166667, 1.166667])


def test_a_systematic_sample_is_right_on_average():
    given = torch.cat(WEIGHTS)
    total = torch.zeros(10)
    for place in range(1000):
        rows, counts = systematic_sample(given, 3, offset=(place + 0.5) / 1000)
        total.index_add_(0, rows, counts / 1000)
    assert torch.allclose(total, given, atol=5e-3)


@pytest.mark.parametrize("offset", [0.0, 1 - 1e-16, math.nextafter(1.0, 0.0)])
def test_rounding_draws_no_row_without_a_weight(offset):
    given = torch.tensor([0.0, 0.1, 0.0, -0.3, 0.7, 0.0])
    rows, _ = systematic_sample(given, 5, offset=offset)
    assert (given[rows] != 0).all()


@pytest.mark.parametrize("control_variate", [True, False])
def test_nothing_right_has_no_weight(control_variate):
    none = torch.zeros(4, dtype=torch.bool)
    for part in trice_weights(none, none, control_variate=control_variate):
        assert part.tolist() == [0, 0, 0, 0]


def test_a_model_that_is_always_right_does_not_move():
    every = torch.ones(4, dtype=torch.bool)
    for part in trice_weights(every, every, control_variate=True):
        assert part.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("right", [True, False])
def test_an_example_alone_has_no_others_to_ask(right):
    proposal, memory = trice_weights(torch.tensor([right]), torch.tensor([True]), control_variate=True)
    assert (proposal.item(), memory.item()) == (float(right), float(not right))


# --- the estimators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control_variate", [True, False])
def test_the_gradient_is_that_of_the_log_probability_over_all_rationales(control_variate):
    """Two examples of four rationales, two of them right: every proposal and every memory of the posterior, weighed."""
    logits = torch.tensor([[0.3, -1.0, 0.8, 0.1], [-0.4, 0.2, 0.0, 1.5]], dtype=torch.float64, requires_grad=True)
    solves = torch.tensor([[True, False, False, True], [False, False, True, True]])
    log_probs = logits.log_softmax(1)
    log_p = torch.stack([row[good].logsumexp(0) for row, good in zip(log_probs, solves, strict=True)])
    (expected,) = torch.autograd.grad(log_p.mean(), logits, retain_graph=True)
    probs = log_probs.exp().detach()
    posterior = (probs * solves) / (probs * solves).sum(1, keepdim=True)
    scores = torch.eye(4, dtype=torch.float64)[None] - probs[:, None]  # of each example and rationale: grad log p
    mean, total = torch.zeros(2, 4, dtype=torch.float64), 0.0
    for drawn in itertools.product(range(4), repeat=2):
        for kept in itertools.product(range(4), repeat=2):
            chance = math.prod(probs[m, drawn[m]].item() * posterior[m, kept[m]].item() for m in range(2))
            if chance == 0:
                continue
            right = torch.tensor([bool(solves[m, drawn[m]]) for m in range(2)])
            proposal, memory = trice_weights(right, torch.ones(2, dtype=torch.bool), control_variate=control_variate)
            for m in range(2):
                step = proposal[m] * scores[m, drawn[m]] + memory[m] * scores[m, kept[m]]
                mean[m] += chance * step / 2
            total += chance
    assert total == pytest.approx(1.0, abs=1e-12)
    # the weights are float32
    assert torch.allclose(mean, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("bias", "p_right", "basic", "controlled"),
    [(0.0, 0.333, 0.0630, 0.0647), (2.0, 0.787, 0.0623, 0.0402), (5.0, 0.987, 0.0628, 0.0034)],
)
def test_the_variance_vanishes_with_the_control_variate_only(bias, p_right, basic, controlled):
    """Eight examples of six rationales, two of them right. Without the control variate it is 1/16, however good the model."""
    probs = torch.tensor([bias, bias, 0, 0, 0, 0], dtype=torch.float64).softmax(0)
    assert probs[:2].sum().item() == pytest.approx(p_right, abs=5e-4)
    truth = torch.tensor([0.5, 0.5, 0, 0, 0, 0], dtype=torch.float64) - probs
    generator, draws = torch.Generator().manual_seed(0), 4000
    drawn = torch.multinomial(probs, draws * 8, replacement=True, generator=generator).view(draws, 8)
    kept = torch.randint(0, 2, (draws, 8), generator=generator)
    scores = torch.eye(6, dtype=torch.float64) - probs
    covered = torch.ones(8, dtype=torch.bool)
    for control_variate, expected in ((False, basic), (True, controlled)):
        parts = [trice_weights(one < 2, covered, control_variate=control_variate) for one in drawn]
        proposal, memory = (torch.stack(part)[..., None] for part in zip(*parts, strict=True))
        estimates = (proposal * scores[drawn] + memory * scores[kept]).sum(1) / 8
        assert torch.allclose(estimates.mean(0), truth, atol=1e-2)
        assert estimates.var(0).sum().item() == pytest.approx(expected, abs=0.003, rel=0.05)


# --- the trainer's gradient ----------------------------------------------------------------------------------------------


def rows_of(trainer) -> list[dict]:
    """The first generation batch of the data."""
    trainer.model.train()
    return next(iter(trainer.get_train_dataloader()))


def gradients(trainer) -> dict[str, Tensor]:
    """Of the trainer's loss over a generation batch, as Trainer accumulates it."""
    steps = trainer.args.steps_per_generation
    batch = trainer._generate_and_score_completions(rows_of(trainer))
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    size = len(batch["advantages"]) // steps
    trainer.model.zero_grad()
    for start in range(0, len(batch["advantages"]), size):
        part = {k: v[start : start + size] if v.dim() else v for k, v in batch.items()}
        trainer.compute_loss(trainer.model, part).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def score(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Tensor:
    """The slow obvious path: the log-prob of a completion, alone and without padding."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"control_variate": False},
        {"divide_by": "all"},
        {"temperature": 0.7},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 3, "steps_per_generation": 1},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_the_gradient_is_that_of_the_formula(settings, script, tmp_path):
    trainer = make(tmp_path, **({"per_device_train_batch_size": 16} | settings))
    trainer.init_memory()
    assert trainer.memory
    trainer.memory.popitem()
    trainer.state.global_step = 12  # other proposals than in the memory
    before = dict(trainer.memory)
    found = gradients(trainer)
    tokenizer = trainer.processing_class
    loss, examples, judged, rates = torch.zeros(()), [], [], trainer.args.control_variate
    for key, proposal in trainer._proposals:
        prompt = next(
            ids for row in trainer.train_dataset
            if key == trainer._keys([row], [ids := tokenizer(row["prompt"])["input_ids"]])[0]
        )  # fmt: skip
        (right,) = rollouts.verifier([tokenizer.decode(proposal)])
        examples.append((prompt, proposal, proposal if right else before.get(key)))
        judged.append(bool(right))
    covered = [kept is not None for _, _, kept in examples]
    assert 0 < sum(judged) < sum(covered) < len(covered)  # all three cases
    for m, (prompt, proposal, kept) in enumerate(examples):
        if kept is None:
            continue
        rate = (sum(judged) - judged[m]) / (sum(covered) - 1) if rates else 0.0
        temperature = settings.get("temperature", 1.0)
        loss = loss - score(trainer.model, prompt, kept, temperature)
        loss = loss + rate * score(trainer.model, prompt, proposal, temperature)
    loss = loss / (len(covered) if settings.get("divide_by") == "all" else sum(covered))
    batches = trainer.args.gradient_accumulation_steps // trainer.args.steps_per_generation
    expected = torch.autograd.grad(loss / batches, list(trainer.model.parameters()), allow_unused=True)
    names = [name for name, _ in trainer.model.named_parameters()]
    size = max(gradient.abs().max().item() for gradient in expected)
    assert distance(found, dict(zip(names, expected, strict=True))) < 1e-5 * size
    assert size > 0.1


def test_the_mean_gradient_over_everything_that_can_be_drawn(monkeypatch, tmp_path):
    """One example, one token: every word proposed, every right word remembered, as often as the model and the posterior say."""
    good = ["w10", "w20"]
    trainer = make(
        tmp_path,
        reward=lambda completions, **_: [float(text in good) for text in completions],
        data=rollouts.questions(1),
        per_device_train_batch_size=2,
        max_completion_length=1,
    )
    model, tokenizer = trainer.model, trainer.processing_class
    words = tokenizer.convert_tokens_to_ids(good)
    prompt = tokenizer(trainer.train_dataset[0]["prompt"])["input_ids"]
    log_probs = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    names = [name for name, _ in model.named_parameters()]
    truth = torch.autograd.grad(-log_probs[words].logsumexp(0), list(model.parameters()))
    probs = log_probs.exp().detach()
    drawn: list[int] = []
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda *_: ([list(drawn)], None))
    key = trainer._keys([{}], [prompt])[0]
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for word in range(len(probs)):
        for kept in words:
            drawn[:] = [word]
            trainer.memory = {key: [kept]}
            chance = probs[word] * probs[kept] / probs[words].sum()
            for name, gradient in gradients(trainer).items():
                mean[name] += chance * gradient
            assert trainer.memory == {key: [word if word in words else kept]}
    expected = dict(zip(names, truth, strict=True))
    assert distance(mean, expected) < 1e-5 * max(one.abs().max().item() for one in truth)


# --- the memory ----------------------------------------------------------------------------------------------------------


def test_a_right_proposal_replaces_the_memory_and_a_wrong_one_does_not(script, tmp_path):
    data = rollouts.questions().add_column("id", [f"q{index}" for index in range(8)])
    trainer = make(tmp_path, data=data)
    kinds = set()
    for step in range(8):
        trainer.state.global_step = step
        before = dict(trainer.memory)
        trainer._generate_and_score_completions(rows_of(trainer))
        for key, proposal in trainer._proposals:
            (right,) = rollouts.verifier([trainer.processing_class.decode(proposal)])
            assert trainer.memory.get(key) == (proposal if right else before.get(key))
            kinds.add((bool(right), key in before))
    assert len(kinds) == 4
    assert set(trainer.memory) <= {f"q{index}" for index in range(8)}


def test_without_ids_the_prompt_is_what_an_example_is_remembered_by(script, tmp_path):
    trainer = make(tmp_path)
    keys = trainer._keys(list(trainer.train_dataset), [[index] for index in range(8)])
    assert len(set(keys)) == 8
    assert keys == make(tmp_path)._keys(list(trainer.train_dataset), [[index] for index in range(8)])


def test_another_column_can_be_the_id(tmp_path):
    data = rollouts.questions().add_column("number", list(range(8)))
    trainer = make(tmp_path, data=data, id_column="number", remove_unused_columns=True)
    assert trainer.init_memory() > 0
    assert set(trainer.memory) <= set("01234567")
    trainer.train()
    assert set(trainer.memory) <= set("01234567")


def test_a_memory_that_no_longer_passes_has_no_weight(script, tmp_path):
    """Two rows of one prompt with other answers, say: what the one remembered does not help the other."""
    trainer = make(tmp_path)
    trainer.init_memory()
    trainer.state.global_step = 12
    trainer.reward_funcs[0] = lambda completions, **_: [0.0] * len(completions)
    batch = trainer._generate_and_score_completions(rows_of(trainer))
    assert trainer.memory and not batch["advantages"].any()


def test_rows_without_a_weight_never_reach_the_model(script, tmp_path):
    trainer = make(tmp_path, data=rollouts.questions(16), per_device_train_batch_size=32, max_steps=1)
    trainer.init_memory()
    trainer.state.global_step = 12
    batch = trainer._generate_and_score_completions(rows_of(trainer))
    kept = len(batch["advantages"])
    assert (batch["advantages"] != 0).all() and 8 < kept < 32
    assert {len(value) for value in batch.values() if value.dim()} == {kept}
    sizes = []
    handle = trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, batch)
    handle.remove()
    assert sizes == [kept]
    assert trainer._metrics["train"]["trice/rows"][-1] == kept / 32


def test_a_subsample_costs_what_it_says_and_is_right_on_average(script, tmp_path, monkeypatch):
    data, draws = rollouts.questions(16), 60

    def advantages(**settings) -> tuple[Tensor, set[int]]:
        trainer = make(tmp_path, data=data, per_device_train_batch_size=32, shuffle_dataset=False, **settings)
        trainer.init_memory()
        trainer.state.global_step, memory = 12, dict(trainer.memory)
        rows, total, sizes = rows_of(trainer), torch.zeros(64), set()
        for draw in range(draws):
            trainer.memory = dict(memory)
            monkeypatch.setattr(torch, "rand", lambda _, place=draw: torch.tensor((place + 0.5) / draws))
            batch = trainer._generate_and_score_completions(rows)
            sizes.add(len(batch["advantages"]))
            # the loss is the mean over rows: what each token id's log-prob is multiplied with
            ids = batch["completion_ids"].flatten()
            counts = (batch["advantages"][:, None] * batch["completion_mask"]).flatten() / len(batch["advantages"])
            total.index_add_(0, ids, counts / draws)
        return total, sizes

    everything, all_rows = advantages()
    some, few_rows = advantages(subsample_size=10)
    assert few_rows == {10} and min(all_rows) > 10
    assert torch.allclose(some, everything, atol=0.01)
    assert everything.abs().max() > 0.1


def test_a_subsample_that_holds_all_rows_with_a_weight_is_no_draw(script, tmp_path):
    found = []
    for size in (None, 8):
        trainer = make(tmp_path, subsample_size=size, learning_rate=1e-2, max_steps=4)
        trainer.init_memory()
        trainer.train()
        found.append(weights(trainer))
    assert equal(*found)


def test_log_probs_of_a_server_are_those_of_the_proposals_only(monkeypatch, tmp_path):
    monkeypatch.setattr(
        GRPOTrainer,
        "_generate_single_turn",
        lambda self, ids, images, fields, generations: ([[7, 9]] * len(ids), [[-0.5, -generations]] * len(ids)),
    )
    trainer = make(tmp_path)
    trainer.memory = dict.fromkeys(trainer._keys([{}], [[1]]), [5, 6, 8])
    trainer._examples = [{}] * 4
    ids, log_probs = trainer._generate_single_turn([[1], [1], [2], [2]], None, {}, 2)
    assert ids == [[7, 9], [5, 6, 8], [7, 9], [7, 9]]
    assert log_probs == [[-0.5, -1], [None] * 3, [-0.5, -1], [None] * 2]


def test_the_table_of_completions_has_the_weights(script, tmp_path):
    trainer = make(tmp_path)
    trainer.init_memory()
    trainer.state.global_step = 12
    trainer._generate_and_score_completions(rows_of(trainer))
    shown = torch.tensor(trainer._logs["advantages"]).view(-1, 2)
    right = trainer._is_right(trainer._judged[:, 0].view(-1, 2))
    right[:, 1] &= torch.tensor([key in trainer.memory for key, _ in trainer._proposals])
    expected = trice_weights(right[:, 0], right[:, 1], control_variate=True)
    assert torch.equal(shown, torch.stack(expected, 1)) and shown.any()


# --- before and beside training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_memory_is_filled_behind_a_guide(conversational, batch_size, monkeypatch, tmp_path):
    asked, judged = [], []

    def speak(trainer, prompt_ids, images, fields, num_generations, *_):
        assert num_generations == 1
        asked.extend(trainer.processing_class.batch_decode(prompt_ids))
        return [[10 + ids[-2 if conversational else -1] % 8] for ids in prompt_ids], None

    def verifier(prompts, completions, answer, **_):
        judged.extend(str(prompt) for prompt in prompts)
        return [float(index % 2 == 0) for index in answer]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", speak)
    data = rollouts.questions(8, conversational=conversational)
    data = data.add_column("answer", list(range(8))).add_column("id", [f"q{i}" for i in range(8)])

    def guide(row):
        if not conversational:
            return f"{row['prompt']} w{40 + row['answer']}"
        return [*row["prompt"], {"role": "user", "content": f"w{40 + row['answer']}"}]

    trainer = make(tmp_path, reward=verifier, data=data)
    assert trainer.init_memory(guide, batch_size=batch_size) == 0.5
    assert set(trainer.memory) == {"q0", "q2", "q4", "q6"}
    assert all(f"w{40 + index}" in text for index, text in enumerate(asked[:8]))
    assert not any("w40" in text for text in judged[:8])
    assert not trainer._metrics["train"] and not trainer._metrics["eval"]
    trainer.train()
    assert not any("w40" in text.split()[-3:] for text in asked[9:])


def test_a_guide_returns_what_prompts_are(tmp_path):
    with pytest.raises(TypeError, match="a prompt like the data's, a str; got a list"):
        make(tmp_path).init_memory(lambda row: [{"role": "user", "content": row["prompt"]}])
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        make(tmp_path).init_memory(batch_size=0)


def test_the_first_time_through_teaches_nothing_without_a_memory(said, tmp_path):
    def half(completions, **_):
        return [float(place // 2 % 2) for place in range(len(completions))]

    trainer = make(tmp_path, max_steps=2, reward=half)
    start = weights(trainer)
    trainer.train()
    assert logged(trainer, "trice/accepted") == [0.5, 0.5]
    assert equal(start, weights(trainer))
    assert said[0].startswith("No example of a step had a memory") and "init_memory" in said[0]


def test_a_model_that_is_always_right_is_no_reason_to_warn(said, tmp_path):
    trainer = make(tmp_path, reward=lambda completions, **_: [1.0] * len(completions))
    assert trainer.init_memory() == 1.0
    trainer.train()
    assert not said and logged(trainer, "trice/beta") == [1.0] * 3


def test_the_basic_estimator_learns_from_the_first_proposal(said, tmp_path):
    trainer = make(tmp_path, max_steps=2, control_variate=False)
    start = weights(trainer)
    trainer.train()
    assert distance(start, weights(trainer)) > 0
    assert not said


def test_evaluation_has_plain_samples_and_no_memory(tmp_path):
    seen = []

    def verifier(prompts, completions, **_):
        seen.append(list(prompts))
        return rollouts.verifier(completions)

    trainer = make(tmp_path, reward=verifier, evaluation=rollouts.questions(3, seed=1))
    trainer.init_memory()
    before = dict(trainer.memory)
    del seen[:]
    trainer.model.eval()
    found = trainer.evaluate()
    assert sorted(itertools.chain(*seen)) == sorted(rollouts.questions(3, seed=1)["prompt"])
    assert trainer.memory == before
    assert not any("trice" in key for key in found)


def test_what_is_logged(script, tmp_path):
    trainer = make(tmp_path, max_steps=6)
    trainer.init_memory()
    trainer.train()
    names = ("accepted", "covered", "beta", "rows", "unjudged")
    metrics = {name: logged(trainer, f"trice/{name}") for name in names}
    assert all(len(values) == 6 for values in metrics.values())
    assert all(a <= c for a, c in zip(metrics["accepted"], metrics["covered"], strict=True))
    assert all(0 <= value <= 1 for values in metrics.values() for value in values)
    assert max(metrics["beta"]) > 0 == max(metrics["unjudged"])


# --- checkpoints ---------------------------------------------------------------------------------------------------------


def test_the_memory_survives_a_kill(tmp_path):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    unbroken = make(tmp_path / "unbroken", **settings)
    unbroken.init_memory()
    unbroken.train()
    killed = make(tmp_path / "killed", callbacks=[StopAt(5)], **settings)
    killed.init_memory()
    with pytest.raises(Stop):
        killed.train()
    resumed = make(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.memory == unbroken.memory and unbroken.memory
    assert resumed._counts == unbroken._counts and unbroken._counts[0] == 8 * 2
    assert equal(weights(resumed), weights(unbroken))


def test_an_empty_memory_is_saved_too(tmp_path):
    trainer = make(tmp_path)
    trainer.load_extra_state(trainer.extra_state())
    assert trainer.memory == {} and trainer._counts == [0, 0]


def test_the_memory_is_its_state(tmp_path):
    trainer = make(tmp_path)
    trainer.memory = {"é\n1": [3, 5], "": [], "x": [49151]}
    trainer._counts = [9, 4]
    other = make(tmp_path)
    other.load_extra_state(trainer.extra_state())
    assert other.memory == trainer.memory and list(other.memory) == list(trainer.memory)
    assert other._counts == [9, 4]


def test_memories_that_became_too_long_are_forgotten(said, tmp_path):
    trainer = make(tmp_path)
    trainer.memory = {"a": [3] * 6, "b": [3] * 4, "c": [3] * 5}
    shorter = make(tmp_path, max_completion_length=4)
    shorter.load_extra_state(trainer.extra_state())
    assert shorter.memory == {"b": [3] * 4}
    assert said == ["2 of 3 remembered rationales are longer than max_completion_length (4): forgotten."]


def test_a_checkpoint_without_a_memory_is_refused(tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    rollouts.make(GRPOTrainer, GRPOConfig, tmp_path, num_generations=2, **settings).train()
    with pytest.raises(ValueError, match="has no rationales.safetensors"):
        make(tmp_path, **settings).train(resume_from_checkpoint=True)


# --- what cannot be learned from -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*All reward functions returned None")
@pytest.mark.parametrize("nothing", [None, math.nan])
def test_what_the_verifier_does_not_judge_is_not_right(nothing, said, script, tmp_path):
    def unsure(completions, **_):
        return [one or nothing for one in rollouts.verifier(completions)]

    found = []
    for reward in (rollouts.verifier, unsure):
        trainer = make(tmp_path, reward=reward, max_steps=4, learning_rate=1e-2)
        trainer.init_memory()
        trainer.train()
        found.append((weights(trainer), trainer.memory))
        unjudged = logged(trainer, "trice/unjudged")
    assert equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert max(unjudged) > 0
    assert sum("returned None or NaN" in line for line in said) == sum(value > 0 for value in unjudged)


def test_a_verifier_with_too_few_answers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="returned 1 rewards, but 8 were expected"):
        make(tmp_path, reward=lambda completions, **_: [1.0]).train()


@pytest.mark.parametrize("control_variate", [True, False])
def test_a_run_without_a_right_answer_changes_nothing_and_says_so(control_variate, said, tmp_path):
    trainer = make(
        tmp_path,
        reward=lambda completions, **_: [0.0] * len(completions),
        control_variate=control_variate,
        max_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    start = weights(trainer)
    assert trainer.init_memory() == 0.0
    trainer.train()
    assert equal(start, weights(trainer))
    assert logged(trainer, "grad_norm") == [0.0] * 3 and logged(trainer, "trice/covered") == [0.0] * 3
    assert sum("No example of a step had a right rationale" in line for line in said) == 3
    assert said[-1].startswith("None of the 12 proposals of this run was right (a rate of 0.0): nothing was learned.")


def test_a_run_that_lived_on_its_memory_says_so(said, script, tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.init_memory()
    kept = {tuple(ids) for ids in trainer.memory.values()}
    trainer.reward_funcs[0] = lambda completion_ids, **_: [float(tuple(ids) in kept) for ids in completion_ids]
    trainer.train()  # the script proposes at step 0 what it said then
    assert not said[1:]
    trainer.memory, trainer._counts = {key: [*ids, 3] for key, ids in trainer.memory.items()}, [0, 0]
    kept = {tuple(ids) for ids in trainer.memory.values()}
    start = weights(trainer)
    trainer.train()
    assert distance(start, weights(trainer)) > 0
    assert "only what `init_memory` found was learned from" in said[-1]


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"per_device_train_batch_size": 3}, 3),
        ({"per_device_train_batch_size": 1}, 1),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}, 9),
    ],
)
def test_odd_batches_are_refused(settings, rows, tmp_path):
    with pytest.raises(ValueError, match=f"Each process has {rows} rows .* make that number even"):
        arguments(TRICEConfig, tmp_path, **settings)


@pytest.mark.parametrize("size", [{}, {"generation_batch_size": 6}])
def test_pairs_do_not_straddle_processes(size, monkeypatch, tmp_path):
    monkeypatch.setattr(TRICEConfig, "world_size", 2)
    with pytest.raises(ValueError, match="Each process has 3 rows .* on one process"):
        arguments(TRICEConfig, tmp_path, per_device_train_batch_size=3, **size)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_generations", 4),
        ("num_iterations", 2),
        ("loss_type", "grpo"),
        ("importance_sampling_level", "token"),
        ("beta", 0.1),
        ("entropy_coef", 0.1),
        ("use_adaptive_entropy", True),
        ("top_entropy_quantile", 0.2),
        ("off_policy_mask_threshold", 0.5),
        ("mask_truncated_completions", True),
        ("delta", 2.0),
        ("top_p", 0.9),
        ("top_k", 50),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
    ],
)
def test_settings_that_change_the_gradient_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"TRICE needs {name}="):
        arguments(TRICEConfig, tmp_path, per_device_train_batch_size=8, **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps_per_generation": 2}, r"steps_per_generation \(2\) must divide gradient_accumulation_steps \(1\)"),
        ({"generation_kwargs": {"top_p": 0.9, "num_beams": 2}}, "must leave num_beams, top_p alone"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "must leave no_repeat_ngram_size alone"),
        ({"divide_by": "some"}, "divide_by must be 'right' or 'all', got 'some'"),
        ({"verifier_threshold": math.nan}, "verifier_threshold must be in"),
        ({"subsample_size": 0}, "subsample_size must be a whole number of at least 1"),
        ({"subsample_size": 9}, "at most the 8 rows"),
        ({"subsample_size": 3, "gradient_accumulation_steps": 2}, r"a multiple of .* \(2\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(TRICEConfig, tmp_path, **({"per_device_train_batch_size": 8} | settings))


def test_what_the_verifier_logs_about_the_guides_samples_is_of_no_step(tmp_path):
    def logging_verifier(completions, log_extra, log_metric, **columns):
        log_extra("length", [len(text) for text in completions])
        log_metric("guided", float(trainer._guiding))
        return rollouts.verifier(completions)

    trainer = make(tmp_path, reward=logging_verifier, max_steps=1, log_completions=False)
    trainer.init_memory()
    trainer.train()
    assert logged(trainer, "guided") == [0.0]
    assert len(trainer._logs["extra"]["length"]) == 8


def test_a_model_must_draw_freely_and_have_a_place_for_the_answer(tmp_path):
    trainer = make(tmp_path / "one")
    trainer.model.generation_config.no_repeat_ngram_size = 1
    with pytest.raises(ValueError, match="no_repeat_ngram_size=1"):
        trainer.train()
    trainer = make(tmp_path / "two")
    trainer.model.config.max_position_embeddings = 8
    with pytest.raises(ValueError, match="an answer to it can have 6 .* holds 8"):
        trainer.train()


def test_one_verifier_and_nothing_else(tmp_path):
    make(tmp_path, reward=(rollouts.verifier,))
    with pytest.raises(TypeError, match="must be a function or a reward model, got 3"):
        make(tmp_path, reward=3)
    with pytest.raises(ValueError, match="one verifier .* got 2 reward functions"):
        make(tmp_path, reward=[rollouts.verifier, rollouts.verifier])
    for name in ("tools", "rollout_func", "environment_factory"):
        with pytest.raises(ValueError, match=f"leave {name} out"):
            TRICETrainer("nowhere", rollouts.verifier, arguments(TRICEConfig, tmp_path), **{name: [print]})


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ({"question": ["w6", "w7"]}, {}, "no column 'prompt'"),
        ({"prompt": ["w6", "w7"], "id": [1, 1]}, {}, "'id' has 1 different values in 2 rows"),
        ({"prompt": ["w6", "w7"]}, {"id_column": "number"}, "no column 'number'"),
        ({"prompt": ["w6", "w7"]}, {}, "has 2 prompts, but a generation batch takes 4"),
        ({"prompt": ["w6", "w7"], "image": ["a", "b"]}, {}, "for text, but the train dataset has the column 'image'"),
    ],
)
def test_data_that_cannot_be_used_is_refused(data, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data=Dataset.from_dict(data), **settings)


def test_a_trainer_without_settings_makes_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(
        trice, "TRICEConfig", lambda folder: made.append(folder) or arguments(TRICEConfig, tmp_path, bf16=False)
    )
    monkeypatch.setattr(GRPOTrainer, "__init__", lambda *_, **__: None)
    TRICETrainer("my/model", rollouts.verifier)
    assert made == ["model-TRICE"]
