"""NKD: the teacher's view of the label, and of the other classes among themselves, each with its own weight."""

from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_logits.checks import check_number
from hf_logits.class_logits import check_logits, expected, label_mask, log_softmax_without, widen
from hf_logits.distillation import DistillationConfig, DistillationTrainer


def nkd_target(
    student_logits: Float[Tensor, "N C"], teacher_logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """`-p_t(y) log p_s(y)` of each row, without a temperature."""
    column = labels[:, None]
    weight = teacher_logits.detach().log_softmax(-1).gather(-1, column).exp()
    return expected(weight, -student_logits.log_softmax(-1).gather(-1, column))


def nkd_non_target(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    labels: Int[Tensor, " N"],
    *,
    temperature: float,
) -> Float[Tensor, " N"]:
    """`-T^2 sum_{i != y} q_t(i) log q_s(i)` of each row, with `q` the softmax of `logits / T` over all classes but the label.

    A cross-entropy, so it is not zero where both are equal. With two classes, and where the teacher has ruled out all but the
    label, there is nothing to compare and it is 0.
    """
    is_label: Bool[Tensor, "N C"] = label_mask(labels, student_logits.size(-1))
    taught = log_softmax_without(teacher_logits.detach() / temperature, is_label).exp()
    learned = log_softmax_without(student_logits / temperature, is_label)
    return -(temperature**2) * expected(taught, learned)


def nkd_loss(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    labels: Num[Tensor, "N ..."],
    *,
    gamma: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """`-p_t(y) log p_s(y) - gamma T^2 sum_{i != y} q_t(i) log q_s(i)`, averaged over the rows. The task's loss is not in it.

    The target's part has no temperature, as in the released code.

    Args:
        student_logits, teacher_logits: of the rows that have a label, in any floating dtype; computed in float32 at least.
        labels: class ids, or probabilities of which the largest is taken.
        gamma: weight of the classes beside the label.
        temperature: of these classes' softmax.

    Raises:
        ValueError: shapes that do not fit, labels out of range, fewer than two classes, no rows, `temperature <= 0`.
    """
    check_number("gamma", gamma, minimum=0.0)
    check_number("temperature", temperature, minimum=0.0, above=True)
    check_logits(student_logits, teacher_logits, "teacher's", labels=labels, classes=2)
    student, teacher = widen(student_logits), widen(teacher_logits)
    labels = labels.argmax(-1) if labels.dim() == 2 else labels
    rows = nkd_target(student, teacher, labels)
    rows = rows + gamma * nkd_non_target(student, teacher, labels, temperature=temperature)
    return rows.mean()


@dataclass
class NKDConfig(DistillationConfig):
    """What [`NKDTrainer`] needs beside the settings of all distillation trainers.

    Args:
        gamma (`float`, *optional*, defaults to `1.5`):
            Weight of the classes beside the label. The authors take 1.5 for ImageNet's convolutional students, 1 for DeiT (both
            with temperature 1) and 3.5 for CIFAR-100 (with temperature 3).
        temperature (`float`, *optional*, defaults to `1.0`):
            Of these classes' softmax.
        nkd_weight (`float`, *optional*, defaults to `1.0`):
            Weight of both parts of NKD. `0` is training on the labels alone.
        ce_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the labels' cross-entropy, the task's own loss.
    """

    gamma: float = field(default=1.5, metadata={"help": "Weight of the classes beside the label."})
    temperature: float = field(default=1.0, metadata={"help": "Of the softmax of the classes beside the label."})
    nkd_weight: float = field(default=1.0, metadata={"help": "Weight of both parts of NKD."})
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the labels' cross-entropy."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, minimum=0.0)
        check_number("temperature", self.temperature, minimum=0.0, above=True)
        check_number("nkd_weight", self.nkd_weight, minimum=0.0)
        check_number("ce_weight", self.ce_weight, minimum=0.0)


class NKDTrainer(DistillationTrainer):
    """Cross-entropy + NKD, from [From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
    Loss and Customized Soft Labels](https://huggingface.co/papers/2303.13005).

    `ce_weight CE + nkd_weight (-p_t(y) log p_s(y) - gamma T^2 sum_{i != y} q_t(i) log q_s(i))`, see [`nkd_loss`], which the released
    code computes too. A token of a language model is a row like any other, its label the next token [ours].

    Logged under `distillation/`: `cross_entropy`, `target`, `non_target` (neither is zero where both models agree), and the common
    meters. Arguments as in [`~hf_logits.distillation.DistillationTrainer`].
    """

    args: NKDConfig
    _config = NKDConfig
    _name = "NKD"
    _tag_names = ["hf_logits", "nkd"]
    _paper = {
        "title": "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized "
        "Soft Labels",
        "id": "2303.13005",
        # docstyle-ignore
        "citation": """\
@inproceedings{yang2023knowledge,
    title     = {{From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels}},
    author    = {Zhendong Yang and Ailing Zeng and Zhe Li and Tianke Zhang and Chun Yuan and Yu Li},
    year      = 2023,
    booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision}
}""",
    }

    def terms(
        self, student: Float[Tensor, "N C"], teacher: Float[Tensor, "N C"] | None, labels: Int[Tensor, " N"]
    ) -> dict[str, Float[Tensor, " N"]]:
        assert teacher is not None
        return {
            "cross_entropy": cross_entropy(student, labels, reduction="none"),
            "target": nkd_target(student, teacher, labels),
            "non_target": nkd_non_target(student, teacher, labels, temperature=self.args.temperature),
        }

    def term_weights(self) -> dict[str, float]:
        weight = self.args.nkd_weight
        return {"cross_entropy": self.args.ce_weight, "target": weight, "non_target": weight * self.args.gamma}
