"""What the trainers rely on in TRL and transformers beyond their documentation: one test a hook, which says what moved."""

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
import trl
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

import rollouts
from hf_logits.replay import NOT_FOR_THE_MODEL, ReplayMixin
from hf_logits.trainers.f_dpo import LOSSES
from preferences import arguments, equal, logged, make, pairs, tokenizer, unpaired, weights


STOCK = {
    "DPO": (DPOTrainer, DPOConfig, pairs, {}, ("ref_chosen_logps", "ref_rejected_logps")),
    "KTO": (
        KTOTrainer,
        KTOConfig,
        unpaired,
        {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"},
        ("ref_logps", "ref_KL_logps"),
    ),
}
both = pytest.mark.parametrize("kind", STOCK)


@contextmanager
def hook(where: str, what: str) -> Iterator[None]:
    """Whatever goes wrong inside is reported as the hook that moved."""
    try:
        yield
    except Exception as error:
        pytest.fail(
            f"{where} of TRL {trl.__version__} and transformers {transformers.__version__} is no longer as the trainers "
            f"need it: {what} ({type(error).__name__}: {error})",
            pytrace=False,
        )


def stock(kind, folder, **settings):
    trainer, config, data, own, _ = STOCK[kind]
    return make(trainer, config, folder, data=data(), **(own | settings))


def one_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def replaying(kind):
    host, config, _, _, columns = STOCK[kind]

    class Replaying(ReplayMixin, host):
        _config = config
        reference_columns = columns

        def check_dataset(self, dataset, name):
            return dataset

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs, reference = self.run_once(model, inputs), self.reference(inputs)
            return self.replay(model, inputs, outputs, reference=reference, return_outputs=return_outputs)

    return Replaying


@both
def test_the_model_is_called_once_and_only_called(kind, tmp_path):
    trainer = stock(kind, tmp_path)
    batch, calls = one_batch(trainer), []

    def record(**kwargs):
        calls.append(kwargs)
        return trainer.model(**kwargs)

    with hook(f"{kind}Trainer.compute_loss", "it takes any callable for `model`, and calls it once for a batch"):
        loss = trainer.compute_loss(record, batch)
        assert loss.requires_grad
        assert len(calls) == 1

    with hook(f"{kind}Trainer._compute_loss", "it asks for the fused head with the arguments that run_once gives"):
        asked = []
        replaying(kind).run_once(trainer, lambda **kwargs: asked.append(kwargs), batch)
        (ours,) = asked
        (theirs,) = calls
        assert ours.keys() == theirs.keys()
        assert all(ours[key] is theirs[key] for key in ours if key != "labels")
        assert torch.equal(ours["labels"], theirs["labels"])
        assert ours["fused_lm_head"] is True


@both
def test_the_fused_head_returns_log_probs_that_can_be_replaced(kind, tmp_path):
    trainer = stock(kind, tmp_path)
    batch = one_batch(trainer)
    outputs = replaying(kind).run_once(trainer, trainer.model, batch)
    with hook("FusedCausalLMOutput", "log_probs are shifted by one, and 0 outside of the completion"):
        mask = batch["completion_mask"][:, 1:].bool()
        assert outputs.log_probs.shape == mask.shape
        assert (outputs.log_probs[~mask] == 0).all()
        assert (outputs.log_probs[mask] < 0).all()
        full = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        each = full[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        torch.testing.assert_close(outputs.log_probs[mask], each[mask])
    with hook("FusedCausalLMOutput", "it is a dataclass with a field log_probs"):
        assert dataclasses.replace(outputs, log_probs=outputs.log_probs.detach()).entropy is outputs.entropy


def test_the_first_half_of_a_batch_is_chosen(tmp_path):
    trainer = stock("DPO", tmp_path)
    batch = one_batch(trainer)
    with hook("DataCollatorForPreference", "a batch is the chosen completions, then the rejected ones"):
        rows = {tuple(row["prompt_ids"] + row["chosen_ids"]): True for row in trainer.train_dataset}
        rows |= {tuple(row["prompt_ids"] + row["rejected_ids"]): False for row in trainer.train_dataset}
        kinds = [
            rows[tuple(ids[mask.bool()].tolist())]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert kinds == [True, True, False, False]


@both
def test_the_reference_is_read_from_the_batch(kind, tmp_path):
    trainer, columns = stock(kind, tmp_path), STOCK[kind][4]
    batch = one_batch(trainer)
    with hook(f"{kind}Trainer.compute_ref_log_probs", f"it returns {' and '.join(columns)}, the latter None for KTO"):
        first, second = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        assert not first.requires_grad
        assert (second is None) == (kind == "KTO")
    given = {column: value for column, value in zip(columns, (first, second), strict=True) if value is not None}
    with hook(f"{kind}Trainer.precompute_ref_logps", "while it is True, the reference is read from the batch"):
        plain = trainer.compute_loss(trainer.model, batch)
        trainer.precompute_ref_logps, trainer.ref_model = True, None
        assert torch.equal(trainer.compute_loss(trainer.model, {**batch, **given}), plain)
        moved = {columns[0]: given[columns[0]] - 3.0}
        assert not torch.equal(trainer.compute_loss(trainer.model, {**batch, **given, **moved}), plain)


@both
def test_what_is_no_argument_of_the_model_is_known(kind, tmp_path):
    trainer = stock(kind, tmp_path, precompute_ref_log_probs=True)
    with hook(f"{kind}Trainer", "a batch holds arguments of the model and the columns in NOT_FOR_THE_MODEL"):
        assert set(one_batch(trainer)) - NOT_FOR_THE_MODEL == {"input_ids", "attention_mask"}


SETTINGS = [{}, {"lora": True}, {"bf16": True}, {"precompute_ref_log_probs": True}, {"gradient_accumulation_steps": 2}]


@both
@pytest.mark.parametrize(
    "settings", [*SETTINGS, {"gradient_checkpointing": True}], ids=lambda s: "-".join(s) or "plain"
)
def test_a_replay_is_the_stock_trainer_bit_for_bit(kind, settings, tmp_path):
    _, config, data, own, _ = STOCK[kind]
    trainers = stock(kind, tmp_path, **settings), make(
        replaying(kind), config, tmp_path, data=data(), **own, **settings
    )  # fmt: skip
    with hook(f"{kind}Trainer", "run once and replayed, it trains and logs what it does by itself"):
        for trainer in trainers:
            trainer.train()
            trainer.state.log_history.pop()  # how long it took
        assert equal(*map(weights, trainers))
        assert trainers[0].state.log_history == trainers[1].state.log_history


@both
def test_metrics_are_averaged_and_cleared_by_a_log(kind, tmp_path):
    trainer = stock(kind, tmp_path)
    with hook(f"{kind}Trainer._metrics", "lists under `train` and `eval`, which log() averages and clears"):
        trainer.model.train()
        trainer._metrics["train"]["ours"] += [1.0, 2.0]
        trainer._metrics["eval"]["ours"].append(7.0)
        trainer.log({})
        assert logged(trainer, "ours") == [1.5]
        trainer.model.eval()
        trainer.log({})
        assert logged(trainer, "eval_ours") == [7.0]
        assert not trainer._metrics["train"]["ours"]


@both
def test_the_attributes_that_we_read(kind, tmp_path):
    trainer = stock(kind, tmp_path)
    names = {"beta", "aux_loss_enabled", "precompute_ref_logps", "ref_model", "accelerator", "state"}
    names |= {"ld_alpha", "loss_types"} if kind == "DPO" else {"calculate_KL"}
    for name in sorted(names):
        with hook(f"{kind}Trainer.{name}", "the attribute exists after __init__"):
            getattr(trainer, name)
    with hook(f"{kind}Trainer.loss_is_scaled_for_ga", "False: Trainer divides by the number of micro-batches"):
        assert trainer.loss_is_scaled_for_ga is False


@both
def test_no_kl_pairs_and_signatures_in_order(kind):
    host = STOCK[kind][0]
    with hook(f"{kind}Trainer.__init__", "model, ref_model and args are its first arguments"):
        assert list(inspect.signature(host.__init__).parameters)[1:4] == ["model", "ref_model", "args"]
    with hook(f"{kind}Trainer._prepare_dataset", "dataset, processing_class, args and dataset_name are its arguments"):
        names = ["dataset", "processing_class", "args", "dataset_name"]
        assert list(inspect.signature(host._prepare_dataset).parameters)[1:] == names
    with hook(f"{kind}Trainer.compute_loss", "model, inputs, return_outputs and num_items_in_batch are its arguments"):
        names = ["model", "inputs", "return_outputs", "num_items_in_batch"]
        assert list(inspect.signature(host.compute_loss).parameters)[1:] == names


@both
def test_datasets_are_prepared_in_init(kind, tmp_path):
    host, config, data, own, _ = STOCK[kind]
    seen = []

    class Watching(host):
        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            seen.append(dataset_name)
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    with hook(f"{kind}Trainer._prepare_dataset", "called in __init__ for the train and the eval dataset"):
        make(Watching, config, tmp_path, data=data(), evaluation=data(4), **own)
        assert seen == ["train", "eval"]


@both
def test_columns_beside_the_signature_are_dropped(kind, tmp_path):
    trainer = stock(kind, tmp_path)
    with hook(f"{kind}Trainer._set_signature_columns_if_needed", "it fills the list _signature_columns"):
        trainer._set_signature_columns_if_needed()
        assert isinstance(trainer._signature_columns, list)
        assert "prompt_ids" in trainer._signature_columns


def test_kto_makes_no_kl_pairs_for_apo(tmp_path):
    with hook("KTOTrainer.calculate_KL", "False with loss_type='apo_zero_unpaired'"):
        assert stock("KTO", tmp_path).calculate_KL is False


def test_items_counted_for_a_step_reach_the_loss(tmp_path):
    seen = []

    class Counting(DPOTrainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            return batches, torch.tensor(10 * len(batches))

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(num_items_in_batch.item())
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    with hook("Trainer.get_batch_samples", "all micro-batches of a step, and a count that compute_loss is given"):
        make(Counting, DPOConfig, tmp_path, gradient_accumulation_steps=2, max_steps=1).train()
        assert seen == [20, 20]


def test_state_of_our_own_is_saved_and_loaded_with_the_optimizer(tmp_path):
    seen = []

    class Watching(DPOTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            seen.append(("saved", output_dir))
            super()._save_optimizer_and_scheduler(output_dir)

        def _load_optimizer_and_scheduler(self, checkpoint):
            seen.append(("loaded", checkpoint))
            super()._load_optimizer_and_scheduler(checkpoint)

    settings = {"save_strategy": "steps", "save_steps": 1}
    with hook("Trainer._save_optimizer_and_scheduler, _load_optimizer_and_scheduler", "called with the checkpoint"):
        make(Watching, DPOConfig, tmp_path, max_steps=1, **settings).train()
        make(Watching, DPOConfig, tmp_path, max_steps=2, **settings).train(resume_from_checkpoint=True)
        first, second = (str(tmp_path / f"checkpoint-{step}") for step in (1, 2))
        assert seen == [("saved", first), ("loaded", first), ("saved", second)]


def test_the_losses_that_take_another_divergence_are_still_these(tmp_path):
    with hook("DPOTrainer.__init__", "the losses that see only differences of rewards"):
        for name in sorted(LOSSES):
            make(
                DPOTrainer,
                DPOConfig,
                tmp_path,
                f_divergence_type="js_divergence",
                loss_type=[name],
                label_smoothing=0.1,
            )
        with pytest.raises(ValueError) as refused:
            make(DPOTrainer, DPOConfig, tmp_path, f_divergence_type="js_divergence", loss_type=["nca_pair"])
        assert all(repr(name) in str(refused.value) for name in LOSSES)


def test_the_map_to_the_alpha_of_trl_is_still_1_minus(tmp_path):
    """TRL turned its convention round once, without a word."""
    from hf_logits.trainers.f_dpo import FDPOConfig, FDPOTrainer

    settings = {"learning_rate": 0.0, "max_steps": 1, "model": None}
    with hook("DPOConfig.f_alpha_divergence_coef", "1 minus the alpha of the paper"):
        theirs = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2}
        losses = [
            make(DPOTrainer, DPOConfig, tmp_path, **theirs, **settings),
            make(FDPOTrainer, FDPOConfig, tmp_path, divergence="alpha", divergence_alpha=0.8, **settings),
        ]
        for trainer in losses:
            trainer.train()
        assert logged(losses[0], "loss") == pytest.approx(logged(losses[1], "loss"), rel=1e-3)


def test_a_hook_that_moved_is_named(monkeypatch, tmp_path):
    monkeypatch.delattr(DPOTrainer, "compute_ref_log_probs")
    with pytest.raises(pytest.fail.Exception, match="DPOTrainer.compute_ref_log_probs of TRL"):
        test_the_reference_is_read_from_the_batch("DPO", tmp_path)


def test_trainer_has_the_public_hooks():
    with hook("transformers.Trainer", "get_batch_samples, compute_loss"):
        assert {"get_batch_samples", "compute_loss"} <= vars(Trainer).keys()


def test_a_batch_that_was_not_run_is_not_replayed(tmp_path):
    """KTO with KL pairs asks for a second batch: it would get the first one's outputs."""
    trainer = make(replaying("KTO"), KTOConfig, tmp_path, data=unpaired(), loss_type="kto")
    batch = one_batch(trainer)
    with pytest.raises(RuntimeError, match="KL pairs"):
        outputs = trainer.model(**{k: batch[k] for k in ("input_ids", "attention_mask")})
        trainer.replay(trainer.model, batch, outputs)
    assert trainer.precompute_ref_logps is False


def test_a_trainer_without_args_makes_its_own_config(tmp_path, monkeypatch):
    import tiny

    monkeypatch.chdir(tmp_path)
    trainer = replaying("DPO")
    made = []
    monkeypatch.setattr(
        trainer, "_config", staticmethod(lambda folder: made.append(folder) or arguments(DPOConfig, tmp_path))
    )
    trainer(model=tiny.llama(0), ref_model=tiny.llama(1), train_dataset=pairs(), processing_class=tokenizer())
    assert made == ["-DPO"]


def mixture_of_experts():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, router_aux_loss_coef=0.5, **shape, **experts))


@both
def test_the_auxiliary_loss_of_experts_stays(kind, tmp_path):
    _, config, data, own, _ = STOCK[kind]
    trainers = [
        make(trainer, config, tmp_path, data=data(), model=mixture_of_experts(), **own)
        for trainer in (STOCK[kind][0], replaying(kind))
    ]
    with hook(f"{kind}Trainer.aux_loss_enabled", "router logits are asked for, and their loss added and logged"):
        for trainer in trainers:
            trainer.train()
        assert equal(*map(weights, trainers))
        assert logged(trainers[0], "aux_loss") == logged(trainers[1], "aux_loss") != []


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
@both
def test_logits_can_be_asked_for(kind, tmp_path):
    _, config, data, own, _ = STOCK[kind]
    trainer = make(replaying(kind), config, tmp_path, data=data(), **own)
    batch = one_batch(trainer)
    with hook(f"{kind}Trainer.compute_loss", "with return_outputs it runs the model for logits, and returns both"):
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        assert torch.equal(loss, trainer.compute_loss(trainer.model, batch))
        assert outputs.logits.shape == (*batch["input_ids"].shape, 64)


# --- GRPO ----------------------------------------------------------------------------------------------------------------


def sampling(folder, **settings):
    return rollouts.make(GRPOTrainer, GRPOConfig, folder, num_generations=2, **settings)


def test_samples_can_be_taken_over(tmp_path):
    with hook("GRPOTrainer._generate_single_turn", "prompts, images, other fields and the generations come first"):
        names = ["prompt_ids", "images", "multimodal_fields", "num_generations"]
        assert list(inspect.signature(GRPOTrainer._generate_single_turn).parameters)[1:5] == names
        trainer = sampling(tmp_path)
        ids, log_probs = trainer._generate_single_turn([[5, 6], [7]], None, {}, 1)
        assert len(ids) == 2 and all(isinstance(one, list) for one in ids) and log_probs is None
    with hook("GRPOTrainer._generate", "it returns the ids second and the completions fourth"):
        _, ids, _, completions, *_ = trainer._generate(["w10 w11", "w12"])
        assert completions == trainer.processing_class.batch_decode(ids, skip_special_tokens=True)


def test_the_batch_of_grpo(tmp_path):
    trainer = sampling(tmp_path)
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    with hook("GRPOTrainer.get_train_dataloader", "rows as they are, those of one prompt one behind the other"):
        assert [row["prompt"] for row in rows[::2]] == [row["prompt"] for row in rows[1::2]]
    seen = []
    stock = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *given: seen.append(stock(*given)) or seen[-1]
    with hook("GRPOTrainer._generate_and_score_completions", "tensors with a row for each sample, and totals"):
        batch = trainer._generate_and_score_completions(rows)
        assert {len(value) for value in batch.values() if value.dim()} == {8}
        assert batch["advantages"].shape == (8,)
    with hook("GRPOTrainer._calculate_rewards", "a row for each sample of all processes, a column for each function"):
        assert seen[0].shape == (8, 1)
    with hook("GRPOTrainer._logs", "the advantages of one generation batch"):
        assert trainer._logs["advantages"].maxlen == len(trainer._logs["advantages"]) == 8
    with hook("GRPOTrainer._get_train_sampler", "it shuffles with a generator that can be seeded"):
        sampler = trainer._get_train_sampler()
        orders = []
        for _ in range(2):
            sampler.generator.manual_seed(1)
            orders.append(list(sampler))
        assert sampler.shuffle and orders[0] == orders[1]


def test_the_sequence_loss_of_grpo_is_reinforce(tmp_path):
    trainer = sampling(tmp_path, loss_type="luspo", importance_sampling_level="sequence")
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    batch["advantages"] = torch.linspace(-1, 2, 8)
    weights = list(trainer.model.parameters())
    with hook(
        "GRPOTrainer._compute_loss", "luspo: the advantage times each row's log-prob, averaged over rows and steps"
    ):
        found = torch.autograd.grad(trainer.compute_loss(trainer.model, batch), weights)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width = batch["completion_ids"].shape[1]
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
        each = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
        rows = (each * batch["completion_mask"]).sum(1)
        expected = torch.autograd.grad(-(batch["advantages"] * rows).mean() / 2, weights)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
