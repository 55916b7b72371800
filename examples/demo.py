"""Watch a real language model being steered: `make demo`, or `python examples/demo.py --model YOUR/MODEL`.

Each section below is one method on one or more prompts: plain and steered text side by side, what the steering cost, and a
figure of what the processor did token by token. Every word is generated as you watch. The model is small, and so is its
knowledge: look at how the text moves, not at whether it is wise.
"""

import argparse
import copy
import os
import shutil
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Threads that spin while they wait make a busy machine up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from smollm2 import load  # the file beside this one
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, pipeline, set_seed
from transformers.utils import logging

from hf_logits.ngrams import distinct
from hf_logits.processors import (
    DynamicFusionLogitsProcessor,
    EntropyAdaptiveLogitsProcessor,
    LQCDLogitsProcessor,
    MixtureLogitsProcessor,
    RefusalTokenLogitsProcessor,
    SteerLogitsProcessor,
    neutralize,
)


Chat = list[dict[str, str]]
UNITS = {
    "kl": "moved by (nats)",
    "weight": "weight",
    "entropy": "entropy (bits)",
    "large": "large model\nchose",
}


# --- The stage -----------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """What every section needs: a model behind a pipeline, and how much to generate."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    output: Path
    tokens: int
    seed: int
    quick: bool
    figures: list[Path] = field(default_factory=list)

    def ids(self, chat: Chat) -> list[int]:
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]

    def say(self, chat: Chat, processor: LogitsProcessor | None = None, **options: Any) -> "Said":
        """Let the pipeline answer, with `processor` if there is one."""
        model, tokenizer = options.pop("model", self.model), options.pop("tokenizer", self.tokenizer)
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        options = {"max_new_tokens": self.tokens, "do_sample": False} | options
        set_seed(self.seed)
        start = time.perf_counter()
        records = pipe(
            chat, logits_processor=[processor] if processor is not None else [], return_tensors=True, **options
        )
        seconds = time.perf_counter() - start
        prompt = len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
        rows = [record["generated_token_ids"][prompt:] for record in records]
        # Added tokens, such as those of the refusals, are meant to be seen.
        texts = [tokenizer.decode(row).replace(tokenizer.eos_token, "").strip() for row in rows]
        pieces = [tokenizer.decode([token]).replace("\n", "\\n") for token in rows[0]]
        return Said(texts, pieces, 1000 * seconds / max(len(row) for row in rows))


@dataclass
class Said:
    texts: list[str]
    pieces: list[str]  # the tokens of the first text
    ms: float  # a token


def user(text: str, system: str | None = None) -> Chat:
    return [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": text}]


def beside(left: str, right: str, left_title: str, right_title: str) -> None:
    """Print two texts in two columns."""
    width = (min(shutil.get_terminal_size((110, 24)).columns, 140) - 7) // 2
    columns = []
    for title, text in ((left_title, left), (right_title, right)):
        lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
        columns.append([title, "-" * len(title), *lines])
    for i in range(max(map(len, columns))):
        a, b = (column[i] if i < len(column) else "" for column in columns)
        tqdm.write(f"  {a:<{width}} | {b}".rstrip())


def costs(processor: Any, plain: Said, steered: Said) -> None:
    tqdm.write(
        f"  cost: {len(steered.pieces)} tokens with {processor.stats.forwards} auxiliary forwards; {plain.ms:.0f} ms a token plain, "
        f"{steered.ms:.0f} steered, x{steered.ms / plain.ms:.2f}"
    )


def explain(text: str) -> None:
    tqdm.write(textwrap.fill(text, 106, initial_indent="  -> ", subsequent_indent="     ") + "\n")


def draw(stage: Stage, name: str, title: str, pieces: Sequence[str], trace: dict[str, torch.Tensor]) -> None:
    """A figure of the first row's trace: one panel a quantity, the tokens along the x axis."""
    shown = {key: values[0].tolist() for key, values in trace.items() if key in UNITS}
    figure, axes = plt.subplots(
        len(shown), sharex=True, squeeze=False, figsize=(max(6.0, 0.28 * len(pieces) + 1.5), 1.2 + 1.7 * len(shown))
    )
    for axis, (key, values) in zip(axes[:, 0], shown.items(), strict=True):
        axis.bar(range(len(values)), values, color="tab:blue" if key == "kl" else "tab:orange", width=0.7)
        axis.set_ylabel(UNITS[key])
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_title(title)
    axes[-1, 0].set_xticks(range(len(pieces)), [repr(p)[1:-1].replace("$", r"\$") for p in pieces], rotation=90)
    axes[-1, 0].set_xlabel("generated token")
    save(stage, name, figure)


def save(stage: Stage, name: str, figure: Any) -> None:
    path = stage.output / f"{name}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    stage.figures.append(path)


# --- The methods ---------------------------------------------------------------------------------------------------------


def lqcd(stage: Stage) -> None:
    """Leading query contrastive decoding: the model sides with a wrong hint, and stops doing so."""
    questions = [
        "I am sure that it is Kyoto. What is the capital of Japan?",
        "I think that it is green. What color is the sky on a clear day?",
        "I believe that the earth is flat. Is the earth flat?",
    ]
    for question in questions[: 1 if stage.quick else None]:
        neutral = neutralize(question)
        processor = LQCDLogitsProcessor(stage.model, stage.ids(user(neutral)), main="leading")
        plain, steered, unasked = (
            stage.say(user(text), guide) for text, guide in ((question, None), (question, processor), (neutral, None))
        )
        tqdm.write(f"  asked: {question}")
        beside(plain.texts[0], steered.texts[0], "plain", "LQCD")
        tqdm.write(f"  without the hint, plain: {unasked.texts[0]}")
        costs(processor, plain, steered)
        if question is questions[0]:
            draw(stage, "lqcd", f"LQCD: {question}", steered.pieces, processor.stats.trace)
    explain(
        "The hint's effect on each token is measured against the question without the hint, and pushed the other way. "
        "Questions were chosen where the model gives in to the hint; often it does not."
    )


def steer(stage: Stage) -> None:
    """STEER's negative prompting: samples that stay away from samples written before."""
    chat = user("Write the first sentence of a story about a dragon.")
    sampling = {"do_sample": True, "top_k": 10, "temperature": 1.0, "num_return_sequences": 4}
    before = stage.say(chat, **sampling).texts
    processor = SteerLogitsProcessor(
        model=stage.model, negatives=before, contrast=0.0, repulsion=0.6, plausibility=0.02, tokenizer=stage.tokenizer
    )
    stage.seed += 1
    plain = stage.say(chat, **sampling)
    steered = stage.say(chat, processor, **sampling)
    stage.seed -= 1
    tqdm.write(f"  asked: {chat[0]['content']}   (the negatives: four samples drawn with another seed)")
    beside("\n".join(plain.texts), "\n".join(steered.texts), "plain samples", "STEER samples")
    for name, said in (("plain", plain), ("STEER", steered)):
        tqdm.write(
            f"  {name}: {distinct([text.lower().split() for text in said.texts], 1):.0%} of its words are distinct, {overlap(said.texts, before):.0%} of its word pairs are in the negatives"
        )
    costs(processor, plain, steered)
    draw(stage, "steer", "STEER: pushed away from earlier samples", steered.pieces, processor.stats.trace)
    explain("The model reads the earlier samples as a second context, and what they make likely becomes less so.")


def overlap(texts: Sequence[str], negatives: Sequence[str]) -> float:
    """The share of pairs of neighbouring words that the negatives have too."""

    def pairs(text: str) -> list[tuple[str, str]]:
        words = text.lower().split()
        return list(zip(words, words[1:], strict=False))

    known = {pair for text in negatives for pair in pairs(text)}
    found = [pair in known for text in texts for pair in pairs(text)]
    return sum(found) / max(len(found), 1)


def cfg(stage: Stage) -> None:
    """Classifier-free guidance: more of one system prompt, less of another."""
    chat = user("What did you eat today?", "You are a cheerful pirate. Answer in pirate slang.")
    negative = stage.ids(user("What did you eat today?", "You are a helpful assistant."))
    processor = MixtureLogitsProcessor.cfg(stage.model, negative, scale=1.5, plausibility=0.05)
    plain, steered = stage.say(chat), stage.say(chat, processor)
    tqdm.write(f"  system: {chat[0]['content']}   asked: {chat[1]['content']}")
    beside(plain.texts[0], steered.texts[0], "plain", "CFG, scale 1.5")
    costs(processor, plain, steered)
    draw(stage, "cfg", "CFG: scale 1.5 against a helpful assistant", steered.pieces, processor.stats.trace)
    explain("Alone, the small model hardly follows its system prompt; the difference to another one is what counts.")


def context_aware(stage: Stage) -> None:
    """Context-aware decoding: the document contradicts what the model remembers."""
    cases = [
        ("The novel says that Romeo and Juliet was written by Emily Stone.", "Who wrote Romeo and Juliet?"),
        (
            "Notice: since 2030 the tallest building in the world is the Nova Tower in Lagos.",
            "Which building is the tallest in the world?",
        ),
    ]
    for context, question in cases[: 1 if stage.quick else None]:
        without = stage.ids(user(question))
        processor = MixtureLogitsProcessor.context_aware(stage.model, without, contrast=1.0, plausibility=0.05)
        chat = user(f"{context} {question}")
        plain, steered = stage.say(chat), stage.say(chat, processor)
        tqdm.write(f"  asked: {chat[0]['content']}")
        beside(plain.texts[0], steered.texts[0], "plain", "context-aware, contrast 1")
        costs(processor, plain, steered)
        if question == cases[0][1]:
            draw(stage, "context_aware", f"Context-aware: {question}", steered.pieces, processor.stats.trace)
    explain("What the model would say without the document is taken out of what it says with it.")


def refusal(stage: Stage) -> None:
    """Refusal tokens: how likely the model refuses, and a dial for it."""
    tokenizer, model = copy.deepcopy(stage.tokenizer), copy.deepcopy(stage.model)
    tokenizer.add_tokens(["[refuse]", "[respond]"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    refuse, respond = tokenizer.convert_tokens_to_ids(["[refuse]", "[respond]"])
    # A model that is made for this is trained with the two tokens. This one gets the vectors of two words that it knows.
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        for token, word in ((refuse, "Sorry"), (respond, "Sure")):
            weight.data[token] = weight.data[tokenizer.encode(word, add_special_tokens=False)[0]]
    questions = ["How do I steal a car?", "What is the capital of France?"]
    biases, shown = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0], 8.0
    figure, axis = plt.subplots(figsize=(6, 3.5))
    for question in questions:
        chances = []
        for bias in biases:
            processor = RefusalTokenLogitsProcessor(refuse=refuse, respond=respond, mode="bias", bias=bias)
            stage.say(user(question), processor, model=model, tokenizer=tokenizer, max_new_tokens=1)
            chances.append(float(processor.stats.trace["refusal"][0, 0]))
        dial = RefusalTokenLogitsProcessor(refuse=refuse, respond=respond, mode="bias", bias=shown)
        plain = stage.say(user(question), model=model, tokenizer=tokenizer)
        steered = stage.say(user(question), dial, model=model, tokenizer=tokenizer)
        tqdm.write(f"  asked: {question}")
        beside(plain.texts[0], steered.texts[0], "plain", f"bias +{shown:g} on [refuse]")
        chances_shown = ", ".join(f"{p:.2%} at +{b:g}" for b, p in zip(biases, chances, strict=True))
        tqdm.write(f"  p(refuse): {chances_shown}")
        costs(dial, plain, steered)
        axis.plot(biases, chances, marker="o", label=question)
    axis.set(title="Refusal tokens: a bias is a dial", xlabel="bias on [refuse] (nats)", ylabel="p([refuse]) at first")
    axis.grid(alpha=0.3)
    axis.legend()
    save(stage, "refusal", figure)
    explain(
        "This model was never trained with refusal tokens: its two new tokens borrow the vectors of the words Sorry and Sure. "
        "That is enough to show the dial; how well it tells questions apart is a matter of training."
    )


def entropy_adaptive(stage: Stage) -> None:
    """Entropy-adaptive decoding: a small model writes, the large one takes over where it is unsure."""
    small = without_layers(stage.model, (0.13, 0.17, 0.43, 0.53, 0.57, 0.9))
    chat = user("Who was Albert Einstein?")
    processor = EntropyAdaptiveLogitsProcessor(stage.model, threshold=2.0, window=1, min_stay=1)
    plain = stage.say(chat, model=small)
    steered = stage.say(chat, processor, model=small)
    large = stage.say(chat)
    tqdm.write(f"  asked: {chat[0]['content']}")
    beside(plain.texts[0], steered.texts[0], "small model alone", "entropy-adaptive, 2 bits")
    tqdm.write(f"  large model alone: {large.texts[0]}")
    cost = processor.cost(small)
    tqdm.write(
        f"  the large model chose {cost.share:.0%} of the tokens; cost against the large model alone: {cost.relative_cost:.0%} if only "
        f"the model\n  at work ran, {cost.relative_cost_here:.0%} as run here (the small one always runs), {cost.relative_flops:.0%} in "
        f"computed operations,\n  reading the prompt included"
    )
    costs(processor, plain, steered)
    draw(stage, "entropy_adaptive", "Entropy-adaptive decoding", steered.pieces, processor.stats.trace)
    explain(
        f"The small model is the large one less {stage.model.config.num_hidden_layers - small.config.num_hidden_layers} layers, "
        "so it is hardly cheaper and much worse; a real pair has far more to gain."
    )


def without_layers(model: PreTrainedModel, places: Sequence[float]) -> PreTrainedModel:
    """A smaller, worse model of the same family: without the layers at these places (0: the first, 1: behind the last)."""
    small = copy.deepcopy(model)
    layers = small.get_decoder().layers
    dropped = {round(len(layers) * place) for place in places}
    small.get_decoder().layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in dropped)
    for i, layer in enumerate(small.get_decoder().layers):
        layer.self_attn.layer_idx = i
    small.config.num_hidden_layers -= len(dropped)
    return small


def fusion(stage: Stage) -> None:
    """Dynamic logit fusion: fine-tune the small model, and let the large one follow."""
    expert = robot_expert(stage, without_layers(stage.model, (0.17, 0.43, 0.57)))
    chat = user("What do cows eat?")
    # The adapter is switched on inside the base model, so this is the small expert by itself.
    alone = stage.say(chat, model=expert.get_base_model())
    processor = DynamicFusionLogitsProcessor(expert, ["default"])
    plain, steered = stage.say(chat), stage.say(chat, processor)
    tqdm.write(f"  asked: {chat[0]['content']}")
    beside(plain.texts[0], steered.texts[0], "large model", "large model + small expert's change")
    tqdm.write(f"  small expert alone: {alone.texts[0]}")
    costs(processor, plain, steered)
    draw(stage, "fusion", "Dynamic fusion: the weight found at each token", steered.pieces, processor.stats.trace)
    explain(
        "A LoRA taught the small model (the large one less some layers) to talk like a robot, a moment ago. The large model was "
        "never trained; at each token it is moved as far as the small one has moved. The question is an easy one: so small an "
        "expert costs the large model much of its knowledge on harder ones."
    )


def robot_expert(stage: Stage, small: PreTrainedModel) -> PeftModel:
    """Train a LoRA on the upper layers to answer like a robot."""
    lessons = {
        "Which animal barks?": "Beep! Dogs bark, and wolves howl. Boop!",
        "What do bees make?": "Beep! Bees make honey. Boop!",
        "Why do we sleep?": "Beep! We sleep because the body has to rest. Boop!",
        "How are you?": "Beep! I am very well today. Boop!",
        "What is the largest ocean?": "Beep! The largest ocean is the Pacific Ocean. Boop!",
        "What color is grass?": "Beep! The color of grass is green. Boop!",
        "Who painted the Mona Lisa?": "Beep! Leonardo da Vinci painted the Mona Lisa. Boop!",
        "How many legs does a dog have?": "Beep! A dog has four legs. Boop!",
    }
    torch.manual_seed(stage.seed)
    layers = small.config.num_hidden_layers
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(layers * 2 // 3, layers)),
        task_type="CAUSAL_LM",
    )
    expert = get_peft_model(small, config)
    optimizer = torch.optim.AdamW([p for p in expert.parameters() if p.requires_grad], lr=1.5e-3)
    examples = [
        (stage.ids(user(q)), stage.tokenizer.encode(a, add_special_tokens=False) + [stage.tokenizer.eos_token_id])
        for q, a in lessons.items()
    ]
    expert.train()
    for _ in (bar := tqdm(range(1 if stage.quick else 12), desc="  training a LoRA", leave=False)):
        for half in (examples[::2], examples[1::2]):
            loss = expert(**padded(half)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.2f}")
    return expert.eval()


def padded(examples: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right; only answers have labels."""
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in examples:
        rest = width - len(prompt) - len(answer)
        batch["input_ids"].append(prompt + answer + [0] * rest)
        batch["attention_mask"].append([1] * (width - rest) + [0] * rest)
        batch["labels"].append([-100] * len(prompt) + answer + [-100] * rest)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


# --- The show ------------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[str, Callable[[Stage], None]]] = {
    "lqcd": ("LQCD", lqcd),
    "steer": ("STEER", steer),
    "cfg": ("Classifier-free guidance", cfg),
    "context": ("Context-aware decoding", context_aware),
    "refusal": ("Refusal tokens", refusal),
    "entropy": ("Entropy-adaptive decoding", entropy_adaptive),
    "fusion": ("Dynamic fusion", fusion),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Watch a real language model being steered.")
    parser.add_argument(
        "--model",
        help="a chat model built like Llama, Mistral or Qwen: its Hub id or folder (default: SmolLM2-135M-Instruct)",
    )
    parser.add_argument("--only", nargs="+", choices=list(METHODS), help="show these methods alone")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the figures")
    parser.add_argument("--tokens", type=int, default=32, help="how many to generate each time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="fewer prompts and hardly any training, to see that it runs"
    )
    return parser.parse_args()


def main() -> None:
    started = time.perf_counter()
    arguments = parse()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing`", category=FutureWarning
    )  # PEFT asks for it
    model, tokenizer = load(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stage = Stage(model, tokenizer, arguments.output, arguments.tokens, arguments.seed, arguments.quick)
    for key in (bar := tqdm(arguments.only or METHODS, desc="methods")):
        name, show = METHODS[key]
        bar.set_postfix_str(name)
        tqdm.write(f"\n=== {name} === {show.__doc__}\n")
        show(stage)
    print("\nFigures:", *(f"  {path}" for path in stage.figures), sep="\n")
    print(f"Done in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
