"""Dual-head distillation: a logit-level loss on a head of its own, which shares the backbone and is thrown away."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_logits.checks import check_choice, check_count, check_number
from hf_logits.class_logits import check_logits, widen
from hf_logits.distillation import DistillationConfig
from hf_logits.extra_head import ExtraHeadMixin
from hf_logits.tasks import LANGUAGE, bare, valid_rows


class _LogCosh(torch.autograd.Function):
    """`log cosh x`, right to the last digits for small and for large x, and so is its gradient `tanh x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        size = x.abs()
        # log cosh x = log(1 + sinh(x)^2) / 2 = |x| + log(1 + exp(-2 |x|)) - log 2
        small = size.clamp(max=1.0).sinh().square().log1p() / 2
        return torch.where(size < 1.0, small, size + (-2 * size).exp().log1p() - math.log(2.0))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * x.tanh()


def standardise(logits: Float[Tensor, "N C"], banned: Bool[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Each row less its mean, over its standard deviation, among the classes that are not banned. Equal ones become 0."""
    count, kept = (~banned).sum(-1, keepdim=True).clamp(min=1), logits.masked_fill(banned, 0.0)
    centred = (kept - kept.sum(-1, keepdim=True) / count).masked_fill(banned, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / count
    return centred / torch.where(variance > 0, variance, 1.0).sqrt()


def binary_kl_norm(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    *,
    temperature: float,
    center: bool,
    mean_over_classes: bool,
    normalise: bool,
) -> Float[Tensor, " N"]:
    """The rows of [`binary_kl_norm_loss`]."""
    student, teacher = student_logits, teacher_logits.detach()
    banned = student.isneginf() & teacher.isneginf()  # does not differ
    if normalise:
        student, teacher = standardise(student, banned), standardise(teacher, banned)
    difference = (student - teacher).masked_fill(banned, 0.0)
    if center:
        mean = difference.sum(-1, keepdim=True) / (~banned).sum(-1, keepdim=True).clamp(min=1)
        difference = (difference - mean).masked_fill(banned, 0.0)
    # T^2 KL(Bern(1/2) || Bern(sigmoid(d / T))) = T^2 log cosh(d / 2T)
    values: Tensor = _LogCosh.apply(difference / (2 * temperature))
    return temperature**2 * (values.mean(-1) if mean_over_classes else values.sum(-1))


def binary_kl_norm_loss(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    *,
    temperature: float,
    center: bool = False,
    mean_over_classes: bool = False,
    normalise: bool = False,
) -> Float[Tensor, ""]:
    """`T^2 sum_c KL(Bern(1/2) || Bern(sigmoid((s_c - t_c) / T)))`, averaged over the rows.

    That is `T^2 sum_c log cosh((s_c - t_c) / 2T)`, which is how it is computed: finite wherever the logits are, where the released
    code's clamp gives infinity and NaN from a difference of about 17 T on. A gradient is at most `T / 2N`.

    Args:
        student_logits, teacher_logits: in any floating dtype; computed in float32 at least.
        temperature: the larger, the closer to `(s - t)^2 / 8`.
        center: whether each row's mean is taken off first [ours]. Language models' logits are only defined up to it. Without, the
            loss sees a shift of a row.
        mean_over_classes: whether classes are averaged in place of summed [ours], so that vocabularies do not blow it up.
        normalise: whether each row, of both, is first brought to mean 0 and standard deviation 1 [ours], for teachers whose logits
            have another scale than the student's. The loss sees neither shift nor scale of a row then, and `T / 2N` is no bound.

    Raises:
        ValueError: shapes that do not fit, no rows, `temperature <= 0`.
    """
    check_number("temperature", temperature, minimum=0.0, above=True)
    check_logits(student_logits, teacher_logits, "teacher's")
    rows = binary_kl_norm(
        widen(student_logits),
        widen(teacher_logits),
        temperature=temperature,
        center=center,
        mean_over_classes=mean_over_classes,
        normalise=normalise,
    )
    return rows.mean()


def project_gradient(
    main: Sequence[Float[Tensor, "..."] | None], auxiliary: Sequence[Float[Tensor, "..."] | None]
) -> list[Float[Tensor, "..."] | None]:
    """The auxiliary loss's gradient without what works against the main loss: `g1 - min(<g1, g0>, 0) / |g0|^2 g0`.

    One projection for all parameters together, and only of `g1`.

    Args:
        main, auxiliary: gradients of the same parameters, `None` where a loss does not reach one. Such a parameter takes no part
            in the product, and its auxiliary gradient does not change except by that of the main loss.
    """
    pairs = list(zip(main, auxiliary, strict=True))
    both = [(g0, g1) for g0, g1 in pairs if g0 is not None and g1 is not None]
    if not both:
        return list(auxiliary)
    dot = torch.stack([(widen(g0) * widen(g1)).sum() for g0, g1 in both]).sum()
    square = torch.stack([widen(g0).square().sum() for g0 in main if g0 is not None]).sum()
    share = torch.where(square > 0, dot.clamp(max=0.0) / square, 0.0)
    projected: list[Tensor | None] = []
    for g0, g1 in pairs:
        if g0 is None:
            projected.append(g1)
        else:
            projected.append((-share * g0 if g1 is None else g1 - share * g0).to(g0.dtype))
    return projected


HEADS = ("linear", "low_rank", "nonlinear")


def build_head(kind: str, width: int, classes: int, *, inner: int) -> nn.Module:
    """The auxiliary head: one layer, two with few numbers between them, or the authors' Linear, Dropout(0.1), BatchNorm, ReLU, Linear."""
    if kind == "linear":
        return nn.Linear(width, classes)
    if kind == "low_rank":
        return nn.Sequential(nn.Linear(width, inner, bias=False), nn.Linear(inner, classes))
    return nn.Sequential(
        nn.Linear(width, inner), nn.Dropout(0.1), nn.BatchNorm1d(inner), nn.ReLU(), nn.Linear(inner, classes)
    )


def base_layer(module: Any) -> Any:
    """What an adapter wraps, or the layer itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def find_classifier(model: Any, classes: int) -> Any:
    """The linear layer that a model's logits come from: the last one with as many outputs as there are classes."""
    whole: Any = bare(model)
    output = whole.get_output_embeddings()
    modules = list((whole if output is None else output).modules())
    # an adapter's layers are none of the model's, and what it wraps does not give the logits alone
    adapters: set[Any] = {module for module in modules if isinstance(module, BaseTunerLayer)}
    inner = {module for adapter in adapters for module in adapter.modules()} - adapters
    linear = {module: base_layer(module) for module in modules if module not in inner}
    found = [module for module, base in linear.items() if isinstance(base, nn.Linear) and base.out_features == classes]
    if not found:
        raise ValueError(
            f"{type(whole).__name__} has no linear layer with {classes} outputs to put a second head beside."
        )
    # of a classifier that PEFT has copied, the copy is trained; of a head with LoRA, the layer itself comes first
    return found[-1] if output is None or isinstance(output, ModulesToSaveWrapper) else found[0]


@dataclass
class DualHeadDistillationConfig(DistillationConfig):
    """What [`DualHeadDistillationTrainer`] needs beside the settings of all distillation trainers.

    Args:
        auxiliary_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the auxiliary head's loss, the paper's alpha. `0` is training on the labels alone. The authors take 1 for
            CIFAR-100 and 0.1 for ImageNet.
        ce_weight (`float`, *optional*, defaults to `1.0`): weight of the labels' cross-entropy on the head that is kept.
        temperature (`float`, *optional*, defaults to `2.0`): of the auxiliary loss.
        head (`str`, *optional*, defaults to `"linear"`):
            `"linear"`; `"nonlinear"`: Linear, Dropout, BatchNorm, ReLU, Linear, as the authors take for CIFAR-100; or `"low_rank"`:
            two linear layers with `head_width` numbers between them, for language models, whose linear head would be as large as
            the first one [ours].
        head_width (`int`, *optional*, defaults to `200`): of the nonlinear head, and of that of low rank.
        gradient_alignment (`bool`, *optional*, defaults to `False`):
            Whether what works against the cross-entropy is taken out of the auxiliary loss's gradient, as the authors do for
            CIFAR-100. Costs a second backward and a copy of the gradients. All logits of a language model are in memory then.
        auxiliary_epochs (`float`, *optional*): epochs after which the auxiliary loss stops; 50 of 100 on ImageNet in the released code.
        center (`bool`, *optional*):
            Whether the mean of each row's logits does not count. `None`: for language models [ours].
        mean_over_classes (`bool`, *optional*):
            Whether classes are averaged in place of summed. `None`: for language models [ours].
        normalise (`bool`, *optional*, defaults to `False`):
            Whether each row of both logits is brought to one mean and scale in the auxiliary loss, see [`binary_kl_norm_loss`] [ours].
    """

    auxiliary_weight: float = field(default=1.0, metadata={"help": "Weight of the auxiliary head's loss."})
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the labels' cross-entropy."})
    temperature: float = field(default=2.0, metadata={"help": "Of the auxiliary loss."})
    head: str = field(default="linear", metadata={"help": "The auxiliary head.", "choices": list(HEADS)})
    head_width: int = field(default=200, metadata={"help": "Of a nonlinear or low-rank head."})
    gradient_alignment: bool = field(default=False, metadata={"help": "Whether the auxiliary gradient is projected."})
    auxiliary_epochs: float | None = field(default=None, metadata={"help": "Epochs with the auxiliary loss."})
    center: bool | None = field(default=None, metadata={"help": "Whether the mean of a row's logits does not count."})
    mean_over_classes: bool | None = field(default=None, metadata={"help": "Whether classes are averaged."})
    normalise: bool = field(default=False, metadata={"help": "Whether rows of both logits are brought to one scale."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("auxiliary_weight", self.auxiliary_weight, minimum=0.0)
        check_number("ce_weight", self.ce_weight, minimum=0.0)
        check_number("temperature", self.temperature, minimum=0.0, above=True)
        check_choice("head", self.head, *HEADS)
        check_count("head_width", self.head_width, minimum=1)
        if self.auxiliary_epochs is not None:
            check_number("auxiliary_epochs", self.auxiliary_epochs, minimum=0.0)


class DualHeadDistillationTrainer(ExtraHeadMixin):
    """Labels teach the classifier, the teacher's logits teach a second head beside it, and both the backbone: from [Dual-Head
    Knowledge Distillation](https://huggingface.co/papers/2411.08937) (DHKD).

    `ce_weight CE(classifier) + auxiliary_weight BinaryKL-Norm(auxiliary head, teacher)`, see [`binary_kl_norm_loss`]. The auxiliary
    head reads what the classifier reads. It is in resume checkpoints, and not in what is saved of the model.

    Beside the released code: the loss is finite at any scale, the optimizer steps once, and the auxiliary gradient is projected once
    a step, after all micro-batches and processes. The loss depends on the scale of the teacher's logits, unless `normalise` is set.
    For language models there are `head="low_rank"`, `center` and `mean_over_classes` [ours]. Both of their heads run on a chunk of the
    tokens at a time, except with `head="nonlinear"`, which normalises over a batch, or with `gradient_alignment`. Do not expect much
    of it in short runs or with few classes.

    Logged under `distillation/`: `cross_entropy`, `auxiliary`, and the common meters. Arguments as in
    [`~hf_logits.distillation.DistillationTrainer`].
    """

    args: DualHeadDistillationConfig
    _config = DualHeadDistillationConfig
    _name = "Dual-head distillation"
    _tag_names = ["hf_logits", "dual-head-distillation"]
    _paper = {
        "title": "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
        "id": "2411.08937",
        # docstyle-ignore
        "citation": """\
@misc{yang2024dual,
    title  = {{Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head}},
    author = {Penghui Yang and Chen-Chen Zong and Sheng-Jun Huang and Lei Feng and Bo An},
    year   = 2024,
    eprint = {2411.08937}
}""",
    }

    def __init__(self, model: Any, teacher: Any = None, args: Any = None, **rest: Any):
        super().__init__(model, teacher, args, **rest)
        self._seen: list[Any] = []
        self._parts: list[tuple[Tensor, int]] | None = None
        self._gradients: tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, Tensor]] = ({}, {})
        if not self.args.auxiliary_weight:
            return
        if self.args.gradient_alignment:
            plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
            if plugin is not None or self.args.fp16:
                raise ValueError(
                    "gradient_alignment works on whole gradients as they are: not with DeepSpeed, which shards them, nor with fp16, "
                    "which scales them. Use DDP and bf16, or turn it off."
                )
            if self._balance:
                raise ValueError(
                    "gradient_alignment knows the gradients of two losses, and a mixture of experts' routers have a third: set the "
                    "student's config.output_router_logits=False, or turn gradient_alignment off."
                )
        if self.args.torch_compile:
            raise ValueError(
                "The auxiliary head reads what the classifier reads, by a hook that a compiled model does not call: turn torch_compile "
                "off."
            )
        config: Any = bare(model).config
        language = self.task in LANGUAGE
        classes = config.get_text_config().vocab_size if language else config.num_labels
        self._classifier = find_classifier(model, classes)
        width = base_layer(self._classifier).in_features
        self.attach(lambda: build_head(self.args.head, width, classes, inner=self.args.head_width))

    def _prepare_heads(self, model: Any, teacher: Any) -> None:
        super()._prepare_heads(model, teacher)
        if self._fused and self.args.auxiliary_weight:
            if self.args.head == "nonlinear":
                self._not_fused(
                    'head="nonlinear" normalises over all tokens of a batch, "linear" and "low_rank" do not'
                )
            elif self.args.gradient_alignment:
                self._not_fused("gradient_alignment needs the gradients of two losses apart")

    def _is_on(self) -> bool:
        """A function of the trainer's state, so that a resumed run stops where an unbroken one does."""
        end = self.args.auxiliary_epochs
        return bool(self.args.auxiliary_weight) and (end is None or (self.state.epoch or 0.0) < end)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._extra is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        _, self._wanted, _ = self._split(inputs)
        with self._reading():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Keep what the student's classifier reads, and gives where one row of several counts; with an adapter as teacher, of the last forward alone."""
        self._seen = []

        def keep(module: Any, args: Any, output: Any) -> None:
            self._seen = [args[0], output if self._wanted.dim() == 1 else None]

        handle = self._classifier.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
            self._seen = []

    def _features(self, student: Float[Tensor, "N C"]) -> Float[Tensor, "N D"]:
        read, given = self._seen
        if read.shape[:2] == (1, len(student)):  # a chunk of rows that count, which a fused head has read
            return read[0]
        if self._wanted.dim() == 2:
            return valid_rows(read, self._wanted)[0]
        valid = self._wanted != -100
        read, given = read[valid], given[valid]
        if read.dim() == 3:  # a decoder reads all tokens and then takes one: that whose logits came out
            # [N, L], of equal ones the last
            same = (widen(given.detach()) == student.detach()[:, None]).all(-1)
            place = (same * torch.arange(1, 1 + same.size(1), device=same.device)).argmax(-1)
            read = read[torch.arange(len(read), device=read.device), place]
        return read

    def terms(
        self, student: Float[Tensor, "N C"], teacher: Float[Tensor, "N C"] | None, labels: Int[Tensor, " N"]
    ) -> dict[str, Float[Tensor, " N"]]:
        assert teacher is not None
        found = {"cross_entropy": cross_entropy(student, labels, reduction="none")}
        if self._extra is None:
            return found
        if not self._is_on():
            return found | {"auxiliary": self.keep_alive().expand(len(labels))}
        language = self.task in LANGUAGE
        features = self._features(student).to(next(self._extra.parameters()).dtype)
        if self.args.head == "nonlinear" and self._extra.training and len(features) < 2:
            raise ValueError(
                'head="nonlinear" normalises over a batch and needs two rows at least in each: take a larger batch with '
                'dataloader_drop_last=True, or head="linear".'
            )
        auxiliary = widen(self._extra(features))[:, : student.size(-1)]
        defaults = {"center": self.args.center, "mean_over_classes": self.args.mean_over_classes}
        found["auxiliary"] = binary_kl_norm(
            auxiliary,
            teacher,
            temperature=self.args.temperature,
            normalise=self.args.normalise,
            **{name: language if value is None else value for name, value in defaults.items()},
        )
        if self.args.gradient_alignment:
            self._parts = [(weight * found[name].sum(), len(labels)) for name, weight in self.term_weights().items()]
        return found

    def term_weights(self) -> dict[str, float]:
        weights = {"cross_entropy": self.args.ce_weight}
        return weights if self._extra is None else weights | {"auxiliary": self.args.auxiliary_weight}

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._extra is None or not self.args.gradient_alignment or not self._is_on():
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs, self._parts = self._prepare_inputs(inputs), None
        with self.accelerator.no_sync(model), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # a batch without rows has no parts
        losses = (
            [loss] if self._parts is None else [self._normalise(*part, num_items_in_batch) for part in self._parts]
        )
        found = [torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in losses]
        self._parts = None
        for sums, gradients in zip(self._gradients, found, strict=False):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[parameter] = sums[parameter] + gradient if parameter in sums else gradient
        if self.accelerator.sync_gradients:
            self._align(parameters)
        return loss.detach()

    def _inner_training_loop(self, *given: Any, **named: Any) -> Any:
        self._gradients = ({}, {})  # a run that broke off, for want of memory say, may have left half a step
        return super()._inner_training_loop(*given, **named)

    def _align(self, parameters: list[nn.Parameter]) -> None:
        """Both gradients of the whole step, over all processes, into one."""
        main, auxiliary = self._gradients
        if self.accelerator.num_processes > 1:
            for sums in self._gradients:
                for parameter in parameters:
                    own = sums[parameter] if parameter in sums else torch.zeros_like(parameter)
                    sums[parameter] = self.accelerator.reduce(own, reduction="mean")
        projected = project_gradient([main.get(p) for p in parameters], [auxiliary.get(p) for p in parameters])
        for parameter, extra in zip(parameters, projected, strict=True):
            parts = [part for part in (main.get(parameter), extra) if part is not None]
            parameter.grad = sum(parts[1:], parts[0]) if parts else None
        self._gradients = ({}, {})
