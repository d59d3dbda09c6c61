"""An Audio Spectrogram Transformer whose classifier sees the mean of the patch tokens, as SSAST models are fine-tuned.

transformers' own `ASTForAudioClassification` classifies the mean of the two prefix tokens. This file lies in the
model's folder beside its weights; `AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True)`
runs it. The type of the model is one of its own, so that without `trust_remote_code` it is refused instead of being
read as the other kind.
"""

from typing import Any

import torch
from transformers import ASTConfig, ASTForAudioClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

NUM_PREFIX = 2  # cls and dist


class SSASTConfig(ASTConfig):
    """An ASTConfig under a model type of its own."""

    model_type = "ssast"


class SSASTForAudioClassification(ASTForAudioClassification):
    """The mean of the patch tokens, classified."""

    config: SSASTConfig
    config_class = SSASTConfig

    def __init__(self, config: SSASTConfig) -> None:
        super().__init__(config)
        self.classifier.layernorm.eps = 1e-5  # not the encoder's

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """input_values [B, max_length, num_mel_bins] -> logits [B, C]."""
        outputs = self.audio_spectrogram_transformer(input_values, attention_mask=attention_mask, **kwargs)
        logits = self.classifier(outputs.last_hidden_state[:, NUM_PREFIX:].mean(dim=1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
