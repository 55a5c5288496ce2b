"""What a task minimises: an error of the answers alone. The model may read something else than tokens."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...students import HybridForCausalLM
from ...teachers import output_head
from ..objectives import EndToEnd, hidden_states


class Answering(EndToEnd):
    """A mean over the answers of a batch, of which each item has as many: so gradients of micro-batches add up."""

    beside: tuple[Any, ...] = ()

    def __init__(self, student: HybridForCausalLM):
        super().__init__()
        self.student = student

    def models(self) -> list[PreTrainedModel]:
        return [self.student]

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that take part, by name."""
        return dict(self.named_parameters())

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        said = self.said(batch)
        return self.loss(said, batch["answers"]), {"figure": self.figures(said, batch["answers"]).mean()}

    def said(self, batch: dict[str, Tensor]) -> Tensor:
        """What the model says where it is asked, (B, A, ...)."""
        raise NotImplementedError

    def loss(self, said: Tensor, answers: Tensor) -> Tensor:
        raise NotImplementedError

    def figures(self, said: Tensor, answers: Tensor) -> Tensor:
        """What is measured, of each answer (B, A)."""
        raise NotImplementedError

    def _where_asked(self, batch: dict[str, Tensor], **inputs: Tensor) -> Tensor:
        """The last hidden states (B, A, hidden) there."""
        inputs |= {"position_ids": batch["position_ids"]}
        hidden = hidden_states(self.student, {**inputs, "use_cache": False}, every=False)[-1]
        return hidden.gather(1, batch["asked"][..., None].expand(-1, -1, hidden.shape[-1]))


class TokenAnswers(Answering):
    """Cross-entropy of the token that is the answer, in nats per answer; measured is whether it is the likeliest."""

    def said(self, batch: dict[str, Tensor]) -> Tensor:
        return output_head(self.student, check=False).logits(self._where_asked(batch, input_ids=batch["input_ids"]))

    def loss(self, said: Tensor, answers: Tensor) -> Tensor:
        return F.cross_entropy(said.float().flatten(0, 1), answers.flatten())

    def figures(self, said: Tensor, answers: Tensor) -> Tensor:
        return (said.argmax(-1) == answers).float()


class ValueAnswers(Answering):
    """Squared error of a number, from vectors that are read by a linear layer in place of embeddings; measured is the
    squared error by the number of their dimensions."""

    def __init__(self, student: HybridForCausalLM, dimensions: int):
        super().__init__(student)
        self.read_in = nn.Linear(dimensions, student.config.hidden_size)
        self.read_out = nn.Linear(student.config.hidden_size, 1)

    def trained(self) -> dict[str, nn.Parameter]:
        """All but embeddings and output matrix: there are no tokens."""
        unused = (self.student.get_input_embeddings(), self.student.get_output_embeddings())
        left_out = {id(parameter) for module in unused for parameter in module.parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) not in left_out}

    def said(self, batch: dict[str, Tensor]) -> Tensor:
        return self.read_out(self._where_asked(batch, inputs_embeds=self.read_in(batch["inputs"])))[..., 0]

    def loss(self, said: Tensor, answers: Tensor) -> Tensor:
        return F.mse_loss(said.float(), answers)

    def figures(self, said: Tensor, answers: Tensor) -> Tensor:
        return (said.float() - answers).square() / self.read_in.in_features


class SignAnswers(ValueAnswers):
    """The same of -1 or 1, as which of the two: cross-entropy, and whether the sign is right."""

    def loss(self, said: Tensor, answers: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(said.float(), (answers + 1) / 2)

    def figures(self, said: Tensor, answers: Tensor) -> Tensor:
        return (said.sign() == answers).float()
