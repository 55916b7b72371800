"""NKD: the teacher's view of the label, and of the other classes among themselves, each with its own weight."""

from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from hf_logits.checks import check_number
from hf_logits.class_logits import check_logits, expected, label_mask, log_softmax_without, widen


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
